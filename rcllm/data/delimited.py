"""Rows of delimited text: CSV, TSV and their relatives.

Knows nothing of what columns mean. Invariant: every line of the file is part of a row or of a Problem. A quotation mark
that never closes costs its own line alone: reading goes on with the next.
"""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rcllm.data.content import is_wide, raw_lines
from rcllm.data.raw import Problem, Row, Table
from rcllm.data.sniff import guessed
from rcllm.data.text import listed, shown
from rcllm.errors import DataError

MAX_CELL = 2**26  # characters; without a bound, an open quotation mark would take the rest of the file into memory
_MAX_CELL_LINES = 10_000


@dataclass(slots=True)  # not frozen, which would take twice the time to make
class _Line:
    number: int
    text: str
    fault: str | None = None  # why it could not be decoded


@dataclass(frozen=True, slots=True)
class _Cells:
    line: int
    cells: list[str]


def delimited_rows(path: Path, table: Table, note: Callable[[str], None]) -> Iterator[Row | Problem]:
    """The rows under their header. What `table` leaves open is guessed, and noted where it is not the usual."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))  # one limit for the whole process, so only ever raised
    table = guessed(path, table, note)
    header = table.header
    for record in _quoted_cells(path, table, note) if table.quoted else _plain_cells(path, table):
        if header is None:
            header = _header(path, record)
        elif isinstance(record, Problem):
            yield record
        elif len(record.cells) != len(header):
            got = f"{len(record.cells)}: {shown(str(table.delimiter).join(record.cells))}"
            yield Problem(record.line, f"expected {len(header)} columns ({listed(header)}), got {got}")
        else:
            yield Row(record.line, dict(zip(header, record.cells, strict=True)))


def _header(path: Path, record: _Cells | Problem) -> tuple[str, ...]:
    if isinstance(record, Problem):
        raise DataError(f"{path}, line {record.line}: expected a line that names the columns: {record.reason}")
    names = tuple(cell.strip() for cell in record.cells)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(
            f"{path}, line {record.line}: expected each column once, got {shown(twice[0])} twice; rename one"
        )
    return names


def _lines(path: Path, encoding: str) -> Iterator[_Line]:
    plain = "utf-8" if is_wide(encoding) else encoding
    for number, raw in enumerate(raw_lines(path, encoding), 1):
        try:
            yield _Line(number, raw.decode(plain))
        except UnicodeDecodeError as error:
            fault = f"expected {plain}, got {error.reason}; where the file has another encoding, say which"
            yield _Line(number, raw.decode(plain, errors="replace"), fault)


def _plain_cells(path: Path, table: Table) -> Iterator[_Cells | Problem]:
    for line in _lines(path, table.encoding or "utf-8"):
        if line.fault:
            yield Problem(line.number, line.fault)
        elif text := line.text.rstrip("\r\n"):
            yield _Cells(line.number, text.split(table.delimiter))


class _Replayed:
    """Lines that can be read once more, from the second line of the current record on."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._again: deque[_Line] = deque()
        self.record: list[_Line] = []  # the lines of the current record so far

    def __iter__(self) -> _Replayed:
        return self

    def __next__(self) -> str:
        if len(self.record) >= _MAX_CELL_LINES:
            raise csv.Error(f"more than {_MAX_CELL_LINES:,} lines in one row")
        line = self._again.popleft() if self._again else next(self._lines)
        self.record.append(line)
        return line.text

    def give_back(self) -> None:
        self._again.extendleft(reversed(self.record[1:]))


def _quoted_cells(path: Path, table: Table, note: Callable[[str], None]) -> Iterator[_Cells | Problem]:
    lines = _Replayed(_lines(path, table.encoding or "utf-8"))
    reader = csv.reader(lines, delimiter=table.delimiter or ",", strict=True, escapechar=table.escape)
    while True:
        lines.record = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            first, last = lines.record[0], lines.record[-1]
            yield Problem(first.number, f"expected a row of CSV, got: {error} (up to line {last.number:,})")
            lines.give_back()
            continue
        if fault := next((line.fault for line in lines.record if line.fault), None):
            yield Problem(lines.record[0].number, fault)
        elif cells:
            if len(lines.record) > 1 and _look_like_rows(lines.record, str(table.delimiter), len(cells)):
                note(
                    "a quoted cell runs over lines that look like rows of their own, and they were read as one; if "
                    "they are rows, double the quotation marks (in Python Table(quoted=False) takes them as they are)"
                )
            yield _Cells(lines.record[0].number, cells)


def _look_like_rows(lines: list[_Line], delimiter: str, num_cells: int) -> bool:
    return num_cells > 1 and all(line.text.count(delimiter) == num_cells - 1 for line in lines)
