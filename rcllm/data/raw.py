"""Raw rows, how a text file is laid out, and what a reader has to tell: the nouns that all readers share.

Knows nothing of any file format. Invariant: a row, usable or not, knows its place in the file.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rcllm.errors import ConfigError

Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    line: int  # from 1: the line where the row starts, or what `unit` says
    fields: Fields
    unit: str = "line"  # what `line` counts: "line", "row" (parquet) or "entry" (a JSON list or object)

    @property
    def place(self) -> str:
        return f"{self.unit} {self.line:,}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that could not be used."""

    line: int
    reason: str  # what was expected, what came
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.unit} {self.line:,}"


@dataclass(frozen=True, slots=True)
class Table:
    """How a delimited text file is laid out. What is None is guessed from its first rows, and the guess is reported."""

    delimiter: str | None = None
    quoted: bool | None = None  # CSV quoting; where False, a quotation mark is an ordinary character
    header: tuple[str, ...] | None = None  # None: the first line names the columns
    encoding: str | None = None
    escape: str | None = None  # stands before a quotation mark inside a quoted cell; None: the mark is doubled

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1 and (self.quoted is not False or not self.delimiter):
            raise ConfigError(
                f"expected a delimiter of one character, got {self.delimiter!r}; longer ones need quoted=False"
            )
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise ConfigError(
                f"expected the name of an encoding, such as utf-8, latin-1 or utf-16, got {self.encoding!r}"
            ) from None


class Notes:
    """What a reader guessed, left out or read in another way than it stands there, in words."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._remarks: dict[str, None] = {}

    def say(self, remark: str) -> None:
        """A remark about the whole file; the same one twice counts once."""
        self._remarks[remark] = None

    def count(self, what: str) -> None:
        """One more row of which `what` is true."""
        self._counts[what] += 1

    def all(self) -> tuple[str, ...]:
        return (*self._remarks, *(f"{what} (rows: {times:,})" for what, times in self._counts.items()))

    def clear(self) -> None:
        self._remarks.clear()
        self._counts.clear()
