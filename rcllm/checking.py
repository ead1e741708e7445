"""Checks values against the annotations of dataclasses, with pydantic; reached through `rcllm.fields` alone.

Strict: a text is no number and `true` is no 1, as in JSON and TOML. Unknown keys are refused with the nearest name.
Invariant: every message says where, what was expected and what came; NaN and infinity are never numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NewType, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from rcllm.annotated import Limits, Rule, bare, hints_of, metadata
from rcllm.errors import ConfigError, RcllmError
from rcllm.words import brief, nearest, shape

Reader = Callable[[Any], Any]
Readers = tuple[tuple[Any, Reader], ...]
Namer = Callable[[tuple[str | int, ...]], str]
_KINDS: dict[type[BaseModel], type[Any]] = {}  # the dataclass that a model was made of
_SHOWN = 3  # faults in one message
_STRICT: dict[Any, Any] = {
    int: Annotated[int, Strict()],
    str: Annotated[str, Strict()],
    bool: Annotated[bool, Strict()],
    Path: Path,
    float: Annotated[float, Strict(), AllowInfNan(False)],
}
_EXPECTED = {  # by pydantic's name of a fault; in braces what it knows of the limit
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "a section",
    "path_type": "a path",
}


@dataclass(frozen=True, slots=True)
class Wording:
    """How a mistake is told."""

    where: str  # opens the message
    name: Namer  # a key, in the words of whoever gave it
    show: Callable[[object], str] | None  # a value; None: in a few words
    error: type[RcllmError]

    def raised(self, kind: Any, wrong: ValidationError) -> RcllmError:
        faults = wrong.errors(include_url=False)
        error = self.error(_message(kind, faults, self))
        error.field = self.name(faults[0]["loc"]) if faults and faults[0]["loc"] else None
        return error


def parse(kind: type[Any], values: Mapping[str, Any], base: Any, wording: Wording, readers: Readers) -> Any:
    """See `rcllm.fields.parse`."""
    found = _validated(kind, values, wording, readers)
    try:
        return _build(kind, found, base)
    except RcllmError as wrong:  # of a dataclass that checks how its fields go together
        raise wording.error(f"{wording.where}: {wrong}" if wording.where else str(wrong)) from wrong


def check(value: Any, values: Mapping[str, Any], wording: Wording) -> None:
    """`values`: the fields of `value` that are not at their default. Raises ConfigError."""
    _same_types(_validated(type(value), values, wording, ()), value, wording.name, ())


def schema(kind: Any) -> dict[str, Any]:
    """See `rcllm.fields.schema`."""
    return _model(kind, ()).model_json_schema()


def _validated(kind: Any, values: Mapping[str, Any], wording: Wording, readers: Readers) -> BaseModel:
    try:
        return _model(kind, readers).model_validate(values)
    except ValidationError as wrong:
        raise wording.raised(kind, wrong) from None


def _same_types(found: BaseModel, value: Any, name: Namer, above: tuple[str, ...]) -> None:
    """A file writes a level as a text and a tuple as a list; an object in Python holds the things themselves."""
    for key in found.model_fields_set:
        wanted, got = getattr(found, key), getattr(value, key)
        if isinstance(wanted, BaseModel):
            _same_types(wanted, got, name, (*above, key))
        elif isinstance(got, str | list) and not isinstance(wanted, type(got) | Path):
            kind = type(wanted).__name__
            how = f"; read one with {kind}.parse" if hasattr(wanted, "parse") else ""
            raise ConfigError(f"{name((*above, key))} must be a {kind}, got {got!r}{how}")


@functools.cache
def _model(kind: Any, readers: Readers) -> type[BaseModel]:
    """The pydantic model with the fields of a dataclass. Its defaults are never read: what was given is what counts."""
    hints = hints_of(kind)
    reading = dict(readers)
    shape: dict[str, Any] = {}
    for field in fields(kind):
        if field.init:
            needed = field.default is MISSING and field.default_factory is MISSING
            shape[field.name] = (_strict(hints[field.name], reading), ... if needed else None)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    model: type[BaseModel] = create_model(kind.__name__, __config__=config, **shape)
    _KINDS[model] = kind
    return model


def _strict(hint: Any, readers: Mapping[Any, Reader]) -> Any:
    """The same type, for pydantic, which takes values in the words of JSON and TOML and no others."""
    if hint in readers:
        return Annotated[Any, PlainValidator(_told(readers[hint]))]
    if isinstance(hint, NewType):
        return _strict(hint.__supertype__, readers)
    if hint in _STRICT:
        return _STRICT[hint]
    if hasattr(hint, "parse") and isinstance(hint, type):  # such as a level: a class that is written as one text
        return Annotated[Any, PlainValidator(_told(functools.partial(_parsed, hint)))]
    if is_dataclass(hint) and isinstance(hint, type):
        return _model(hint, tuple(readers.items()))
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        meant = bare(hint)  # of another dataclass, perhaps, whose field may then be left at None here
        kind = Union[meant, None] if type(None) in get_args(parts[0]) else meant  # noqa: UP007  made at run time
        return Annotated[(_strict(kind, readers), *map(_limit, metadata(hint)))]
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(part, readers) for part in parts)]  # noqa: UP007  made at run time
    if origin is tuple:
        return tuple[tuple(part if part is ... else _strict(part, readers) for part in parts)]  # type: ignore[misc]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[tuple(_strict(part, readers) for part in parts)]  # type: ignore[misc]
    return hint


def _limit(extra: Any) -> Any:
    """What pydantic is told of the extras of a field, in its own words: a rule is one of its validators."""
    if isinstance(extra, Limits):
        return Field(**extra.bounds)
    return AfterValidator(_told(functools.partial(_kept, extra.check))) if isinstance(extra, Rule) else extra


def _kept(check: Reader, value: Any) -> Any:
    check(value)
    return value


def _parsed(kind: Any, value: Any) -> Any:
    """An object is held to the same limits as a text: to those of the text that it is written as."""
    if isinstance(value, kind):
        kind.parse(str(value))
        return value
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {brief(value)}")
    return kind.parse(value)


def _told(read: Reader) -> Reader:
    """`read`, whose errors pydantic then knows the place of."""

    def run(value: Any) -> Any:
        try:
            return read(value)
        except (RcllmError, ValueError) as error:
            raise PydanticCustomError("told", "{text}", {"text": str(error)}) from error

    return run


def _build(kind: type[Any], found: BaseModel, base: Any) -> Any:
    """The dataclass of what was given, over `base`, section by section."""
    defaults = {field.name: field for field in fields(kind)}
    values = {}
    for name in found.model_fields_set:
        value = getattr(found, name)
        start = _default(defaults[name]) if base is None else getattr(base, name)
        values[name] = _built(value, start if isinstance(value, BaseModel) else None)
    return kind(**values) if base is None else replace(base, **values)


def _built(value: Any, base: Any) -> Any:
    """Sections as their dataclasses, also where they lie in objects and lists."""
    if isinstance(value, BaseModel):
        return _build(_KINDS[type(value)], value, base)
    if isinstance(value, dict):
        return {name: _built(inner, None) for name, inner in value.items()}
    return tuple(_built(inner, None) for inner in value) if isinstance(value, tuple) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    """None where a section has no default, and so must be given whole."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _message(kind: type[Any], faults: Sequence[Any], wording: Wording) -> str:
    name = wording.name
    if len(faults) > 1:  # entries that are wrong are missed as entries, too
        faults = [fault for fault in faults if fault["type"] != "too_short"]
    told = [_fault(kind, fault, wording) for fault in faults if fault["type"] != "missing"]
    if missing := [name(fault["loc"]) for fault in faults if fault["type"] == "missing"]:
        told.insert(0, f"missing {', '.join(missing)}")
    if len(told) > _SHOWN:
        told[_SHOWN:] = [f"and {len(told) - _SHOWN} more"]
    return (f"{wording.where}: " if wording.where else "") + "; ".join(told)


