"""MovieLens (100K, 1M, latest), RecBole's atomic files, and a small data set to try things with.

Knows nothing of requests. Invariant: titles and genres are the publisher's; 100K, 1M and latest keep the year in the
title, RecBole's copy of 100K has it as a field of its own.
"""

from __future__ import annotations

from pathlib import Path

from rcllm.core.ranking import Item
from rcllm.data.catalogue import make_item
from rcllm.data.columns import InteractionColumns, item_column
from rcllm.data.dataset import Dataset, InteractionSource, ItemSource, assemble, assemble_textless
from rcllm.data.interactions import generic_interactions
from rcllm.data.raw import Fields, Notes, Table
from rcllm.data.rows import BadRowError, required_id
from rcllm.data.text import as_text, shown
from rcllm.fetch import cache_dir, from_wheel

_GENRE_FLAGS = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
)
_GENRES_100K = tuple(_GENRE_FLAGS.split())
_RATINGS = ("user_id", "item_id", "rating", "timestamp")
_MOVIES_100K = ("item_id", "title", "release_date", "video_release_date", "imdb_url", *_GENRES_100K)

_RECBOLE = "recbole==1.2.1"
_RECBOLE_FOLDER = "recbole/dataset_example/ml-100k"
_RECBOLE_FILES = {
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
}
_RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
_RECBOLE_NAMES = {
    "movie_title": "title",
    "release_year": "year",
    "class": "genres",
    "item_name": "title",
    "book_title": "title",
    "name": "title",
}


def fetch_movielens(folder: str | Path | None = None) -> Dataset:
    """MovieLens-100K, from the copy that the package `recbole` carries; downloads once. Raises FetchError.

    folder: where its files go; by default below `$RCLLM_HOME/data`, else `~/.cache/rcllm/data`.
    """
    target = Path(folder) if folder is not None else cache_dir() / "data" / "ml-100k"
    for name, sha256 in _RECBOLE_FILES.items():
        from_wheel(_RECBOLE, f"{_RECBOLE_FOLDER}/{name}", target / name, sha256)
    return load_recbole(target, strict=True)


def load_movielens_100k(folder: Path, *, strict: bool = False) -> Dataset:
    """`u.data` and `u.item`. https://grouplens.org/datasets/movielens"""
    movies = Table("|", quoted=False, header=_MOVIES_100K, encoding="latin-1")
    ratings = Table("\t", quoted=False, header=_RATINGS)
    return assemble(
        folder,
        ItemSource(("u.item",), _movie_100k, movies),
        InteractionSource(("u.data",), generic_interactions(InteractionColumns()), ratings),
        strict=strict,
    )


def load_movielens_1m(folder: Path, *, strict: bool = False) -> Dataset:
    """`ratings.dat` and `movies.dat`."""
    movies = Table("::", quoted=False, header=("movieId", "title", "genres"), encoding="latin-1")
    ratings = Table("::", quoted=False, header=_RATINGS)
    return assemble(
        folder,
        ItemSource(("movies.dat",), _movie, movies),
        InteractionSource(("ratings.dat",), generic_interactions(InteractionColumns()), ratings),
        strict=strict,
    )


def load_movielens_latest(folder: Path, *, strict: bool = False) -> Dataset:
    """`ratings.csv` and `movies.csv`: the latest, 20M, 25M and 32M releases."""
    columns = InteractionColumns("userId", "movieId")
    return assemble(
        folder,
        ItemSource(("movies.csv",), _movie),
        InteractionSource(("ratings.csv",), generic_interactions(columns)),
        strict=strict,
    )


def load_recbole(folder: Path, *, strict: bool = False, columns: InteractionColumns | None = None) -> Dataset:
    """`NAME.inter` and, where there is one, `NAME.item`. https://recbole.io/atomic_files.html

    Their columns are named freely; `columns` says which is which, where the usual names do not.
    """
    table, chosen = Table("\t", quoted=False), columns or InteractionColumns()
    items, log = Notes(), Notes()
    parse = generic_interactions(chosen, log)
    return assemble_textless(
        folder,
        ItemSource(("*.item",), lambda fields: _recbole_item(fields, chosen.item_id, items), table, notes=items),
        InteractionSource(("*.inter",), lambda fields: parse(_without_types(fields)), table, notes=log),
        strict=strict,
    )


def _movie_100k(fields: Fields) -> Item:
    flags = {genre: fields[genre] for genre in _GENRES_100K}
    if wrong := [genre for genre, flag in flags.items() if flag not in ("0", "1")]:
        raise BadRowError(f"expected 0 or 1 for genre {wrong[0]!r}, got {shown(flags[wrong[0]])}")
    genres = [genre for genre, flag in flags.items() if flag == "1" and genre != "unknown"]
    texts = {"title": as_text(fields["title"]), "genres": as_text(genres)}
    return make_item(required_id(fields, "item_id"), texts)


def _movie(fields: Fields) -> Item:
    genres = [genre for genre in as_text(fields.get("genres")).split("|") if genre != "(no genres listed)"]
    texts = {"title": as_text(fields.get("title")), "genres": as_text(genres)}
    return make_item(required_id(fields, "movieId"), texts)


def _recbole_item(fields: Fields, id_field: str | None, notes: Notes) -> Item:
    plain = _without_types(fields)
    key = item_column(id_field, plain, notes)
    texts: dict[str, str] = {}
    for name, value in plain.items():
        if name != key:
            usual = _RECBOLE_NAMES.get(name, name)
            texts[name if usual in texts else usual] = as_text(value)
    return make_item(required_id(plain, key), texts, volatile_fields=("price",))


def _without_types(fields: Fields) -> Fields:
    plain: dict[str, object] = {}
    for column, value in fields.items():
        name, _, kind = column.partition(":")
        if kind not in _RECBOLE_TYPES:
            raise BadRowError(
                f"expected a column header like user_id:token ({', '.join(_RECBOLE_TYPES)}), got {shown(column)}"
            )
        plain[name] = value
    return plain
