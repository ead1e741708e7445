"""The parts of `benchmarks.serve` that ask for everything at once: rankings beside searches and texts, and a soak.

`mixed` has paper-shaped rankings at a fixed rate, alone and beside one search and one text that are always under way.
`soak` has what real clients do: they hang up, send nonsense, change items, erase users; the real model, with prompts as
short as the ranker was tuned on, and a pool that is full within the first minute. Invariant: nothing here is timed that
`serve_load` did not see from outside, but the server's memory.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, percentile, show
from benchmarks.serve_load import Plan, Sent, Shot, run_load
from benchmarks.serve_setup import Server, Serving, poisson, ranking, rankings, serving
from benchmarks.serve_sweep import alone_s, answered
from rcllm.config import ScheduleConfig, for_serving
from rcllm.core.ranking import RankRequest

OTHER_ROWS = (32, 64, 128)  # what a server has by default is measured first, the others beside it
BUSY = 0.25  # of the time that rankings take, were each alone
_NONSENSE = ("{", "[]", '{"candidates": 3}', '{"candidates": ["no such item"]}', '{"candidates": [], "level": "none"}')


def mixed(chosen: Options) -> dict[str, float]:
    """P99 of rankings beside other work over that of rankings alone, at one rate; and what bounds it."""
    default = for_serving(ScheduleConfig()).other_rows
    metrics, rows = dict[str, float](), list[list[str]]()
    at_s, alone = list[float](), list[float]()
    for other_rows in (default,) if chosen.quick else dict.fromkeys((default, *OTHER_ROWS)):
        serves = Serving("blocks", 4 if chosen.quick else 24, chosen.seed, other_rows=other_rows, recommends=True)
        with serving(serves) as server:
            at_s = at_s or _arrivals(server, chosen)
            alone = alone or _alone(server, at_s)  # is the same whatever bounds the others
            beside = _beside(server, at_s)
        at = "" if other_rows == default else f"_{other_rows}"
        times = {"beside": _rankings_of(beside)} | ({} if at else {"alone": alone})
        for name, some in times.items():
            metrics |= {f"mixed_{name}_p{p}_ms{at}": percentile(some, p / 100) for p in (50, 90, 99)}
            row = [f"{percentile(some, share):,.0f}" for share in (0.5, 0.9, 0.99)]
            rows.append([f"{name}, other_rows {other_rows}", str(len(some)), *row])
        others = Counter(each.path for each in beside if each.in_lane)
        metrics |= {f"mixed_{path.rpartition('/')[2]}_answered{at}": count for path, count in others.items()}
        for p in (50, 90, 99):
            share = p / 100
            metrics[f"mixed_rank_p{p}_ratio{at}"] = percentile(times["beside"], share) / percentile(alone, share)
    show("Rankings, Poisson arrivals", ["", "rankings", "P50 ms", "P90 ms", "P99 ms"], rows)
    return metrics


def _arrivals(server: Server, chosen: Options) -> list[float]:
    """Seconds."""
    rate = BUSY / alone_s(server, "auto", 4)
    return poisson(rate, chosen.requests or (16 if chosen.quick else 150), chosen.seed)


def _alone(server: Server, at_s: Sequence[float]) -> list[float]:
    """Milliseconds."""
    shots = rankings(server.requests, "alone", at_s, level="auto")
    return _rankings_of(run_load(Plan(server.address, _most_s(at_s), shots)))


def _beside(server: Server, at_s: Sequence[float]) -> list[Sent]:
    """What became of all requests where a search and a text are always under way."""
    lanes = _searches(server.requests), _texts(server.requests)
    run_load(Plan(server.address, 300.0, lanes=tuple(lane[:1] for lane in lanes)))  # the first of each allocates
    shots = rankings(server.requests, "beside", at_s, level="auto")
    return answered(run_load(Plan(server.address, _most_s(at_s), shots, lanes)))


def _most_s(at_s: Sequence[float]) -> float:
    return 3 * at_s[-1] + 120


def _rankings_of(sent: Sequence[Sent]) -> list[float]:
    return [each.took_s * 1e3 for each in answered(sent) if not each.in_lane]


def _searches(requests: Sequence[RankRequest]) -> tuple[Shot, ...]:
    """Of 32 beams, over histories whose events are cached."""
    bodies = [
        {"history": [e.item_id for e in each.history], "n": 10, "beam": 32, "level": "blocks"} for each in requests
    ]
    return tuple(Shot(json.dumps(body), path="/v1/recommend") for body in bodies)


def _texts(requests: Sequence[RankRequest]) -> tuple[Shot, ...]:
    """Of 24 tokens, after prompts of some 60."""
    prompts = [f"A customer bought {', '.join(e.item_id or '' for e in each.history)}. Next," for each in requests]
    return tuple(Shot(json.dumps(_text(prompt)), path="/v1/completions") for prompt in prompts)


def _text(prompt: str, num_tokens: int = 24) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0}


# ---- soak ------------------------------------------------------------------------------------------------------------


def soak(chosen: Options) -> dict[str, float]:
    """Minutes of everything that clients do, at nearly the rate that the server can answer."""
    seconds = 60 if chosen.quick else 600
    memory = _Memory()
    with serving(Serving("blocks", 40, chosen.seed, is_long=False, pool_mb=400)) as server:
        took_s = alone_s(server, "auto", 6)
        shots = _everything(server.requests, 0.8 / took_s, seconds, chosen.seed)
        memory.pid = server.process.pid
        sent = run_load(Plan(server.address, seconds + 120, shots), memory.look)
    settled = memory.seen[len(memory.seen) // 10 if seconds >= 600 else len(memory.seen) // 2 :]
    first, last = (statistics.median(some) for some in (settled[:5], settled[-5:]))
    by_status = Counter("left" if each.has_left else str(each.status) for each in sent)
    broken = [each for each in sent if each.status is not None and each.status >= 500 and each.status != 503]
    lost = [each for each in sent if each.status is None and not each.has_left]
    metrics = {
        "soak_seconds": seconds,
        "soak_requests": len(sent),
        "soak_5xx": len(broken),
        "soak_503": by_status["503"],
        "soak_lost": len(lost) + server.told["unanswered"] + server.told["under_way"],
        "soak_left": by_status["left"],
        "soak_pass_failures": server.told["failures"],
        "soak_evictions": server.told["evictions"],
        "soak_rss_mb": last,
        "soak_rss_growth": last / first - 1,
    }
    rows = [[name, f"{value:,.3f}"] for name, value in metrics.items()]
    show("Soak", ["", "value"], rows + [[f"status {name}", str(count)] for name, count in sorted(by_status.items())])
    return metrics


class _Memory:
    """What the server's process holds of its own, in MB, second by second."""

    def __init__(self) -> None:
        self.pid, self.seen = 0, list[float]()

    def look(self) -> None:
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        self.seen.append(next(int(line.split()[1]) / 1024 for line in status.splitlines() if "RssAnon" in line))


