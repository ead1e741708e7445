"""The words in which a dataclass says what its fields may hold: once, in their annotations.

`Annotated[int, Ge(1), Opt("Rank of the adapter.")]` says the kind, the limits and the words of the command line.
`rcllm.fields` checks values against them. Imports nothing that takes time: `annotated_types`, which has such limits
too, takes as long as all options of a command.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from rcllm.errors import ConfigError


def check_regex(pattern: str) -> None:
    """A Rule. Raises ConfigError."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


class Limits:
    """Bounds of a number, or of the length of a list, by the names that pydantic's `Field` gives them."""

    __slots__ = ("bounds",)

    def __init__(self, **bounds: Any) -> None:
        self.bounds = bounds


class Ge(Limits):
    """At least."""

    __slots__ = ()

    def __init__(self, ge: float) -> None:
        super().__init__(ge=ge)


class Gt(Limits):
    """Above."""

    __slots__ = ()

    def __init__(self, gt: float) -> None:
        super().__init__(gt=gt)


class Interval(Limits):
    """Between `ge` (or above `gt`) and `le` (or below `lt`)."""

    __slots__ = ()


class MinLen(Limits):
    """With at least so many elements or characters."""

    __slots__ = ()

    def __init__(self, min_length: int) -> None:
        super().__init__(min_length=min_length)


class MaxLen(Limits):
    """With at most so many elements or characters."""

    __slots__ = ()

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length=max_length)


class MultipleOf(Limits):
    """A multiple of."""

    __slots__ = ()

    def __init__(self, multiple_of: float) -> None:
        super().__init__(multiple_of=multiple_of)


@dataclass(frozen=True, slots=True)
class Opt:
    """What the command line says of a field. A field without one is no option."""

    help: str = ""
    metavar: str | None = None  # default: the words of a Literal, else the kind of value
    name: str | None = None  # `--candidates`, or `ROWS` for what stands without a flag; default: the field's own name
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
