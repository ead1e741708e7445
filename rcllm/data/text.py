"""Turns raw values of data files into the plain text, numbers and times that the rest of the package keeps.

Knows nothing of files or rows. Invariant: the same value gives the same text on every machine (no locale, no
local time zone), because item text ends up in content keys.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import islice

_MAX_COMPARED = 5_000  # difflib is slow, and a misspelt name must not stall a server with a million items


def as_text(value: object) -> str:
    """The plain text of a JSON, CSV or parquet value; empty where there is nothing to say (null, NaN, [], "")."""
    match value:
        case None:
            return ""
        case str():
            return value.strip()
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


def as_seconds(value: object) -> float | None:
    """Seconds since 1970 of a datetime, a date or an ISO 8601 text (UTC where it names no zone), else None."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
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


def shown(value: object) -> str:
    """A short form of a value for error messages."""
    match value:
        case None:
            return "null"
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "…")
        case Mapping():
            return f"an object with {len(value)} fields"
        case list() | tuple():
            return f"a list of {len(value)}"
    return str(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, islice(known, _MAX_COMPARED), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _plain_number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
