"""Checks the fields of dataclasses, whoever fills them, against what their annotations say.

Files, the environment, options of the command line, Python objects and the bodies of requests give their values to the
same two functions. Invariant: a value that was not given is not checked, because the default is ours; pydantic, which
does the checking, is imported with the first check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rcllm.errors import ConfigError, RcllmError
from rcllm.late import Late

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from rcllm import checking
else:
    checking = Late("rcllm.checking")

T = TypeVar("T", bound="DataclassInstance")
Key = tuple[str | int, ...]  # where a value stands: ("cache", "memory_mb"), ("history", 3)
Namer = Callable[[Key], str]


def dotted(key: Key) -> str:
    """`cache.memory_mb`, `history[3]`: how a file or a body names a value."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def parse(
    kind: type[T],
    values: Mapping[str, Any],
    where: str = "",
    *,
    base: T | None = None,
    name: Namer = dotted,
    error: type[RcllmError] = ConfigError,
    readers: Mapping[Any, Callable[[Any], Any]] | None = None,
    show: Callable[[object], str] | None = None,
) -> T:
    """`values` as a `kind`, over `base` where there is one; sections may lie in each other.

    `where` opens the message and `name` names a key in the words of whoever gave it. `readers` read values of types
    that a file or a body writes in a way of its own; they raise ValueError or one of our errors. `show` says a value in
    messages, by default in a few words. Raises `error`, whose `field` is the name of the first value that is wrong.
    """
    wording = checking.Wording(where, name, show, error)
    made: T = checking.parse(kind, values, base, wording, tuple((readers or {}).items()))
    return made


def schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON schema of the objects that `parse` takes, without what a `readers` would add."""
    made: dict[str, Any] = checking.schema(kind)
    return made


def check(value: DataclassInstance, where: str = "", *, name: Namer = dotted) -> None:
    """Raises ConfigError where a field of a dataclass, made in Python, holds what a file could not have said."""
    if values := given(value):
        checking.check(value, values, checking.Wording(where, name, None, ConfigError))


def given(value: Any) -> dict[str, Any]:
    """The fields that are not at their default, and so were given by somebody."""
    found = {}
    for field in fields(value):
        held = getattr(value, field.name)
        if not field.init or held is field.default or (is_same(held, field.default)):
            continue
        found[field.name] = given(held) if is_dataclass(held) and not hasattr(type(held), "parse") else held
    return found


def is_same(one: object, other: object) -> bool:
    """Equal and of one type: 1, 1.0 and True are three values."""
    return type(one) is type(other) and one == other
