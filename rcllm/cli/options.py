"""The options that commands share, each defined once.

A command takes whole groups of options as parameters; `spread` turns every field of a group into an option of its own.
Knows nothing of what commands do. Invariant: None means «not given», so that the configuration file decides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_ENGINE, _ITEMS, _RANKING, _FIDELITY = "Model and cache", "Items", "How to rank", "How far reuse may go"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model, template and memory; over those of the configuration file."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="What `rcllm pull` knows, a model folder, a .gguf file or a hub id.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="LoRA adapter (of `rcllm tune`, or as peft saves it), merged into the model.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Prompt template: shopping, movies, titles, echo, or a .toml file.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML with [model], [prompt], [cache], [rank]; options here win over it.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    context: Annotated[
        str | None,
        typer.Option(
            metavar="none|bos|instruction|typical|mean(N)",
            help="What stood before a block when its KV was computed. typical and mean(N) need --dataset, and cost "
            "nothing when ranking.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    memory_mb: Annotated[
        int | None,
        typer.Option(min=1, help="Memory of the whole process; default 60 % of the machine.", rich_help_panel=_ENGINE),
    ] = None
    kv_dtype: Annotated[
        str | None,
        typer.Option(metavar="fp32|fp16|bf16", help="How cached KV is stored.", rich_help_panel=_ENGINE),
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; default all.", rich_help_panel=_ENGINE)] = (
        None
    )


@dataclass(frozen=True, slots=True)
class ItemOptions:
    """Where the catalogue comes from."""

    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Catalogue (.jsonl, .csv, .parquet): an item per row, an id and text fields.",
            rich_help_panel=_ITEMS,
        ),
    ] = None
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Data set: a catalogue (unless --items is given) and users' histories.",
            rich_help_panel=_ITEMS,
        ),
    ] = None
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Format of the data set; auto tells it by its files.", rich_help_panel=_ITEMS
        ),
    ] = "auto"
    id_field: Annotated[
        str, typer.Option(metavar="NAME", help="Column of --items that holds the id.", rich_help_panel=_ITEMS)
    ] = "item_id"
    volatile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Column of --items that changes at any time (price, stock): rendered fresh, never cached. May repeat.",
            rich_help_panel=_ITEMS,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class RankingOptions:
    """How requests are answered that do not say so themselves."""

    level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="auto (the fastest that is calibrated, else exact), full (nothing reused), exact (cached prefix), "
            "corrected(r_item, r_history), linked(k), tail(r) or blocks.",
            rich_help_panel=_RANKING,
        ),
    ] = None
    readout: Annotated[
        str | None,
        typer.Option(
            metavar="label|pointwise|likelihood",
            help="label: a letter per candidate; pointwise: yes or no; likelihood: how likely its text is "
            "(the one that works with an untuned model).",
            rich_help_panel=_RANKING,
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="history_first|items_first",
            help="What comes first in the prompt.",
            rich_help_panel=_RANKING,
        ),
    ] = None
    label_place: Annotated[
        str | None,
        typer.Option(
            metavar="before|after", help="Where a candidate's label stands, by its item.", rich_help_panel=_RANKING
        ),
    ] = None
    semantic_pool: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read histories from this pool of token prototypes (`rcllm pool build`) instead of events' own KV.",
            rich_help_panel=_RANKING,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """Which reuse levels may be used."""

    fidelity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `rcllm calibrate` wrote. Default: fidelity.json in this folder, where it belongs to this model "
            "and template.",
            rich_help_panel=_FIDELITY,
        ),
    ] = None
    allow_uncalibrated: Annotated[
        bool,
        typer.Option(
            "--allow-uncalibrated",
            help="Use the level that is asked for, whether or not a calibration allows it.",
            rich_help_panel=_FIDELITY,
        ),
    ] = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the fields of its dataclass parameters as keyword parameters, for Typer to read."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if (group := groups.get(parameter.name)) is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            types = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
                )
                for field in fields(group)
            ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        whole = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **whole)

    del run.__dict__["__wrapped__"]  # Typer would read the signature of what is wrapped
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
