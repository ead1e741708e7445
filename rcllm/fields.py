"""What a field of a dataclass may hold, said once in its annotation and checked here for whoever fills it.

`Annotated[int, Ge(1), Opt("Rank of the adapter.")]` says the kind, the limits (of `annotated_types`) and the words for
the command line. Files, the environment, options, Python objects and the bodies of requests give their values to the
same two functions. Invariant: a value that was not given is not checked, because the default is ours; pydantic, which
does the checking, is imported with the first check.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from rcllm.errors import ConfigError, RcllmError
from rcllm.late import Late
from rcllm.words import brief

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from rcllm import checking
else:
    checking = Late("rcllm.checking")

T = TypeVar("T", bound="DataclassInstance")
Key = tuple[str | int, ...]  # where a value stands: ("cache", "memory_mb"), ("history", 3)
Namer = Callable[[Key], str]


@dataclass(frozen=True, slots=True)
class Opt:
    """What the command line says of a field. A field without one is no option."""

    help: str = ""
    metavar: str | None = None  # default: the words of a Literal, else the kind of value
    name: str | None = None  # `--candidates`; default: the field's own name
    panel: str | None = None  # the heading under which --help lists it


@dataclass(frozen=True, slots=True)
class Rule:
    """A check of one value beyond limits; `check` raises one of our errors."""

    check: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Of:
    """Marks the option of a field that belongs to another dataclass, such as a section of the configuration."""

    owner: type
    field: str

    @property
    def annotation(self) -> Any:
        return hints_of(self.owner)[self.field]


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass, with what `Annotated` adds; read once, for reading takes time."""
    return get_type_hints(kind, include_extras=True)


def option_of(annotation: Any) -> Opt | None:
    """The words for the command line, where a field has some; its own before those of the field that is meant."""
    return next((extra for extra in reversed(metadata(annotation)) if isinstance(extra, Opt)), None)


def metadata(annotation: Any) -> tuple[Any, ...]:
    """What stands behind the type in `Annotated`; after that of the field that is meant, where it says `Of`."""
    if get_origin(annotation) is not Annotated:
        return ()
    extras: tuple[Any, ...] = annotation.__metadata__
    meant = next((extra for extra in extras if isinstance(extra, Of)), None)
    return (*metadata(meant.annotation), *extras) if meant is not None else extras


def bare(annotation: Any) -> Any:
    """The type without what `Annotated` adds; of the field that is meant where it says `Of`."""
    if get_origin(annotation) is not Annotated:
        return annotation
    meant = next((extra for extra in annotation.__metadata__ if isinstance(extra, Of)), None)
    return bare(meant.annotation) if meant is not None else get_args(annotation)[0]


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
) -> T:
    """`values` as a `kind`, over `base` where there is one; sections may lie in each other.

    `where` opens the message and `name` names a key in the words of whoever gave it. `readers` read values of types
    that a file or a body writes in a way of its own; they raise ValueError or one of our errors. Raises `error`.
    """
    made: T = checking.parse(kind, values, where, base, name, error, tuple((readers or {}).items()))
    return made


def read_object(text: str | bytes, where: str, error: type[RcllmError] = ConfigError) -> dict[str, Any]:
    """The JSON object that a text holds. Raises `error`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise error(f"{where}{': ' * bool(where)}it is not JSON: {wrong}") from wrong
    if not isinstance(value, dict):
        raise error(f"{where}{': ' * bool(where)}expected a JSON object, got {brief(value)}")
    return value


def check(value: DataclassInstance, where: str = "", *, name: Namer = dotted) -> None:
    """Raises ConfigError where a field of a dataclass, made in Python, holds what a file could not have said."""
    if values := given(value):
        checking.check(value, values, where, name)


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


def check_regex(pattern: str) -> None:
    """A Rule. Raises ConfigError."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
