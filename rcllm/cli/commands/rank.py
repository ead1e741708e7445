"""The options of `rcllm rank`, `explain`, `bench ttft` and `probe position`."""

from __future__ import annotations

from typing import Annotated

from rcllm.annotated import Ge, Opt
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions, RankingOptions, Restart, StoreOptions
from rcllm.cli.spread import spread

Warm = Annotated[bool, Opt("Compute the blocks that the requests name first, outside the times.")]


@spread("rcllm.cli.rank:rank_command")
def rank(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    store: StoreOptions,
    requests: Annotated[str, Opt("Requests as JSON lines; - is stdin.", metavar="FILE|-", name="--in")],
    out: Annotated[str, Opt("Where answers go, as JSON lines; - is stdout.", metavar="FILE|-")] = "-",
    batch: Annotated[int, Ge(1), Opt("Requests that are computed together.")] = 1,
    warm: Warm = True,
    receipts: Annotated[bool, Opt("Add the whole receipt to each answer.")] = False,
    strict: Annotated[bool, Opt("Stop at the first bad row or request.")] = False,
    restart: Restart = False,
) -> None:
    """Rank the candidates of every request in a file.

    A request: `{"request_id": "r1", "candidates": ["a", "b"], "history": ["c", {"text": "my own words"}]}`. One that
    names `options` keeps those; the options here hold for what it leaves out. One that fails becomes a line with its
    error, and the others go on. `line` is the request's line in the file, `ms` the wall time of the answer's batch.
    Without --level, reuse goes as far as `rcllm calibrate` found that it may, and no further than exact where nothing
    was calibrated.

    Answers are written as they come. After an interruption, a kill or a full disk, the same command goes on after what
    --out holds, and tries again what failed; OUT.job.json beside it tells whether it is the same command.

    Ends with 0 when all requests were answered, 1 when one failed, 2 when an option is wrong, 130 when interrupted.

    Example: `rcllm rank --items items.jsonl --in requests.jsonl --out answers.jsonl --readout likelihood`
    """


@spread("rcllm.cli.rank:explain_command")
def explain(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    store: StoreOptions,
    request: Annotated[str, Opt("Requests as JSON lines; N is the line, else the first request.", metavar="FILE[:N]")],
    warm: Warm = True,
    top: Annotated[int, Ge(1), Opt("How many candidates to show.")] = 20,
) -> None:
    """Rank one request and show where every token came from, and why.

    With --no-warm the cache is empty, as in a process that has just started: blocks are then `computed`.

    Example: `rcllm explain --items items.jsonl --request requests.jsonl:3 --level "linked(4)" --allow-uncalibrated`
    """


Requests = Annotated[str | None, Opt("Requests as JSON lines; else made from --dataset.", metavar="FILE", name="--in")]


@spread("rcllm.cli.bench:ttft_command")
def ttft(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    requests: Requests = None,
    count: Annotated[int, Ge(1), Opt("How many requests.")] = 20,
    candidates: Annotated[int | None, Ge(1), Opt("Candidates per request made from --dataset; default 50.")] = None,
    history: Annotated[int | None, Ge(0), Opt("Events per request made from --dataset; default 20.")] = None,
    levels: Annotated[
        str, Opt("Reuse levels, between spaces; full and exact are always measured.", metavar="LEVELS")
    ] = "full exact linked(4) tail(0.1) blocks",
    seed: Annotated[int, Ge(0), Opt("Draws users and candidates.")] = 0,
    out: Annotated[str | None, Opt("Also write the figures here, as JSON.", metavar="FILE")] = None,
) -> None:
    """Time to first token of every reuse level, and how far off its answers are.

    The first token is here the scores, and far off means far from full recompute. One request at a time on a warm
    cache, all levels of a request before the next one. 20 requests tell times, not quality: for that, give hundreds.
    --level is ignored; --readout, --layout and --label-place hold for all levels.

    Example: `rcllm bench ttft --items items.jsonl --in requests.jsonl --levels "blocks tail(0.2)"`
    """


@spread("rcllm.cli.probe:position_command")
def position(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    requests: Requests = None,
    count: Annotated[int, Ge(1), Opt("How many requests.")] = 50,
    candidates: Annotated[int | None, Ge(2), Opt("Candidates per request made from --dataset; default 20.")] = None,
    history: Annotated[int | None, Ge(0), Opt("Events per request made from --dataset; default 10.")] = None,
    permutations: Annotated[int, Ge(1), Opt("Other orders of the candidates per request.")] = 8,
    seed: Annotated[int, Ge(0), Opt("Draws orders, users and candidates.")] = 0,
    out: Annotated[str | None, Opt("Write the JSON line here, not to stdout.", metavar="FILE")] = None,
) -> None:
    """How much of a score is the candidate, and how much its place.

    Ranks every request again under other orders of its candidates. Their KV is reused, so that an order costs its fresh
    tokens only. **share of order** is what order does to an item's score, within / (within + between) variance: 0 is a
    ranker that does not care, 1 one that looks at nothing else. Means by slot tell which places gain. Read-outs
    pointwise and likelihood score each candidate apart and come out at 0; for label, letters have a bias of their own.
    --level, --readout, --layout and --label-place hold for all requests, whatever options they name. The last line of
    stdout holds all figures as JSON.

    Example: `rcllm probe position --items items.jsonl --in requests.jsonl --permutations 8`
    """