def _everything(requests: Sequence[RankRequest], rate: float, seconds: float, seed: int) -> tuple[Shot, ...]:
    """Of a hundred requests 70 are rankings, of which 8 hang up and 8 have a deadline; the rest is everything else."""
    draw, shots = np.random.default_rng(seed), list[Shot]()
    for number, at_s in enumerate(poisson(rate, round(rate * seconds), seed)):
        request = requests[int(draw.integers(len(requests)))]
        shots.append(_one(int(draw.integers(100)), number, at_s, request))
    return tuple(shots)


def _one(kind: int, number: int, at_s: float, request: RankRequest) -> Shot:
    item = request.candidates[number % len(request.candidates)]
    asked = ranking(request, f"soak-{number}", at_s)
    if kind < 8:
        return Shot(asked.body, at_s, leave_s=0.005 * (1 + number % 20))
    if kind < 16:
        return ranking(request, f"soak-{number}", at_s, deadline_ms=50.0 * (1 + number % 10))
    if kind < 70:
        return asked
    if kind < 76:
        return Shot(_NONSENSE[number % len(_NONSENSE)], at_s)
    if kind < 84:
        body = json.dumps({"fields": {"title": f"Item anew, number {number}", "categories": "Tests"}})
        return Shot(body, at_s, f"/v1/items/{item}", "PUT")
    if kind < 92:
        return Shot("", at_s, f"/v1/users/soak-{max(0, number - 10)}", "DELETE")
    leave_s = 0.05 if kind < 94 else None
    return Shot(json.dumps(_text(f"{item}: number {number} is", 12)), at_s, "/v1/completions", leave_s=leave_s)
