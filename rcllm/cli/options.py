"""Options made from dataclasses, and the groups of options that commands share.

A command is declared as a function whose parameters are dataclasses and single values; `spread` turns every field that
has an `Opt` into an option of its own, checks what a person gave, and hands whole dataclasses to the function that does
the work, which is imported only then. Knows nothing of what commands do. Invariant: messages name an option as it is
typed, and None in a shared group means «not given», so that the configuration file decides.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Interval, Le

from rcllm.config import CacheConfig, ModelConfig, PromptConfig
from rcllm.core.ranking import LabelPlace, Layout, Level, RankOptions, Readout
from rcllm.fields import Key, Of, Opt, bare, metadata, option_of, parse
from rcllm.late import look_up

_ITEMS, _FIDELITY = "Items", "How far reuse may go"
Declared = Callable[..., None]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model, template and memory; over those of the configuration file."""

    model: Annotated[str | None, Of(ModelConfig, "path")] = None
    adapter: Annotated[str | None, Of(ModelConfig, "adapter")] = None
    template: Annotated[str | None, Of(PromptConfig, "template")] = None
    config: Annotated[
        Path | None,
        Opt(
            "TOML with [model], [prompt], [cache], [rank]; options here win over it.",
            metavar="FILE",
            panel="Model and cache",
        ),
    ] = None
    context: Annotated[str | None, Of(PromptConfig, "context")] = None
    memory_mb: Annotated[int | None, Of(CacheConfig, "memory_mb"), Ge(1)] = None
    kv_dtype: Annotated[str | None, Of(CacheConfig, "kv_dtype")] = None
    threads: Annotated[int | None, Of(ModelConfig, "threads"), Ge(1)] = None


@dataclass(frozen=True, slots=True)
class ItemOptions:
    """Where the catalogue comes from."""

    items: Annotated[
        Path | None,
        Opt(
            "Catalogue (.jsonl, .csv, .parquet): an item per row, an id and text fields.",
            metavar="FILE",
            panel=_ITEMS,
        ),
    ] = None
    dataset: Annotated[
        Path | None,
        Opt(
            "Data set: a catalogue (unless --items is given) and users' histories.",
            metavar="FOLDER",
            panel=_ITEMS,
        ),
    ] = None
    format: Annotated[str, Opt("Format of the data set; auto tells it by its files.", metavar="NAME", panel=_ITEMS)] = (
        "auto"
    )
    id_field: Annotated[str, Opt("Column of --items that holds the id.", metavar="NAME", panel=_ITEMS)] = "item_id"
    volatile: Annotated[
        tuple[str, ...],
        Opt(
            "Column of --items that changes at any time (price, stock): rendered fresh, never cached. May repeat.",
            metavar="NAME",
            panel=_ITEMS,
        ),
    ] = ()


@dataclass(frozen=True, slots=True)
class RankingOptions:
    """How requests are answered that do not say so themselves."""

    level: Annotated[Level | None, Of(RankOptions, "level")] = None
    readout: Annotated[Readout | None, Of(RankOptions, "readout")] = None
    layout: Annotated[Layout | None, Of(RankOptions, "layout")] = None
    label_place: Annotated[LabelPlace | None, Of(RankOptions, "label_place")] = None
    semantic_pool: Annotated[str | None, Of(CacheConfig, "semantic_pool")] = None


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """Which reuse levels may be used."""

    fidelity: Annotated[
        Path | None,
        Opt(
            "What `rcllm calibrate` wrote. Default: fidelity.json in this folder, where it belongs to this model and "
            "template.",
            metavar="FILE",
            panel=_FIDELITY,
        ),
    ] = None
    allow_uncalibrated: Annotated[
        bool,
        Opt("Use the level that is asked for, whether or not a calibration allows it.", panel=_FIDELITY),
    ] = False


@dataclass(frozen=True, slots=True)
class Without:
    """Marks a parameter of a command: these fields of its dataclass are set in another way than by an option."""

    names: tuple[str, ...]


def spread(work: str) -> Callable[[Declared], Declared]:
    """The command that a declaration describes; `work`, at `package.module:function`, does it."""

    def declare(declared: Declared) -> Declared:
        groups = dict(_groups(declared))

        @functools.wraps(declared)
        def run(**given: Any) -> None:
            filled = {name: group.fill(given) for name, group in groups.items()}
            single = filled.pop("", None)
            values = {} if single is None else {field.name: getattr(single, field.name) for field in fields(single)}
            look_up(work)(**filled, **values)

        parameters = [parameter for group in groups.values() for parameter in group.parameters]
        order = list(inspect.signature(declared).parameters)
        parameters.sort(key=lambda parameter: _place(parameter.name, order, groups))
        del run.__dict__["__wrapped__"]  # Typer would read the signature of what is wrapped
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__dict__["work"] = work
        run.__dict__["declared"] = declared
        return run

    return declare


