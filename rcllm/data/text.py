"""Turns raw values of data files into the plain text, numbers and times that the rest of the package keeps.

Knows nothing of files or rows. Invariant: the same value gives the same text on every machine (no locale, no
local time zone), because item text ends up in content keys.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import islice

_MAX_COMPARED = 5_000  # difflib is slow, and a misspelt name must not stall a server with a million items
_MAX_NAME = 200  # characters; what is longer is no misspelt name, and difflib would need minutes and gigabytes for it
_MAX_ID = 10_000  # characters; what is longer is a text in the wrong column
_MAX_SHOWN = 60  # characters of a value in a message
_EXACT_FLOATS = 2**53  # from here on a float does not tell a whole number from the next
_FLOAT_ID = re.compile(r"(-?\d{1,15})\.0+")


def as_text(value: object) -> str:
    """The plain text of a JSON, CSV or parquet value; empty where there is nothing to say (null, NaN, [], "")."""
    match value:
        case None:
            return ""
        case str():
            return well_formed(value).strip()
        case bool():
            return "true" if value else "false"
        case float():
            return _plain_number(value)
        case bytes():
            return value.decode("utf-8", errors="replace").strip()
        case date():
            return value.isoformat()
        case Mapping():
            return ", ".join(f"{name}: {text}" for name, inner in value.items() if (text := as_text(inner)))
        case Sequence():
            return ", ".join(text for inner in value if (text := as_text(inner)))
    return str(value)


def well_formed(text: str) -> str:
    """The text without halves of letters beyond the first plane, which JSON can hold and no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def as_seconds(value: object) -> float | None:
    """Seconds since 1970 of a datetime, a date or an ISO 8601 text (UTC where it names no zone), else None."""
    if isinstance(value, datetime):
        try:
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        except OverflowError:  # in the first or the last hours that a datetime holds, by its zone
            return None
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    try:
        return as_seconds(datetime.fromisoformat(value.strip())) if isinstance(value, str) else None
    except ValueError:
        return None


def as_number(value: object) -> float | None:
    """The finite number that a number or a numeric text holds, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_id(value: object) -> str | None:
    """The text of an id: a text, or a whole number also where it came as a float; None where the value is no id."""
    match value:
        case bool():
            return None
        case str():
            text = well_formed(value).strip()
            return text if 0 < len(text) <= _MAX_ID else None
        case bytes():
            return as_id(value.decode("utf-8", errors="replace"))
        case int():
            return str(value)
        case Decimal() if value.is_finite() and value == value.to_integral_value():
            return str(int(value))
        case float() if value.is_integer() and abs(value) < _EXACT_FLOATS:
            return str(int(value))
    return None


def other_spelling(item_id: str) -> str:
    """The id as it reads after pandas made it a float, or before: 10 for 10.0 and 10.0 for 10."""
    found = _FLOAT_ID.fullmatch(item_id)
    return found[1] if found else f"{item_id}.0"


def as_whole_numbers(ids: Iterable[str]) -> dict[str, str] | None:
    """What each id is without its `.0`, if every one has it, as pandas writes whole numbers; None otherwise."""
    plain: dict[str, str] = {}
    for each in ids:
        if each not in plain:
            if (found := _FLOAT_ID.fullmatch(each)) is None:
                return None
            plain[each] = found[1]
    return plain or None


def shown(value: object) -> str:
    """A short form of a value for error messages."""
    match value:
        case None:
            return "null"
        case str():
            return repr(_cut(value))
        case bytes():
            return f"{len(value):,} bytes"
        case Mapping():
            return f"an object with {len(value)} fields"
        case list() | tuple():
            return f"a list of {len(value)}"
    return _cut(str(value))


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first `most` names, and how many more there are: `'a', 'b' and 9 more`."""
    every = list(names)
    first = ", ".join(map(shown, every[:most]))
    return f"{first} and {len(every) - most:,} more" if len(every) > most else first


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or nothing where no known name is close."""
    if len(name) > _MAX_NAME:
        return ""
    near = (each for each in islice(known, _MAX_COMPARED) if len(each) <= _MAX_NAME)
    close = difflib.get_close_matches(name, near, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "…"


def _plain_number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
