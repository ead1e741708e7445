"""The groups of options that commands share, each declared once.

Knows nothing of commands. Invariant: None means «not given», so that the environment and the configuration file decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Ge, Of, Opt
from rcllm.config import CacheConfig, ModelConfig, PromptConfig, StoreConfig
from rcllm.core.requests import LabelPlace, Layout, Level, RankOptions, Readout

_ITEMS, _FIDELITY, _KEPT = "Items", "How far reuse may go", "What is kept on disk"


UserField = Annotated[
    str | None,
    Opt("Column of the user in interactions; default user_id, or another usual name.", metavar="NAME", panel=_ITEMS),
]
ItemField = Annotated[
    str | None,
    Opt(
        "Column of the item in interactions, and in the items of --dataset; default item_id, or another usual name.",
        metavar="NAME",
        panel=_ITEMS,
    ),
]
TimeField = Annotated[
    str | None,
    Opt(
        "Column of the time in interactions; default timestamp, or another usual name, else the order of the file.",
        metavar="NAME",
        panel=_ITEMS,
    ),
]
IdField = Annotated[
    str | None,
    Opt("Column of --items that holds the id; default item_id, or another usual name.", metavar="NAME", panel=_ITEMS),
]
Restart = Annotated[bool, Opt("Begin --out anew, whatever it holds; else a file of the same job goes on.")]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which model, template and memory; over those of the configuration file."""

    model: Annotated[str | None, Of(ModelConfig, "path")] = None
    adapter: Annotated[str | None, Of(ModelConfig, "adapter")] = None
    template: Annotated[str | None, Of(PromptConfig, "template")] = None
    config: Annotated[
        Path | None,
        Opt(
            "TOML with [model], [prompt], [cache], [store], [rank], [server]; options here win over it.",
            metavar="FILE",
            panel="Model and cache",
        ),
    ] = None
    context: Annotated[str | None, Of(PromptConfig, "context")] = None
    memory_mb: Annotated[int | None, Of(CacheConfig, "memory_mb"), Ge(1)] = None
    dtype: Annotated[str | None, Of(ModelConfig, "dtype")] = None
    weights: Annotated[str | None, Of(ModelConfig, "weights")] = None
    kv_dtype: Annotated[str | None, Of(CacheConfig, "kv_dtype")] = None
    threads: Annotated[int | None, Of(ModelConfig, "threads"), Ge(1)] = None
    max_item_tokens: Annotated[int | None, Of(PromptConfig, "max_item_tokens"), Ge(1)] = None
    max_event_tokens: Annotated[int | None, Of(PromptConfig, "max_event_tokens"), Ge(1)] = None
    max_volatile_tokens: Annotated[int | None, Of(PromptConfig, "max_volatile_tokens"), Ge(1)] = None


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What is kept when the command ends."""

    store: Annotated[
        bool, Opt("Keep computed KV on disk for the next run; on unless the configuration says no.", panel=_KEPT)
    ] = True
    store_folder: Annotated[str | None, Of(StoreConfig, "folder")] = None
    disk_mb: Annotated[int | None, Of(StoreConfig, "disk_mb"), Ge(1)] = None
    shared_store: Annotated[str | None, Of(StoreConfig, "shared")] = None


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
            "Data set: a catalogue (unless --items is given) and users' histories; movielens is fetched once.",
            metavar="FOLDER|movielens",
            panel=_ITEMS,
        ),
    ] = None
    format: Annotated[str, Opt("Format of the data set; auto tells it by its files.", metavar="NAME", panel=_ITEMS)] = (
        "auto"
    )
    id_field: IdField = None
    field: Annotated[
        tuple[str, ...],
        Opt(
            "What a template calls NAME stands in this column of --items: title=Book-Title. May repeat.",
            metavar="NAME=COLUMN",
            panel=_ITEMS,
        ),
    ] = ()
    user_field: UserField = None
    item_field: ItemField = None
    time_field: TimeField = None
    delimiter: Annotated[
        str | None, Opt("What separates the cells of --items; default: by its rows.", metavar="SIGN", panel=_ITEMS)
    ] = None
    encoding: Annotated[
        str | None,
        Opt("Encoding of --items (utf-8, latin-1, …); default: by its text.", metavar="NAME", panel=_ITEMS),
    ] = None
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