class _Group:
    """The options of one dataclass."""

    def __init__(self, kind: Any, without: tuple[str, ...] = ()) -> None:
        self.kind = kind
        hints = get_type_hints(kind, include_extras=True)
        self.fields = [field for field in fields(kind) if field.name not in without and _is_option(hints[field.name])]
        self._names = {field.name: _option_name(field.name, hints[field.name]) for field in self.fields}
        self.parameters = [_parameter(field, hints[field.name]) for field in self.fields]

    def fill(self, given: dict[str, Any]) -> Any:
        """The dataclass of what was given; takes that out of `given`. Raises ConfigError."""
        values: dict[str, Any] = {}
        for field in self.fields:
            value = given[field.name]
            if value is not None and value != _shown_default(field):
                values[field.name] = value
        return parse(self.kind, values, name=self._name)

    def _name(self, key: Key) -> str:
        name = self._names[str(key[0])]
        return name if name.startswith("-") else name.upper()


def _groups(declared: Declared) -> Iterator[tuple[str, _Group]]:
    """By the name of the parameter; the values that stand alone form one more group, named ''."""
    hints = get_type_hints(declared, include_extras=True)
    single: list[Any] = []
    for name, parameter in inspect.signature(declared).parameters.items():
        kind = bare(hints[name])
        if is_dataclass(kind):
            hidden = next((extra.names for extra in metadata(hints[name]) if isinstance(extra, Without)), ())
            yield name, _Group(kind, hidden)
        elif parameter.default is inspect.Parameter.empty:
            single.insert(0, (name, hints[name]))
        else:
            single.append((name, hints[name], parameter.default))
    if single:
        yield "", _Group(make_dataclass("Single", single, frozen=True))


def _place(name: str, order: list[str], groups: dict[str, _Group]) -> tuple[int, int]:
    """Options in the order of the declaration."""
    owner = next((key for key, group in groups.items() if key and name in [field.name for field in group.fields]), name)
    inner = [field.name for field in groups[owner].fields].index(name) if owner != name or owner in groups else 0
    return order.index(owner), inner


def _is_option(annotation: Any) -> bool:
    return option_of(annotation) is not None or _typer_info(annotation) is not None


def _typer_info(annotation: Any) -> Any:
    """What a declaration tells Typer itself: of arguments, which are no options."""
    return next((extra for extra in metadata(annotation) if isinstance(extra, typer.models.ArgumentInfo)), None)


def _option_name(name: str, annotation: Any) -> str:
    option = option_of(annotation)
    if option is None:
        return name
    return option.name or "--" + name.replace("_", "-")


def _parameter(field: Field[Any], annotation: Any) -> inspect.Parameter:
    """One option as Typer reads it."""
    default = inspect.Parameter.empty if _is_needed(field) else _shown_default(field)
    info = _typer_info(annotation) or _option(field.name, annotation, default)
    kind = _plain(bare(annotation))
    kind = kind | None if default is None else kind
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _option(name: str, annotation: Any, default: Any) -> Any:
    option, kind = option_of(annotation), bare(annotation)
    assert option is not None
    flag = _option_name(name, annotation)
    if kind is bool and default is True:
        flag += f"/--no-{flag.removeprefix('--')}"
    limits = _limits(annotation) if _plain(kind) in (int, float) else {}
    words = "|".join(get_args(kind)) if get_origin(kind) is Literal else None
    return typer.Option(
        flag, help=option.help or None, metavar=option.metavar or words, rich_help_panel=option.panel, **limits
    )


def _limits(annotation: Any) -> dict[str, Any]:
    """What --help shows of the limits; the narrowest where a group narrows those of the field that it means."""
    found = metadata(annotation)
    low: list[Any] = [limit.ge for limit in found if isinstance(limit, Ge | Interval) and limit.ge is not None]
    high: list[Any] = [limit.le for limit in found if isinstance(limit, Le | Interval) and limit.le is not None]
    return ({"min": max(low)} if low else {}) | ({"max": min(high)} if high else {})


def _is_needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _shown_default(field: Field[Any]) -> Any:
    """A default as an option has it: None for what cannot be typed, such as no limit."""
    default = None if field.default is MISSING else field.default
    if hasattr(type(default), "parse"):
        return str(default)
    if isinstance(default, tuple):
        return list(default) or None
    return None if isinstance(default, float) and math.isinf(default) else default


def _plain(kind: Any) -> Any:
    """The type that Typer reads: what is written as one word is a text until it is checked."""
    if isinstance(kind, type) and not get_args(kind):
        return str if hasattr(kind, "parse") else kind
    if get_origin(kind) is Literal:
        return str
    if get_origin(kind) is tuple:
        return list[_plain(bare(get_args(kind)[0]))]  # type: ignore[misc]  # made at run time
    return next(_plain(inner) for inner in get_args(kind) if inner is not NoneType)
