"""Turns the rows of one file into values, and keeps account of the rows that could not be used.

Knows nothing of items or users: what a row means is the `parse` function of the caller, which raises BadRowError.
Invariant: every row is either yielded and counted as read, or counted as skipped with its line number; nothing is
dropped in silence, and a file of which no row is usable is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rcllm.data.files import iter_rows
from rcllm.data.raw import Fields, Notes, Problem, Table
from rcllm.data.text import as_id, as_number, as_seconds, as_text, did_you_mean, listed, shown
from rcllm.errors import DataError

_Value = TypeVar("_Value")


class BadRowError(Exception):
    """A row does not hold what it should; the text says what was expected and what came."""


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of the rows of one file."""

    path: Path
    rows_read: int  # rows that were used
    rows_skipped: int  # malformed rows, left out
    problems: tuple[Problem, ...] = ()  # the first of the skipped rows
    notes: tuple[str, ...] = ()  # what was guessed, or read in another way than it stands there

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows_read:,} rows read, {self.rows_skipped:,} skipped"]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  {problem.place}: {problem.reason}" for problem in self.problems]
        if (more := self.rows_skipped - len(self.problems)) > 0:
            lines.append(f"  … and {more:,} more")
        return "\n".join(lines)

    @property
    def has_news(self) -> bool:
        """Whether there is anything that a user should see."""
        return self.rows_skipped > 0 or bool(self.notes)


class RowReader:
    """Reads one file, row by row. `report` is complete when the iterator of `parsed` has ended."""

    def __init__(
        self,
        path: str | Path,
        *,
        strict: bool = False,
        table: Table | None = None,
        max_problems: int = 20,
        notes: Notes | None = None,
    ) -> None:
        """`notes`: where `parse` also puts what it has to tell."""
        self._path = Path(path)
        self._strict = strict
        self._table = table
        self._max_problems = max_problems
        self._num_read = 0
        self._num_skipped = 0
        self._problems: list[Problem] = []
        self._notes = Notes() if notes is None else notes

    def parsed(self, parse: Callable[[Fields], _Value]) -> Iterator[_Value]:
        """Streams `parse(row)` for each row that it accepts; starts the account afresh.

        Raises DataError for a file that cannot be read or has no usable row, and, where strict, for the first bad row.
        """
        self._num_read, self._num_skipped, self._problems = 0, 0, []
        self._notes.clear()
        for row in iter_rows(self._path, self._table, self._notes.say):
            if isinstance(row, Problem):
                self._skip(row)
                continue
            try:
                value = parse(row.fields)
            except BadRowError as error:
                self._skip(Problem(row.line, str(error), row.unit))
                continue
            self._num_read += 1
            yield value
        if self._num_skipped and not self._num_read:
            first = self._problems[0]
            raise DataError(
                f"{self._path}: none of its {self._num_skipped:,} rows could be used. "
                f"First, {first.place}: {first.reason}"
            )

    @property
    def report(self) -> ReadReport:
        return ReadReport(self._path, self._num_read, self._num_skipped, tuple(self._problems), self._notes.all())

    def _skip(self, problem: Problem) -> None:
        if self._strict:
            raise DataError(f"{self._path}, {problem.place}: {problem.reason}")
        self._num_skipped += 1
        if len(self._problems) < max(1, self._max_problems):
            self._problems.append(problem)


# ---- fields of a row ------------------------------------------------------------------------------------------------


def required_id(fields: Fields, name: str) -> str:
    """The text of an id: a text, or a whole number also where it came as a float; not empty."""
    value = _present(fields, name)
    if (text := as_id(value)) is None:
        large = isinstance(value, float) and value.is_integer()
        hint = "; a float this large does not tell one id from the next, write it as text" if large else ""
        raise BadRowError(f"expected an id (text or whole number) in {name!r}, got {shown(value)}{hint}")
    return text


def required_number(fields: Fields, name: str) -> float:
    value = _present(fields, name)
    if (number := as_number(value)) is None:
        raise BadRowError(f"expected a number in {name!r}, got {shown(value)}")
    return number


def required_time(fields: Fields, name: str, units_per_second: float = 1.0) -> float:
    """Seconds since 1970 of a number (1,000 units per second: milliseconds), a datetime, or ISO 8601 text."""
    value = _present(fields, name)
    if (number := as_number(value)) is not None:
        return number / units_per_second
    if (seconds := as_seconds(value)) is not None:
        return seconds
    raise BadRowError(
        f"expected a time (a number, or text such as 2024-01-31 09:30:00) in {name!r}, got {shown(value)}"
    )


def optional_text(fields: Fields, name: str) -> str | None:
    """None where the field is absent or empty."""
    return as_text(fields.get(name)) or None


def optional_number(fields: Fields, name: str) -> float | None:
    """None where the field is absent or empty."""
    return required_number(fields, name) if as_text(fields.get(name)) else None


def _present(fields: Fields, name: str) -> object:
    if name in fields:
        return fields[name]
    got = listed(fields) or "an empty row"
    raise BadRowError(f"expected a field {name!r}, got only {got}.{did_you_mean(name, fields)}")
