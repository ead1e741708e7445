"""The data formats by name: `load_dataset` and what it chooses from. One data set has a name itself: `movielens`.

Knows nothing of what the formats mean. A new one is a loader and a line in each of the two tables here. Invariant: what
was guessed of a folder is in the notes of the data set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from rcllm.data.catalogue import ItemRows
from rcllm.data.columns import InteractionColumns
from rcllm.data.content import COMPRESSED
from rcllm.data.dataset import Dataset, InteractionSource, ItemSource, assemble
from rcllm.data.files import iter_rows
from rcllm.data.interactions import log_rows
from rcllm.data.movielens import (
    fetch_movielens,
    load_movielens_1m,
    load_movielens_100k,
    load_movielens_latest,
    load_recbole,
)
from rcllm.data.raw import Fields, Notes, Row
from rcllm.data.reviews import load_amazon_2018, load_amazon_2023, load_goodreads, load_yelp
from rcllm.data.text import did_you_mean, listed
from rcllm.errors import ConfigError, DataError

MOVIELENS = "movielens"  # the data set that can be named where a folder is expected


class Loader(Protocol):
    """Reads the files of one format in `folder`. Raises DataError; where strict, for the first malformed row."""

    def __call__(self, folder: Path, *, strict: bool = False) -> Dataset: ...


class FreeLoader(Loader, Protocol):
    """A loader for a format whose columns may have any name."""

    def __call__(self, folder: Path, *, strict: bool = False, columns: InteractionColumns | None = None) -> Dataset: ...


_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LOGS = ("users", "interactions", "inter")


def load_common(folder: Path, *, strict: bool = False, columns: InteractionColumns | None = None) -> Dataset:
    """`items.jsonl` (`item_id` and fields) and `users.jsonl` (`user_id`, `history` from oldest to newest).

    In place of users, `interactions` or `inter` with a row per interaction; .json, .csv, .tsv and .parquet as well.
    Items may call their id as the interactions call the item.
    """
    notes, log = Notes(), Notes()
    rows = ItemRows(None, (), notes, log=columns or InteractionColumns())
    items = ItemSource(_named("items"), rows, notes=notes)
    users = InteractionSource(tuple(name for stem in _LOGS for name in _named(stem)), log_rows(columns, log), notes=log)
    return assemble(folder, items, users, strict=strict)


def load_lc_rec(folder: Path, *, strict: bool = False) -> Dataset:
    """`NAME.item.json` (fields by item) and `NAME.inter.json` (items by user), as LC-Rec publishes them."""
    notes, log = Notes(), Notes()
    items = ItemSource(("*.item.json",), ItemRows("item_id", (), notes), notes=notes)
    users = InteractionSource(("*.inter.json",), log_rows(None, log), notes=log)
    return assemble(folder, items, users, strict=strict)


def _named(stem: str) -> tuple[str, ...]:
    return tuple(stem + suffix + packed for suffix in _SUFFIXES for packed in ("", *COMPRESSED))


_FREE: dict[str, FreeLoader] = {"common": load_common, "recbole": load_recbole}
FORMATS: dict[str, Loader] = {
    **_FREE,
    "yelp": load_yelp,
    "goodreads": load_goodreads,
    "movielens_100k": load_movielens_100k,
    "movielens_1m": load_movielens_1m,
    "movielens_latest": load_movielens_latest,
    "lc_rec": load_lc_rec,
    "amazon_2023": load_amazon_2023,
    "amazon_2018": load_amazon_2018,
    "amazon_2014": load_amazon_2018,  # the same names and fields; Python literals in place of JSON
}


@dataclass(frozen=True, slots=True)
class _Mark:
    """A file that gives a format away."""

    format: str
    patterns: tuple[str, ...]
    beside: tuple[str, ...] = ()  # of which one must be there too, where the name says too little
    fields: frozenset[str] = frozenset()  # that its first row must have, likewise

    def found(self, folder: Path) -> Path | None:
        if self.beside and not any((folder / name).is_file() for name in self.beside):
            return None
        paths = (path for pattern in self.patterns for path in sorted(folder.glob(pattern)))
        return next((path for path in paths if not self.fields or self.fields <= _first_fields(path).keys()), None)


# By preference. Amazon's names say least, so they come last.
_MARKS = (
    _Mark("common", ("users.jsonl", "users.jsonl.gz")),
    _Mark("common", tuple(name for stem in _LOGS for name in _named(stem)), beside=_named("items")),
    _Mark("yelp", ("yelp_academic_dataset_review.json*",)),
    _Mark("goodreads", ("goodreads_books*.json*",)),
    _Mark("movielens_100k", ("u.data",)),
    _Mark("movielens_1m", ("ratings.dat",)),
    _Mark("movielens_latest", ("ratings.csv",)),
    _Mark("recbole", ("*.inter",)),
    _Mark("lc_rec", ("*.inter.json",)),
    _Mark("amazon_2023", ("*.jsonl", "*.jsonl.gz"), fields=frozenset({"parent_asin", "user_id"})),
    _Mark("amazon_2018", ("*.json", "*.json.gz"), fields=frozenset({"asin", "reviewerID"})),
)


def _first_fields(path: Path) -> Fields:
    """The first of the first rows that can be read; none where the file cannot."""
    try:
        first = islice(iter_rows(path), 100)
        return next((row.fields for row in first if isinstance(row, Row)), {})
    except DataError:
        return {}


def load_dataset(
    name: str, folder: str | Path, strict: bool = False, *, columns: InteractionColumns | None = None
) -> Dataset:
    """Reads the data set in `folder`, in the format called `name`, or `auto`.

    Where no folder is called `movielens`, that name stands for MovieLens-100K, which is fetched once. Malformed rows
    are skipped and reported in `Dataset.reports`; where `strict`, the first one raises DataError. `columns`: the names
    in formats whose columns may have any name (common, recbole); None tries the usual ones. Raises FetchError.
    """
    path = Path(folder)
    if str(folder) == MOVIELENS and name in ("auto", "recbole") and not path.exists():
        return fetch_movielens()
    notes: tuple[str, ...] = ()
    chosen = name
    if name == "auto":
        found = _detected(path)
        chosen, notes = next(iter(found)), _told(found)
    if chosen not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"expected a data format (auto, {known}), got {name!r}.{did_you_mean(name, FORMATS)}")
    if columns is None or columns == InteractionColumns():
        dataset = FORMATS[chosen](path, strict=strict)
        return replace(dataset, notes=notes + dataset.notes)
    if chosen not in _FREE:
        raise ConfigError(
            f"{path}: the columns of {chosen} are fixed; leave out --user-field, --item-field and --time-field "
            f"(columns in Python), or name a format whose columns are free: {', '.join(_FREE)}"
        )
    dataset = _FREE[chosen](path, strict=strict, columns=columns)
    return replace(dataset, notes=notes + dataset.notes)


def detect_format(folder: str | Path) -> str:
    """The name of the format that the files in `folder` point to; raises DataError where none does."""
    return next(iter(_detected(Path(folder))))


def _detected(folder: Path) -> dict[str, Path]:
    """The formats that have their file in the folder, the likeliest first, and that file."""
    found: dict[str, Path] = {}
    for mark in _MARKS:
        if (path := mark.found(folder)) is not None:
            found.setdefault(mark.format, path)
    if not found:
        looked_for = ", ".join(dict.fromkeys(f"{mark.patterns[0]} ({mark.format})" for mark in _MARKS))
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise DataError(
            f"{folder}: expected a folder with one of {looked_for}, got {listed(there) or 'no folder or no files'}; "
            "check the path, name the format, or call the files items and interactions, with one of "
            f"{', '.join(_SUFFIXES)} after it. To try things, give {MOVIELENS}, a small data set that is fetched"
        )
    return found


def _told(found: dict[str, Path]) -> tuple[str, ...]:
    """What the folder was taken for, and why."""
    (chosen, why), *others = found.items()
    notes = [f"the folder was read as {chosen}, because of {why.name}"]
    notes += [f"{path.name} points to {name}: to read it so, name the format (--format)" for name, path in others]
    return tuple(notes)
