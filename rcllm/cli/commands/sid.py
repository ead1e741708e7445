"""The options of `rcllm sid build` and `rcllm sid train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Ge, Of, Opt
from rcllm.cli.options import IdField, ItemField, TimeField, UserField
from rcllm.cli.spread import Without, spread
from rcllm.sid.config import BuildConfig, CodeConfig, NetworkConfig, SequenceConfig, TrainConfig

_DATA, _CODES = "From what", "Which codes"


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where items and interactions come from."""

    items: Annotated[
        Path | None, Opt("Catalogue (.jsonl, .csv, .parquet): an item per row.", metavar="FILE", panel=_DATA)
    ] = None
    interactions: Annotated[
        Path | None,
        Opt(
            "Rows of user_id, item_id and timestamp, or of user_id and items, oldest first. Of them, training users "
            "alone are learnt from.",
            metavar="FILE",
            panel=_DATA,
        ),
    ] = None
    dataset: Annotated[
        Path | None,
        Opt("Both of them, instead of the files; movielens is fetched once.", metavar="FOLDER|movielens", panel=_DATA),
    ] = None
    format: Annotated[str, Opt("Format of the data set; auto tells it.", metavar="NAME", panel=_DATA)] = "auto"
    id_field: IdField = None
    user_field: UserField = None
    item_field: ItemField = None
    time_field: TimeField = None


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """What is quantised."""

    embeddings: Annotated[
        Path | None,
        Opt(
            "[items, d] in the order of the catalogue, instead of embeddings of the items' texts.",
            metavar="FILE.npy",
            panel=_CODES,
        ),
    ] = None
    encoder: Annotated[
        Path | None,
        Opt(
            "Sentence encoder (BERT, mean pooling); default all-MiniLM-L6-v2, fetched once (84 MB).",
            metavar="FOLDER",
            panel=_CODES,
        ),
    ] = None
    field: Annotated[
        tuple[str, ...], Opt("Field to embed; may repeat. Default: all.", metavar="NAME", panel=_CODES)
    ] = ()
    max_tokens: Annotated[int, Ge(2), Opt("Longer texts are cut before they are embedded.", panel=_CODES)] = 128


@dataclass(frozen=True, slots=True)
class LevelOptions:
    """What depends on the catalogue where it is not given."""

    levels: Annotated[int | None, Of(CodeConfig, "levels")] = None
    size: Annotated[int | None, Of(CodeConfig, "size")] = None


@spread("rcllm.cli.sid:build_command")
def build(
    source: SourceOptions,
    vectors: VectorOptions,
    config: BuildConfig,
    out: Annotated[Path, Opt("codes.parquet, or index.json as LC-Rec writes it.", metavar="FILE")],
    level: LevelOptions,
    shape: Annotated[CodeConfig, Without(("levels", "size"))],
) -> None:
    """Give every item its semantic ID, by its text and by who touched it.

    Residual k-means over embeddings of both. Items that would share an ID are told apart in the last level. Of
    interactions, training users alone are used.

    Example: `rcllm sid build --items items.jsonl --interactions users.jsonl --out codes.parquet`
    """


@spread("rcllm.cli.sid:train_command")
def train(
    source: SourceOptions,
    codes: Annotated[Path, Opt("Of `rcllm sid build`, or an index.json.", metavar="FILE")],
    out: Annotated[Path, Opt("Where model and checkpoint go.", metavar="FOLDER")],
    schedule: TrainConfig,
    sequences: SequenceConfig,
    network: NetworkConfig,
) -> None:
    """Train a small decoder that continues a history with the ID of the next item.

    OUT is a Hugging Face folder (Qwen3) with the catalogue inside model.safetensors; serve it with `rcllm recommend`.
    Run it again with the same options to go on after an interruption. It stops early when validation users gain nothing
    more. Minutes on 2 cores for some thousand users. Serve it with histories of at most --history items: it has seen no
    longer ones.

    Example: `rcllm sid train --items items.jsonl --interactions users.jsonl --codes codes.parquet --out model`
    """
