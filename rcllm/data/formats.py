"""The data formats by name: `load_dataset` and what it chooses from. One data set has a name itself: `movielens`.

Knows nothing of what the formats mean. A new one is a loader and a line in each of the two tables here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rcllm.data.catalogue import generic_item
from rcllm.data.dataset import Dataset, InteractionSource, ItemSource, assemble
from rcllm.data.interactions import parse_user
from rcllm.data.movielens import (
    fetch_movielens,
    load_movielens_1m,
    load_movielens_100k,
    load_movielens_latest,
    load_recbole,
)
from rcllm.data.reviews import load_amazon_2018, load_amazon_2023, load_goodreads, load_yelp
from rcllm.data.text import did_you_mean
from rcllm.errors import ConfigError, DataError

MOVIELENS = "movielens"  # the data set that can be named where a folder is expected


class Loader(Protocol):
    """Reads the files of one format in `folder`. Raises DataError; where strict, for the first malformed row."""

    def __call__(self, folder: Path, *, strict: bool = False) -> Dataset: ...


def load_common(folder: Path, *, strict: bool = False) -> Dataset:
    """`items.jsonl` (`item_id` and fields) and `users.jsonl` (`user_id`, `items` from oldest to newest)."""
    items = ItemSource(("items.jsonl", "items.jsonl.gz"), generic_item())
    users = InteractionSource(("users.jsonl", "users.jsonl.gz"), parse_user)
    return assemble(folder, items, users, strict=strict)


FORMATS: dict[str, Loader] = {
    "common": load_common,
    "yelp": load_yelp,
    "goodreads": load_goodreads,
    "movielens_100k": load_movielens_100k,
    "movielens_1m": load_movielens_1m,
    "movielens_latest": load_movielens_latest,
    "recbole": load_recbole,
    "amazon_2023": load_amazon_2023,
    "amazon_2018": load_amazon_2018,
}

# A file that gives each format away. Tried in this order: Amazon's names say least, so they come last.
_MARKS = {
    "common": "users.jsonl*",
    "yelp": "yelp_academic_dataset_review.json*",
    "goodreads": "goodreads_books*.json*",
    "movielens_100k": "u.data",
    "movielens_1m": "ratings.dat",
    "movielens_latest": "ratings.csv",
    "recbole": "*.inter",
    "amazon_2023": "*.jsonl*",
    "amazon_2018": "*.json*",
}


def load_dataset(name: str, folder: str | Path, strict: bool = False) -> Dataset:
    """Reads the data set in `folder`, in the format called `name`, or `auto`.

    Where no folder is called `movielens`, that name stands for MovieLens-100K, which is fetched once. Malformed rows
    are skipped and reported in `Dataset.reports`; where `strict`, the first one raises DataError. Raises FetchError.
    """
    path = Path(folder)
    if str(folder) == MOVIELENS and name in ("auto", "recbole") and not path.exists():
        return fetch_movielens()
    chosen = detect_format(path) if name == "auto" else name
    if chosen not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"expected a data format (auto, {known}), got {name!r}.{did_you_mean(name, FORMATS)}")
    return FORMATS[chosen](path, strict=strict)


def detect_format(folder: str | Path) -> str:
    """The name of the format that the file names in `folder` point to; raises DataError where none does."""
    path = Path(folder)
    for name, pattern in _MARKS.items():
        if any(path.glob(pattern)):
            return name
    looked_for = ", ".join(f"{pattern} ({name})" for name, pattern in _MARKS.items())
    raise DataError(
        f"{path}: expected a folder with one of {looked_for}; check the path, or name the format. To try things, give "
        f"{MOVIELENS}, a small data set that is fetched"
    )
