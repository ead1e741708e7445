"""The options of `rcllm enrich`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Opt
from rcllm.cli.options import ItemOptions
from rcllm.cli.spread import spread
from rcllm.core.enrichment import NeighbourConfig

_FIELDS = "Which fields"


@dataclass(frozen=True, slots=True)
class FieldOptions:
    """What is put into the items beside `chosen` and `neighbours`."""

    knowledge: Annotated[
        Path | None,
        Opt("What `rcllm describe` wrote of the items, as field `knowledge`.", metavar="FILE.parquet", panel=_FIELDS),
    ] = None
    interactions_only: Annotated[
        bool,
        Opt("Give an item without interactions no neighbours, instead of those nearest in text.", panel=_FIELDS),
    ] = False
    encoder: Annotated[
        Path | None,
        Opt(
            "Sentence encoder (BERT, mean pooling) for these; default all-MiniLM-L6-v2, fetched once (84 MB).",
            metavar="FOLDER",
            panel=_FIELDS,
        ),
    ] = None


@spread("rcllm.cli.enrich:enrich_command")
def enrich(
    out: Annotated[Path, Opt("The catalogue to write, an item per row.", metavar="FILE.jsonl")],
    config: NeighbourConfig,
    field_options: FieldOptions,
    item_options: ItemOptions,
) -> None:
    """Put into each item's text what interactions and a language model know of it.

    Fields `chosen` and `neighbours` are made of training users alone. Run it again after new interactions: a list stays
    until another is clearly better, so that few items, and few cached blocks, change. What it keeps for that stands in
    FILE.kept beside the output; killed, it goes on with what is there.

    Example: `rcllm enrich --dataset movielens --out films.jsonl`, then `rcllm warm --items films.jsonl --dataset
    movielens --template echo_enriched …`
    """
