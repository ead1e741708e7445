"""Small pieces of messages: what was meant by a misspelt name, and a value in a few words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

_LONGEST = 60  # characters of a value that a message repeats


def nearest(name: str, known: Iterable[str]) -> str:
    """«did you mean X» where something is close, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def brief(value: object) -> str:
    """A value as a message shows it: texts in quotes, long ones cut, lists and objects by their size."""
    match value:
        case None:
            return "null"
        case str():
            return repr(value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…")
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return f"{value:.0f}"
        case Mapping():
            return f"an object with {len(value)} fields"
        case list() | tuple():
            return f"a list of {len(value)}"
    return str(value)[:_LONGEST]


def without_words(error: BaseException) -> BaseException:
    """The same kind of error from the same place, for a log: its words may hold what a user wrote."""
    wordless: BaseException = type(type(error).__name__, (Exception,), {})("(words left out)")
    return wordless.with_traceback(error.__traceback__)


def shape(value: object) -> str:
    """What kind of value came, without its words."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return f"a text of {len(value)} characters"
        case int() | float():
            return "a number"
        case Mapping():
            return f"an object with {len(value)} fields"
        case list() | tuple():
            return f"a list of {len(value)}"
    return type(value).__name__
