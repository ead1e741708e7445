"""Rows of JSON: an object per line, one list of objects, or one object that holds all rows under their ids.

Also lines of Python literals, as Amazon published in 2014. Knows nothing of items or users, except for the column names
under which the ids of a single object appear.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from rcllm.data.content import raw_lines
from rcllm.data.raw import Problem, Row
from rcllm.data.text import shown
from rcllm.errors import DataError

_BLANK = re.compile(r"[ \t\r\n]*")
Note = Callable[[str], None]

_MAX_LITERAL = 2**20  # bytes of a Python literal: its syntax tree takes hundreds of times as many
_PYTHON_STARTS = (b"{'", b"{u'", b'{u"')  # of a dict as Python prints it; no JSON object begins so


def json_lines(path: Path, note: Note) -> Iterator[Row | Problem]:
    """One object per line; blank lines are no rows."""
    for line, raw in enumerate(raw_lines(path), 1):
        if not raw.strip():
            continue
        if raw.lstrip().startswith(_PYTHON_STARTS):
            note("lines are Python literals, as in the Amazon data of 2014, and were read as such")
            yield _literal(line, raw)
        else:
            yield _line(line, raw)


def json_file(path: Path, note: Note) -> Iterator[Row | Problem]:
    """A JSON list, one JSON object of rows by id, or JSON lines under the name .json, as Yelp publishes them."""
    first, second, *_ = [*islice((line.strip() for line in raw_lines(path) if line.strip()), 2), b"", b""]
    if first.startswith(b"["):
        return _entries(path, keyed=False)
    if first.startswith(b"{") and not first.startswith(_PYTHON_STARTS) and _is_keyed(first, second):
        note("the file is one JSON object: its names were read as the ids of its entries")
        return _entries(path, keyed=True)
    return json_lines(path, note)


def _is_keyed(first: bytes, second: bytes) -> bool:
    """Whether these lines begin one object of rows: it goes on in the second, or holds nothing but objects or lists."""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return not first.endswith(b"}") and second != b"" and not second.startswith(b"{")
    return not second and isinstance(value, dict) and {type(each) for each in value.values()} in ({dict}, {list})


def _line(line: int, raw: bytes) -> Row | Problem:
    try:
        return _object(json.loads(raw.decode("utf-8")), line, "line")
    except UnicodeDecodeError as error:
        return Problem(line, f"expected UTF-8, got {error.reason} at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Problem(line, f"expected a JSON object, got {_excerpt(raw)} ({error})")


def _literal(line: int, raw: bytes) -> Row | Problem:
    if len(raw) > _MAX_LITERAL:
        return Problem(line, f"expected a Python literal of at most {_MAX_LITERAL:,} bytes, got {len(raw):,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as \d in texts, which Python keeps as they are
            return _object(ast.literal_eval(raw.decode("utf-8").strip()), line, "line")
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return Problem(line, f"expected a JSON object or a Python literal, got {_excerpt(raw)} ({error})")


def _object(value: object, number: int, unit: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(number, value, unit)
    return Problem(number, f"expected a JSON object, got {shown(value)}", unit)


def _excerpt(raw: bytes) -> str:
    return shown(raw[:400].decode("utf-8", errors="replace").strip())


# ---- one list or object ----------------------------------------------------------------------------------------------


def _entries(path: Path, keyed: bool) -> Iterator[Row | Problem]:
    # Read whole, because the json module cannot parse in pieces; data too large for that comes as JSON lines.
    scan = _Scanner(path, keyed)
    number = 0
    while scan.more():
        number += 1
        key = scan.key() if keyed else None
        value = scan.value()
        yield _object(value, number, "entry") if key is None else _keyed(key, value, number)
    scan.end()


def _keyed(key: str, value: object, number: int) -> Row | Problem:
    """An entry of LC-Rec's X.item.json (id to fields) or X.inter.json (user to items)."""
    if isinstance(value, dict):
        return Row(number, {"item_id": key, **value}, "entry")
    if isinstance(value, list):
        return Row(number, {"user_id": key, "history": value}, "entry")
    return Problem(number, f"expected an object or a list under {shown(key)}, got {shown(value)}", "entry")


class _Scanner:
    """Walks over the entries of one JSON list or object. Raises DataError with the line."""

    def __init__(self, path: Path, keyed: bool) -> None:
        self._path, self._keyed = path, keyed
        self._close = "}" if keyed else "]"
        self._decoder = json.JSONDecoder()
        try:
            self._text = b"".join(raw_lines(path)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected UTF-8, got {error.reason} at byte {error.start + 1}") from error
        self._at = self._text.index("{" if keyed else "[") + 1
        self._first = True

    def more(self) -> bool:
        """Whether another entry follows; steps over the comma before it."""
        self._skip_blank()
        here = self._text[self._at : self._at + 1]
        if here == self._close:
            return False
        if not self._first:
            if here != ",":
                raise self._error("no comma and no closing bracket after the value")
            self._at += 1
            self._skip_blank()
        self._first = False
        return True

    def key(self) -> str:
        name = self.value()
        self._skip_blank()
        if not isinstance(name, str) or self._text[self._at : self._at + 1] != ":":
            raise self._error("no name with a colon after it")
        self._at += 1
        self._skip_blank()
        return name

    def value(self) -> object:
        try:
            value, self._at = self._decoder.raw_decode(self._text, self._at)
        except (ValueError, RecursionError) as error:
            raise self._error(str(error)) from error
        return value

    def end(self) -> None:
        """Checks that nothing follows."""
        self._at += 1
        self._skip_blank()
        if rest := self._text[self._at : self._at + 80]:
            raise self._error(f"{shown(rest)} after its end; write one object per line, or one list of them")

    def _skip_blank(self) -> None:
        blank = _BLANK.match(self._text, self._at)
        assert blank is not None, "it matches nothing as well"
        self._at = blank.end()

    def _error(self, got: str) -> DataError:
        line = self._text.count("\n", 0, self._at) + 1
        wanted = "a JSON object of objects" if self._keyed else "a JSON list of objects"
        return DataError(f"{self._path}, line {line}: expected {wanted}, got something else: {got}")
