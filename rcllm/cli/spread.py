"""Options made from dataclasses.

A command is declared as a function whose parameters are dataclasses and single values. `spread` turns every field that
has an `Opt` into an option of its own, checks what a person gave, and hands whole dataclasses to the function that does
the work, which is imported only then. Knows nothing of what commands do. Invariant: messages name an option as it is
typed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from rcllm.annotated import Limits, bare, hints_of, metadata, option_of
from rcllm.cli.markup import to_markup
from rcllm.fields import parse
from rcllm.late import look_up

Declared = Callable[..., None]
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_LARGE = 1 << 32  # limits beyond it tell a person nothing


@dataclass(frozen=True, slots=True)
class Without:
    """Marks a parameter of a command: these fields of its dataclass are set in another way than by an option."""

    names: tuple[str, ...]


class Command:
    """A command as it is declared: a function whose parameters are dataclasses and single values."""

    def __init__(self, declared: Declared, work: str) -> None:
        self.declared = declared
        self.work = work  # what does it, at `package.module:function`

    def spread(self) -> Declared:
        """The function that Typer calls, with a parameter for every option."""
        declared = self.declared
        groups, alone = _read(declared)

        @functools.wraps(declared)
        def run(**given: Any) -> None:
            filled = {name: group.fill(given) for name, group in groups.items()}
            single = alone.fill(given)
            with look_up("rcllm.cli.screen:warnings_said")():
                look_up(self.work)(**filled, **{slot.name: getattr(single, slot.name) for slot in alone.slots})

        slots = {slot.name: slot for group in (alone, *groups.values()) for slot in group.slots}
        order = [slot.name for name in get_parameters(declared) for slot in _slots_of(name, groups, alone)]
        parameters = [_parameter(slots[name]) for name in order]
        del run.__dict__["__wrapped__"]  # Typer would read the signature of what is wrapped
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run


def spread(work: str) -> Callable[[Declared], Command]:
    """Marks a function as the declaration of a command that `work`, at `package.module:function`, does."""
    return lambda declared: Command(declared, work)


@dataclass(frozen=True, slots=True)
class _Slot:
    """What becomes one option: a field of a dataclass, or a parameter that stands alone."""

    name: str
    annotation: Any
    default: Any = MISSING

    @property
    def shown_default(self) -> Any:
        """The default as an option has it: None for what cannot be typed, such as no limit."""
        default = None if self.default is MISSING else self.default
        if hasattr(type(default), "parse"):
            return str(default)
        if isinstance(default, tuple):
            return list(default) or None
        return None if isinstance(default, float) and math.isinf(default) else default

    @property
    def typed(self) -> str:
        """The name as a person types it."""
        option = option_of(self.annotation)
        assert option is not None
        return option.name or "--" + self.name.replace("_", "-")


class _OptionGroup:
    """Options that are checked together, and make one object."""

    def __init__(self, slots: Sequence[_Slot], make: Callable[[], Any]) -> None:
        """`make`: gives the dataclass, when there is something to check."""
        self.slots = slots
        self._make = make

    @classmethod
    @functools.cache  # most commands share the same groups
    def of(cls, kind: Any, without: tuple[str, ...] = ()) -> _OptionGroup:
        hints = hints_of(kind)
        named = [field for field in fields(kind) if field.name not in without and option_of(hints[field.name])]
        return cls([_Slot(field.name, hints[field.name], field.default) for field in named], lambda: kind)

    def fill(self, given: Mapping[str, Any]) -> Any:
        """The dataclass of what was given. Raises ConfigError."""
        changed = {slot.name: given[slot.name] for slot in self.slots if _differs(given[slot.name], slot)}
        typed = {slot.name: slot.typed for slot in self.slots}
        return parse(self._make(), changed, name=lambda key: typed[str(key[0])])


def _differs(value: Any, slot: _Slot) -> bool:
    return value is not None and value != slot.shown_default


def _read(declared: Declared) -> tuple[dict[str, _OptionGroup], _OptionGroup]:
    """The dataclasses of a declaration by parameter, and the values that stand alone."""
    hints = get_type_hints(declared, include_extras=True)
    groups: dict[str, _OptionGroup] = {}
    alone: list[_Slot] = []
    for name, default in get_parameters(declared).items():
        kind = bare(hints[name])
        if isinstance(kind, type) and is_dataclass(kind):
            hidden = next((extra.names for extra in metadata(hints[name]) if isinstance(extra, Without)), ())
            groups[name] = _OptionGroup.of(kind, hidden)
        else:
            alone.append(_Slot(name, hints[name], default))
    return groups, _OptionGroup(alone, lambda: _single(alone))


def _single(slots: Sequence[_Slot]) -> Any:
    """A dataclass of the values that stand alone, so that they are checked as all others are."""
    needed = [(slot.name, slot.annotation) for slot in slots if slot.default is MISSING]
    rest = [(slot.name, slot.annotation, slot.default) for slot in slots if slot.default is not MISSING]
    return make_dataclass("Single", [*needed, *rest], frozen=True)


def get_parameters(declared: Declared) -> dict[str, Any]:
    """The names of the parameters of a function, and their defaults."""
    found = inspect.signature(declared).parameters
    return {name: MISSING if each.default is inspect.Parameter.empty else each.default for name, each in found.items()}


def _slots_of(name: str, groups: Mapping[str, _OptionGroup], alone: _OptionGroup) -> Sequence[_Slot]:
    return groups[name].slots if name in groups else [slot for slot in alone.slots if slot.name == name]


@functools.cache  # most commands share the same options
def _parameter(slot: _Slot) -> inspect.Parameter:
    """One option as Typer reads it."""
    default = inspect.Parameter.empty if slot.default is MISSING else slot.shown_default
    kind = _plain(bare(slot.annotation))
    kind = kind | None if default is None else kind
    annotation = Annotated[kind, _option(slot)]  # type: ignore[valid-type]  # made at run time
    return inspect.Parameter(slot.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(slot: _Slot) -> Any:
    option, kind, flag = option_of(slot.annotation), bare(slot.annotation), slot.typed
    assert option is not None
    words = to_markup(option.help) or None
    if not flag.startswith("-"):
        return typer.Argument(metavar=flag, help=words)
    if kind is bool and slot.default is True:
        flag += f"/--no-{flag.removeprefix('--')}"
    metavar = option.metavar or _shown_kind(slot.annotation)
    return typer.Option(flag, help=words, metavar=metavar, rich_help_panel=option.panel)


def _shown_kind(annotation: Any) -> str | None:
    """What --help says of the values: the words, or a number and its limits. They are checked by `parse` alone."""
    kind = bare(annotation)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    letter = {int: "N", float: "X"}.get(_plain(kind))
    return letter and " ".join([letter, *_limits(annotation)])


def _limits(annotation: Any) -> list[str]:
    """«≥ 1», «< 1»: the last ones said of each side, as a group may narrow those of the field that it means."""
    found: dict[str, str] = {}
    for extra in metadata(annotation):
        for name, limit in extra.bounds.items() if isinstance(extra, Limits) else ():
            if name in _SIGNS and abs(limit) < _LARGE:
                found[name[0]] = f"{_SIGNS[name]} {limit}"
    return [found[side] for side in "gl" if side in found]


def _plain(kind: Any) -> Any:
    """The type that Typer reads: what is written as one word is a text until it is checked."""
    if isinstance(kind, type) and not get_args(kind):
        return str if hasattr(kind, "parse") else kind
    if get_origin(kind) is Literal:
        return str
    if get_origin(kind) is tuple:
        return list[_plain(bare(get_args(kind)[0]))]  # type: ignore[misc]  # made at run time
    return next(_plain(inner) for inner in get_args(kind) if inner is not NoneType)
