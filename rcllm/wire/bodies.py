"""What the bodies of all HTTP requests have in common.

They are dataclasses, and checked as options and files are. Knows nothing of HTTP. Invariant: a message about a body
names the field and the kind of value that came, and never the value, which may be a user's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from rcllm.annotated import Gt
from rcllm.core.ranking import Level
from rcllm.data.text import well_formed
from rcllm.errors import RequestError
from rcllm.fields import parse
from rcllm.wire.requests import READERS, read_texts, without_nulls
from rcllm.words import shape

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

B = TypeVar("B", bound="DataclassInstance")
Object = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Extras:
    """What every request may say of how it is served."""

    level: Level | None = None  # how far reuse may go; None: as the server is set up
    deadline_ms: Annotated[float, Gt(0)] | None = None  # until the scores, or the first token
    explain: bool = False  # add the whole receipt


def read(kind: type[B], value: Object, readers: Mapping[Any, Any] | None = None) -> B:
    """A body, in which null is as good as left out. Raises RequestError, which names the field."""
    readers = {**READERS, Mapping[str, str]: partial(read_texts, show=shape), **(readers or {})}
    return parse(kind, without_nulls(value), error=RequestError, readers=readers, show=shape)


def split(value: Object, kind: type[Any]) -> tuple[dict[str, object], dict[str, object]]:
    """The keys that are fields of a dataclass, and the others."""
    names = kind.__dataclass_fields__
    own = {name: inner for name, inner in value.items() if name in names}
    return own, {name: inner for name, inner in value.items() if name not in names}


def served(value: Object, unserved: Mapping[str, Collection[object]], ignored: Collection[str]) -> dict[str, object]:
    """The body without what clients send and nothing here does.

    `unserved`: names of what changes answers elsewhere, with the values that mean nothing; another value raises
    RequestError. `ignored`: names of what changes no answer.
    """
    for name, neutral in unserved.items():
        given = value.get(name)
        if given is not None and not any(type(given) is type(each) and given == each for each in neutral):
            raise named(f"{name} is not served here; leave it out", name)
    return {name: inner for name, inner in value.items() if name not in unserved and name not in ignored}


def named(message: str, field: str) -> RequestError:
    """An error that says which field it is about."""
    error = RequestError(message)
    error.field = field
    return error


def read_text(value: object) -> str:
    """A text as it is, also an empty one. Raises RequestError for anything else."""
    if not isinstance(value, str):
        raise RequestError("expected a text")
    return well_formed(value)
