"""The options of `rcllm calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

from rcllm.annotated import Ge, Opt
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.spread import spread
from rcllm.core.requests import LabelPlace, Layout, Policy, Readout
from rcllm.fidelity.target import LEVELS, Target

_TRY, _ON = "What to try (between spaces)", "On which requests"


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
    candidates: Annotated[
        int | None, Ge(1), Opt("Candidates per request made from --dataset; default 20.", panel=_ON)
    ] = None,
    history: Annotated[int | None, Ge(0), Opt("Events per request made from --dataset; default 10.", panel=_ON)] = None,
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
    cluster: Annotated[
        str | None,
        Opt(
            "Measure with several processes on Ray: local:N on this machine, or a file that is the whole "
            "configuration, with a section [cluster]. What is timed is timed by one.",
            metavar="local:N|FILE",
        ),
    ] = None,
) -> None:
    """Measure how far KV reuse may go before answers change.

    For your model, template and requests; level auto then goes that far. Ranks real requests with full recompute and
    with reuse, coarse to fine: contexts first, then levels on what did best, then the best on all requests. What is
    measured is kept in FILE.records.jsonl: run it again with the same options to go on after an interruption, or with
    another target to judge the same figures by that. Hours on 2 cores for 1,000 requests and everything to try; name
    fewer --readouts, --layouts and --contexts to be done sooner.

    Example: `rcllm calibrate --dataset movielens --template titles --readouts pointwise --count 1000`, then
    `rcllm rank --dataset movielens --template titles --readout pointwise --in requests.jsonl`
    """