def _fault(kind: type[Any], fault: Any, wording: Wording) -> str:
    name = wording.name
    key, what, value = fault["loc"], fault["type"], fault["input"]
    got = (shape if _is_secret(kind, key) else wording.show or brief)(value)
    if not key:
        return f"expected an object, got {got}"
    if what == "extra_forbidden":
        section = f" in {name(key[:-1])}" if len(key) > 1 else ""
        return f"unknown key {str(key[-1])!r}{section}; {nearest(str(key[-1]), _known(kind, key[:-1]))}"
    if what == "told":
        return f"{name(key)}: {fault['ctx']['text']}"
    if what == "literal_error":
        words = _words(kind, key)
        close = nearest(str(fault["input"]), words) if isinstance(fault["input"], str) else ""
        meant = f"; {close}" if close.startswith("did") else ""
        return f"{name(key)} must be one of {', '.join(words)}, got {got}{meant}"
    limit = _EXPECTED.get(f"string_{what}" if isinstance(value, str) and what in ("too_short", "too_long") else what)
    if limit is None:
        return f"{name(key)}: {fault['msg']}, got {got}"
    bounds = {bound: brief(value) for bound, value in fault.get("ctx", {}).items()}
    return f"{name(key)} must be {limit.format(**bounds)}, got {got}"


def _is_secret(kind: type[Any], key: Sequence[str | int]) -> bool:
    """Whether a value is such as its dataclass does not show either."""
    for place, part in enumerate(key):
        owner: Any = _at(kind, key[:place])
        if is_dataclass(owner) and any(field.name == part and not field.repr for field in fields(owner)):
            return True
    return False


def _known(kind: type[Any], key: Sequence[str | int]) -> list[str]:
    inner = _at(kind, key)
    return [field.name for field in fields(inner) if field.init] if is_dataclass(inner) else []


def _words(kind: type[Any], key: Sequence[str | int]) -> list[str]:
    return [str(word) for word in get_args(_at(kind, key))]


def _at(hint: Any, key: Sequence[str | int]) -> Any:
    """The type at a place of a dataclass: its fields by name, through lists, objects and what may be null."""
    for part in key:
        if is_dataclass(hint):
            owner: Any = hint
            hint = bare(hints_of(owner)[str(part)])
        else:  # [item], {name: item}
            hint = get_args(hint)[0 if isinstance(part, int) else -1]
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(inner for inner in get_args(hint) if inner is not types.NoneType)
    return hint
