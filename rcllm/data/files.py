"""Streams raw rows out of JSONL, JSON, delimited text and parquet files, plain or compressed.

Knows nothing of items or users: a row is a mapping from column to raw value. Invariant: every row of the file comes
out once, in order, as a Row or as a Problem with its place; a file that cannot be read on raises DataError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rcllm.data.content import COMPRESSED, read_head, suffix_of
from rcllm.data.delimited import delimited_rows
from rcllm.data.json_rows import json_file, json_lines
from rcllm.data.parquet_rows import parquet_rows
from rcllm.data.raw import Fields, Problem, Row, Table
from rcllm.errors import ConfigError, DataError

__all__ = ["Fields", "Problem", "Row", "Table", "iter_rows"]

Note = Callable[[str], None]


def iter_rows(path: Path, table: Table | None = None, note: Note = lambda remark: None) -> Iterator[Row | Problem]:
    """Streams the rows of `path`, by its suffix or as `table` says; raises DataError where it cannot go on.

    `note` is told, in words, what was guessed of the layout.
    """
    suffix = suffix_of(path)
    if table is not None:
        if suffix in _READERS and suffix not in _DELIMITED:
            raise ConfigError(
                f"{path}: expected delimited text where its layout is given, got {suffix}, which needs none; leave out "
                "--delimiter and --encoding (in Python the Table)"
            )
        return delimited_rows(path, table, note)
    head = read_head(path, 4)
    if suffix not in _READERS:
        raise DataError(
            f"{path}: expected a name that ends in one of {', '.join(_READERS)} (text may be packed: "
            f"{', '.join(COMPRESSED)}), got {suffix or 'no suffix'!r}; rename it, or say what separates its cells "
            "(--delimiter, in Python a Table)"
        )
    if head == b"PAR1" and suffix not in (".parquet", ".pq"):
        raise DataError(f"{path}: expected text, as its name says, got parquet; rename it to end in .parquet")
    return _READERS[suffix](path, note=note)


_DELIMITED = (".csv", ".tsv")
_READERS: dict[str, Callable[..., Iterator[Row | Problem]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": partial(delimited_rows, table=Table()),
    ".tsv": partial(delimited_rows, table=Table()),
    ".parquet": parquet_rows,
    ".pq": parquet_rows,
}
