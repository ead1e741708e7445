"""The options of `rcllm calibrate`, `tune` and `pool build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from annotated_types import Ge

from rcllm.annotated import Of, Opt
from rcllm.cli.options import EngineOptions, ItemField, ItemOptions, TimeField, UserField
from rcllm.cli.spread import Without, spread
from rcllm.config import ModelConfig
from rcllm.core.ranking import LabelPlace, Layout, Negatives, Policy, Readout
from rcllm.fidelity.target import LEVELS, Target
from rcllm.prototypes.config import MemberContext, PrototypeConfig
from rcllm.tune.config import ExampleConfig, TuneConfig

_TRY, _ON, _LEARN, _DATA = "What to try (between spaces)", "On which requests", "What to learn", "From what"
_FROM = "From what"


@spread("rcllm.cli.calibrate:calibrate_command")
def calibrate(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    target: Target,
    requests: Annotated[
        str | None,
        Opt("Requests as JSON lines; else made from --dataset.", metavar="FILE", name="--in", panel=_ON),
    ] = None,
    count: Annotated[int, Ge(1), Opt("How many. 1,000 tell a loss of 0.01 in NDCG@10.", panel=_ON)] = 200,
    candidates: Annotated[int, Ge(1), Opt("Candidates per request made from --dataset.", panel=_ON)] = 20,
    history: Annotated[int, Ge(0), Opt("Events per request made from --dataset.", panel=_ON)] = 10,
    timed: Annotated[int, Ge(0), Opt("How many are also timed, one at a time.", panel=_ON)] = 10,
    seed: Annotated[int, Ge(0), Opt("Draws users, candidates, intervals.", panel=_ON)] = 0,
    levels: Annotated[
        str, Opt("Cheapest first: the first one tells the contexts.", metavar="LEVELS", panel=_TRY)
    ] = " ".join(LEVELS),
    readouts: Annotated[str, Opt(metavar="NAMES", panel=_TRY)] = " ".join(get_args(Readout)),
    layouts: Annotated[str, Opt(metavar="NAMES", panel=_TRY)] = " ".join(get_args(Layout)),
    label_places: Annotated[str, Opt(metavar="PLACES", panel=_TRY)] = " ".join(get_args(LabelPlace)),
    contexts: Annotated[
        str | None,
        Opt(
            "Canonical contexts; default --context, else none bos instruction, with --dataset typical mean(4).",
            metavar="NAMES",
            panel=_TRY,
        ),
    ] = None,
    policies: Annotated[
        str,
        Opt(
            f"Which tokens level corrected chooses: {', '.join(get_args(Policy))}.",
            metavar="NAMES",
            panel=_TRY,
        ),
    ] = "rcllm",
    out: Annotated[Path, Opt("The calibration; the report goes beside it (.html, .png).", metavar="FILE.json")] = Path(
        "fidelity.json"
    ),
) -> None:
    """Measure how far KV reuse may go for your model, template and requests, so that level auto can use it.

    Ranks real requests with full recompute and with reuse, coarse to fine: contexts first, then levels on what did
    best, then the best on all requests. What is measured is kept in FILE.records.jsonl: run it again with the same
    options to go on after an interruption, or with another target to judge the same figures by that. Hours on 2 cores
    for 1,000 requests and everything to try; name fewer --readouts, --layouts and --contexts to be done sooner.

    Example: `rcllm calibrate --dataset movielens --template titles --readouts pointwise --count 1000`, then
    `rcllm rank --dataset movielens --template titles --readout pointwise --in requests.jsonl`
    """


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
    format: Annotated[str, Opt("Format of the data sets.", metavar="NAME", panel=_DATA)] = "auto",
    *,
    columns: ColumnOptions,
) -> None:
    """Teach a language model to rank: LoRA with a listwise loss on interactions of training users.

    Run it again with the same options to go on after an interruption. It stops early when validation users gain nothing
    more; OUT/best is the best adapter so far, in peft's format, with a record of how it was made. Hours on 2 cores for
    the bundled model.

    Example: `rcllm tune --dataset movielens --mask blocks --start adapters/smollm2-135m-causal --out rankers/films`,
    then `rcllm rank --adapter rankers/films/best --template echo --readout pointwise …`
    """


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where the texts come from."""

    texts: Annotated[
        Path | None,
        Opt(
            "Texts instead of --dataset: a .txt with one a line, or rows (.jsonl, .csv, .parquet) with text and, "
            "optionally, user_id.",
            metavar="FILE",
            panel=_FROM,
        ),
    ] = None
    reviews: Annotated[bool, Opt("Users' own words instead of items' titles.", panel=_FROM)] = False
    history: Annotated[int, Ge(1), Opt("Events of a user: the last so many, as in requests.", panel=_FROM)] = 10
    limit: Annotated[int | None, Ge(1), Opt("Users, at most.", panel=_FROM)] = None
    exclude_users: Annotated[
        Path | None, Opt("User ids, one a line, whose texts are left out.", metavar="FILE", panel=_FROM)
    ] = None


@dataclass(frozen=True, slots=True)
class MemberOptions:
    """What depends on the model where it is not given."""

    member_context: Annotated[MemberContext | None, Of(PrototypeConfig, "member_context")] = None


@spread("rcllm.cli.pool:build_command")
def pool_build(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    texts: TextOptions,
    prototypes: Annotated[PrototypeConfig, Without(("member_context",))],
    member: MemberOptions,
    out: Annotated[Path, Opt("Where the pool goes; OUT.work beside it while it grows.", metavar="FILE")],
) -> None:
    """Build the semantic history pool: RcLLM's token prototypes, with K and V of every layer, shared by all users.

    Run it again with the same options to go on after an interruption. Numbers, ids, timestamps, delimiters and field
    names never get into it. Prototypes are made of users' texts: to erase a user, build it again with --exclude-users.
    Of a data set, training users alone are used.

    Example: `rcllm pool build --dataset movielens --out history.pool`, or
    `rcllm pool build --texts reviews.jsonl --prototypes 20000 --out history.pool`
    """
