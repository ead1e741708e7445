"""Streams raw rows out of JSONL, JSON, delimited text and parquet files, plain or gzipped.

Knows nothing of items or users: a row is a mapping from column to raw value. Invariant: every row of the file comes
out once, in order, as a Row or as a Problem with its line number; a file that cannot be read on raises DataError.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rcllm.data.text import did_you_mean, shown
from rcllm.errors import ConfigError, DataError

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    line: int  # 1-based line where the row starts; the row number in parquet
    fields: Fields


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that could not be used."""

    line: int
    reason: str  # what was expected, what came


@dataclass(frozen=True, slots=True)
class Table:
    """How a delimited text file is laid out."""

    delimiter: str = ","
    quoted: bool = True  # CSV quoting; where False, a quotation mark is an ordinary character
    header: tuple[str, ...] | None = None  # None: the first line names the columns
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 and (self.quoted or not self.delimiter):
            raise ConfigError(
                f"expected a delimiter of one character, got {self.delimiter!r}; longer ones need quoted=False"
            )


@dataclass(frozen=True, slots=True)
class _Cells:
    line: int
    cells: list[str]


def iter_rows(path: Path, table: Table | None = None) -> Iterator[Row | Problem]:
    """Streams the rows of `path`, by its suffix or as `table` says; raises DataError where it cannot go on."""
    if not path.is_file():
        _raise_missing(path)
    if table is not None:
        return _delimited(path, table)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{path}: expected a name that ends in one of {', '.join(_READERS)} (text may be gzipped: .gz), "
            f"got {suffix or 'no suffix'!r}; rename it, or say how it is laid out with a Table"
        )
    return _READERS[suffix](path)


def _raise_missing(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: expected a file, got a folder; name a file in it, or load it with load_dataset")
    beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    raise DataError(
        f"{path}: no such file; check the path and download the data first.{did_you_mean(path.name, beside)}"
    )


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: expected a whole gzip file, got one that breaks off ({error}); fetch it again"
        ) from error


def _jsonl(path: Path) -> Iterator[Row | Problem]:
    for line, raw in enumerate(_raw_lines(path), 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Problem(line, f"expected UTF-8, got {error.reason} at byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield Problem(line, f"expected a JSON object, got {_excerpt(raw)} ({error})")
        else:
            yield _object(line, value)


def _json(path: Path) -> Iterator[Row | Problem]:
    """A JSON list, or JSON lines under the name .json, as Yelp and Amazon publish them."""
    start = next((line.lstrip() for line in _raw_lines(path) if line.strip()), b"")
    return _json_list(path) if start.startswith(b"[") else _jsonl(path)


def _json_list(path: Path) -> Iterator[Row | Problem]:
    # Read whole, because the json module cannot parse in pieces; data too large for that comes as JSON lines.
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    try:
        text = b"".join(_raw_lines(path)).decode("utf-8")
        at = _skip_blank(text, text.index("[") + 1)
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, at = decoder.raw_decode(text, at)
            yield _object(line, value)
            at = _skip_blank(text, at)
            if text[at : at + 1] == ",":
                at = _skip_blank(text, at + 1)
            elif text[at : at + 1] != "]":
                raise ValueError(f"no comma and no closing bracket after the value on line {line}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: expected a JSON list of objects, got something else: {error}") from error


def _skip_blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _object(line: int, value: object) -> Row | Problem:
    return Row(line, value) if isinstance(value, dict) else Problem(line, f"expected a JSON object, got {shown(value)}")


def _excerpt(raw: bytes) -> str:
    return shown(raw.decode("utf-8", errors="replace").strip())


def _delimited(path: Path, table: Table) -> Iterator[Row | Problem]:
    header = table.header
    for record in _quoted_cells(path, table) if table.quoted else _plain_cells(path, table):
        if header is None:
            header = _header(path, record)
        elif isinstance(record, Problem):
            yield record
        elif len(record.cells) != len(header):
            got = f"{len(record.cells)}: {shown(table.delimiter.join(record.cells))}"
            yield Problem(record.line, f"expected {len(header)} columns ({', '.join(header)}), got {got}")
        else:
            yield Row(record.line, dict(zip(header, record.cells, strict=True)))


def _header(path: Path, record: _Cells | Problem) -> tuple[str, ...]:
    if isinstance(record, Problem):
        raise DataError(f"{path}, line {record.line}: expected a line that names the columns: {record.reason}")
    names = tuple(cell.strip() for cell in record.cells)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{path}, line {record.line}: expected each column once, got {twice[0]!r} twice; rename one")
    return names


def _quoted_cells(path: Path, table: Table) -> Iterator[_Cells | Problem]:
    undecodable: list[str] = []

    def lines() -> Iterator[str]:
        for raw in _raw_lines(path):
            try:
                yield raw.decode(table.encoding)
            except UnicodeDecodeError as error:  # the csv reader must see a line, so that it stays in step
                undecodable.append(error.reason)
                yield raw.decode(table.encoding, errors="replace")

    reader = csv.reader(lines(), delimiter=table.delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(line, f"expected a row of CSV, got: {error} (up to line {reader.line_num})")
            continue
        if undecodable:
            yield Problem(line, f"expected {table.encoding}, got {undecodable[0]}")
            undecodable.clear()
        elif cells:
            yield _Cells(line, cells)


def _plain_cells(path: Path, table: Table) -> Iterator[_Cells | Problem]:
    for line, raw in enumerate(_raw_lines(path), 1):
        try:
            text = raw.decode(table.encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Problem(line, f"expected {table.encoding}, got {error.reason}")
        else:
            if text:
                yield _Cells(line, text.split(table.delimiter))


def _parquet(path: Path) -> Iterator[Row | Problem]:
    try:
        import pyarrow as pa  # noqa: PLC0415  the one place that needs it: an optional dependency
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; install it with: pip install 'rcllm[data]'") from error
    try:
        with pq.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=4096):
                for fields in _microseconds(pa, batch).to_pylist():
                    line += 1
                    yield Row(line, fields)
    except pa.ArrowException as error:
        raise DataError(f"{path}: expected a parquet file, got: {error}; write it again") from error


def _microseconds(pa: Any, batch: Any) -> Any:
    """Nanosecond columns as microseconds, the finest that Python's datetime holds."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            column = batch.column(index).cast(pa.timestamp("us", field.type.tz), safe=False)
            batch = batch.set_column(index, field.name, column)
    return batch


_READERS: dict[str, Callable[[Path], Iterator[Row | Problem]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": partial(_delimited, table=Table()),
    ".tsv": partial(_delimited, table=Table(delimiter="\t")),
    ".parquet": _parquet,
    ".pq": _parquet,
}
