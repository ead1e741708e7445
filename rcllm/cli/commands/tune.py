"""The options of `rcllm tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Of, Opt
from rcllm.cli.options import ItemField, TimeField, UserField
from rcllm.cli.spread import spread
from rcllm.config import ModelConfig
from rcllm.core.requests import Negatives
from rcllm.tune.config import ExampleConfig, TuneConfig

_LEARN, _DATA, _TEACH = "What to learn", "From what", "From a teacher"


@dataclass(frozen=True, slots=True)
class ShapeOptions:
    """The shape of the prompts, where it is not the one that suits the mask."""

    candidates: Annotated[int | None, Of(ExampleConfig, "num_candidates")] = None
    history: Annotated[int | None, Of(ExampleConfig, "num_history")] = None
    negatives: Annotated[tuple[Negatives, ...], Of(ExampleConfig, "negatives")] = ()


@dataclass(frozen=True, slots=True)
class ColumnOptions:
    """What the columns of interactions are called."""

    user_field: UserField = None
    item_field: ItemField = None
    time_field: TimeField = None


@spread("rcllm.cli.tune:tune_command")
def tune(
    dataset: Annotated[
        tuple[Path, ...],
        Opt(
            "Interaction data; may repeat. Ids are prefixed by the folder's name. movielens is fetched once.",
            metavar="FOLDER|movielens",
            panel=_DATA,
        ),
    ],
    out: Annotated[Path, Opt("Where the adapter and its checkpoint go.", metavar="FOLDER")],
    config: TuneConfig,
    shape: ShapeOptions,
    model: Annotated[str, Opt("The model to adapt.", metavar="NAME|FOLDER")] = ModelConfig().path,
    template: Annotated[
        str | None,
        Opt("Prompt template to learn for; default: titles, and echo under the mask blocks.", metavar="NAME|FILE"),
    ] = None,
    start: Annotated[
        Path | None,
        Opt("An adapter to go on from, for example under another mask.", metavar="FOLDER", panel=_LEARN),
    ] = None,
    teacher: Annotated[
        Path | None,
        Opt(
            "A ranker's adapter, whose scores are learnt instead of labels: so a ranker is converted to another mask. "
            "Computed once, and kept in OUT.",
            metavar="FOLDER",
            panel=_TEACH,
        ),
    ] = None,
    teacher_template: Annotated[
        str | None,
        Opt("The teacher's prompt template; default: the one in its record.", metavar="NAME|FILE", panel=_TEACH),
    ] = None,
    requests: Annotated[
        Path | None,
        Opt(
            "A log of requests, as for `rcllm rank`, to learn from instead of lists made of interactions; its items "
            "are those of the one --dataset. With a teacher it needs no positive.",
            metavar="FILE",
            panel=_DATA,
        ),
    ] = None,
    format: Annotated[str, Opt("Format of the data sets.", metavar="NAME", panel=_DATA)] = "auto",
    *,
    columns: ColumnOptions,
) -> None:
    """Teach a language model to rank: LoRA with a listwise loss on interactions.

    Learns from training users alone. Run it again with the same options to go on after an interruption. It stops early
    when validation users gain nothing more; OUT/best is the best adapter so far by NDCG@10, with a teacher by Kendall's
    tau with it, in peft's format, with a record of how it was made. Hours on 2 cores for the bundled model.

    Example: `rcllm tune --dataset movielens --mask blocks --start adapters/smollm2-135m-causal --out rankers/films`,
    then `rcllm rank --adapter rankers/films/best --template echo --readout pointwise …`
    """
