"""The options of `rcllm recommend`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Ge, Of, Opt
from rcllm.cli.options import EngineOptions, ItemOptions, Restart, StoreOptions
from rcllm.cli.spread import spread
from rcllm.core.decoding import STYLE, RecommendRequest
from rcllm.core.requests import BeamRule

_HOW = "What to recommend"


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What holds for requests that do not say so themselves."""

    n: Annotated[int, Of(RecommendRequest, "n")] = RecommendRequest("").n
    beam: Annotated[int, Of(RecommendRequest, "beam")] = RecommendRequest("").beam
    rule: Annotated[BeamRule, Of(RecommendRequest, "rule")] = RecommendRequest("").rule
    knn: Annotated[float | None, Of(RecommendRequest, "knn")] = RecommendRequest("").knn


@spread("rcllm.cli.recommend:recommend_command")
def recommend(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    store: StoreOptions,
    requests: Annotated[str, Opt("Requests as JSON lines; - is stdin.", metavar="FILE|-", name="--in")],
    search: SearchOptions,
    out: Annotated[str, Opt("Where answers go, as JSON lines; - is stdout.", metavar="FILE|-")] = "-",
    allow: Annotated[Path | None, Opt("Only these items: an id per line.", metavar="FILE", panel=_HOW)] = None,
    deny: Annotated[Path | None, Opt("None of these items: an id per line.", metavar="FILE", panel=_HOW)] = None,
    unseen: Annotated[bool, Opt("None of the items in the user's history.", panel=_HOW)] = False,
    codes: Annotated[
        Path | None,
        Opt(
            "Semantic IDs of items (.parquet, or an index.json as of LC-Rec), for a model that was not made by "
            "`rcllm sid train`. Needs --template.",
            metavar="FILE",
            panel=_HOW,
        ),
    ] = None,
    style: Annotated[str, Opt("How the model's vocabulary writes a code.", metavar="TEXT", panel=_HOW)] = STYLE,
    batch: Annotated[int, Ge(1), Opt("Requests that are taken at once.")] = 16,
    explain: Annotated[bool, Opt("Add the receipt to each answer, and show the first answer as a table.")] = False,
    strict: Annotated[bool, Opt("Stop at the first bad row or request.")] = False,
    restart: Restart = False,
) -> None:
    """Recommend from the whole catalogue: a model generates semantic IDs.

    A request: `{"request_id": "r1", "history": ["a", "b"]}`; it may bring its own `n`, `beam`, `rule`, `allow` and
    `deny` (which adds to --deny). An answer holds only items that exist and are allowed; fewer than n where fewer are.
    A request that fails becomes a line with its error, and the others go on.

    Answers are written as they come. After an interruption, a kill or a full disk, the same command goes on after what
    --out holds, and tries again what failed; OUT.job.json beside it tells whether it is the same command.

    Ends with 0 when all requests were answered, 1 when one failed, 2 when an option is wrong, 130 when interrupted.

    --model is a folder that `rcllm sid train` made; its catalogue is inside. Example:

    `rcllm recommend --model decoder --in requests.jsonl --out answers.jsonl --n 10 --beam 128 --unseen
    --deny sold-out.txt`
    """
