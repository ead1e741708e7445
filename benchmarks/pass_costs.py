"""What does a request cost this machine, as a function of the rows that it computes and the cached KV that it reads?

Regime: one ranking at a time, SmolLM2-135M in fp32 on the CPU, prompts of 5 to 20 candidates, every reuse level, items
warm and cold. Each warm request is measured in two rounds, a minute apart, and the fastest counts: what else a machine
does makes requests slower, never faster. Each request is a point for the simulator's cost model (`rcllm sim --costs
FILE`): seconds = fixed + rows · a + pairs · b + bytes of cached KV · c, fitted here by least squares of relative
errors. The shapes are those that `rcllm.sim.demand` counts, so that model and measurement speak of the same thing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict

from benchmarks.harness import console, dataset, options, report, show, timed
from rcllm.config import CacheConfig, Config
from rcllm.core.ranking import Prompt, RankResponse
from rcllm.core.receipts import BlockKind
from rcllm.core.requests import Level, RankOptions, RankRequest, UserId
from rcllm.data import build_requests
from rcllm.engine.engine import Engine
from rcllm.sim.cost import Fitted, Point, fit
from rcllm.sim.demand import Reuse, There, Tokens, demand

QUESTION = "Milliseconds of a ranking by rows, pairs, cached KV and missing tokens, and a cost model fitted to them"
SIZES = (5, 10, 20)  # candidates
ROUNDS = 2
LEVELS = ("blocks", "linked(4)", "linked(16)", "tail(0.1)", "tail(0.3)", "exact", "full")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One request at one level."""

    level: str
    num_tokens: int
    missing: int  # tokens of blocks that were built for it
    point: Point


def main() -> None:
    chosen = options("pass_costs", QUESTION)
    data = dataset("amazon_scientific")
    engine = Engine.build(data.catalogue, Config(cache=CacheConfig(pool_mb=6000)))
    requests = [
        request
        for size in SIZES
        for request in build_requests(data, 1 if chosen.quick else 2, num_candidates=size, num_history=6, seed=size)
    ]
    found = [[each for request in requests for each in measure(engine, request, number)] for number in range(ROUNDS)]
    cold, warm = [each for each in found[0] if each.missing], [_warm(some) for some in found]
    measured = cold + [min(same, key=lambda each: each.point.seconds) for same in zip(*warm, strict=True)]
    fitted = fit([each.point for each in measured])
    show_points(measured, fitted)
    report("pass_costs", QUESTION, chosen, {**metrics(fitted), **flat_points([each.point for each in measured])})


def measure(engine: Engine, request: RankRequest, number: int) -> list[Measured]:
    """The request at every level, each time of a new user; in the first round also with items that nobody asked for."""
    found = []
    for place, level in enumerate(("blocks", *LEVELS)):
        user = UserId(f"{request.user_id}/{number}/{place}")
        asked = dataclasses.replace(request, user_id=user, options=RankOptions(level=Level.parse(level)))
        took, answer = timed(engine.rank, asked)
        if place or answer.receipt.num_computed:
            found.append(_measured(engine, asked, answer, took))
    return found


def _warm(measured: list[Measured]) -> list[Measured]:
    return [each for each in measured if not each.missing]


def _measured(engine: Engine, request: RankRequest, answer: RankResponse, seconds: float) -> Measured:
    assert request.options is not None
    tokens = _tokens(engine.prompter.build(request))
    built = [block.num_reused for block in answer.receipt.blocks if block.source == "computed"]
    there = There(sum(tokens.items) - sum(built), built, history=True)
    spec = engine.decoder.spec
    found = demand(tokens, there, Reuse(request.options.level), spec, spec.kv_bytes_per_token(4))
    return Measured(str(request.options.level), tokens.total, sum(built), Point(found.shape, seconds))


def _tokens(prompt: Prompt) -> Tokens:
    """Events of a history that name an item are read as items are, so they count as such here."""
    sizes = defaultdict[BlockKind, list[int]](list)
    for block in prompt.blocks:
        sizes[block.kind].append(len(block))
    read = (*sizes[BlockKind.HISTORY], *sizes[BlockKind.ITEM])
    fresh = sum(sizes[BlockKind.LABEL]) + sum(sizes[BlockKind.QUESTION])
    return Tokens(sum(sizes[BlockKind.INSTRUCTION]), 0, read, fresh)


def show_points(measured: list[Measured], fitted: Fitted) -> None:
    rows = []
    for level in dict.fromkeys((each.level, each.missing > 0) for each in measured):
        some = [each for each in measured if (each.level, each.missing > 0) == level]
        shapes = [each.point.shape for each in some]
        errors = [fitted.pass_s(each.point.shape) / each.point.seconds - 1 for each in some]
        rows.append(
            [
                level[0] + (", cold" if level[1] else ""),
                f"{statistics.median(each.num_tokens for each in some):.0f}",
                f"{statistics.median(shape.rows for shape in shapes):.0f}",
                f"{statistics.median(each.missing for each in some):.0f}",
                f"{statistics.median(shape.kv_bytes for shape in shapes) / 1e6:.1f}",
                f"{statistics.median(each.point.seconds for each in some) * 1e3:.0f}",
                f"{statistics.median(errors):+.1%}",
            ]
        )
    columns = ["level", "tokens", "rows", "missing", "KV MB", "ms", "fitted"]
    show(f"{len(measured)} requests, medians", columns, rows)
    console.print(
        f"fitted: {fitted.overhead_s * 1e3:.1f} ms + {fitted.row_s * 1e6:.0f} µs a row + "
        f"{fitted.pair_s * 1e9:.1f} ns a pair + {fitted.byte_s * 1e12:.0f} ps a byte; "
        f"residual {fitted.residual:.1%}, worst {fitted.worst:.1%}"
    )


def metrics(fitted: Fitted) -> dict[str, float]:
    """Units are chosen so that six decimals hold the figures."""
    return {
        "overhead_ms": fitted.overhead_s * 1e3,
        "us_per_row": fitted.row_s * 1e6,
        "ns_per_pair": fitted.pair_s * 1e9,
        "ps_per_kv_byte": fitted.byte_s * 1e12,
        "residual": fitted.residual,
        "worst": fitted.worst,
    }


def flat_points(points: list[Point]) -> dict[str, float]:
    """As `rcllm.sim.cost.read_points` reads them."""
    flat: dict[str, float] = {"num_points": len(points)}
    for number, point in enumerate(points):
        shape = point.shape
        values = {"rows": shape.rows, "pairs": shape.pairs, "kv_bytes": shape.kv_bytes, "ms": point.seconds * 1e3}
        flat |= {f"point_{number}_{name}": value for name, value in values.items()}
    return flat


if __name__ == "__main__":
    main()
