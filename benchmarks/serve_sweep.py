"""The parts of `benchmarks.serve` that ask rankings at rising rates: saturation, and what happens beyond it.

Saturation rate: the most answers per second that any rate of the sweep got, from the first arrival to the last answer,
where the highest rate offers more than that. Invariant: all configurations are asked the same rankings, each of a new
user, in the same number of seconds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Options, console, percentile, show
from benchmarks.serve_load import Plan, Sent, run_load
from benchmarks.serve_setup import Server, Serving, poisson, rankings, serving
from rcllm.sim.plots import COLOURS, label, new_figure, to_png

BOUND = 3.0  # of P90 over the unloaded P50, for the rate that a user would call usable
OVERLOAD = 3.0
SYSTEMS = {
    "full": "full recompute, causal ranker",
    "exact": "prefix caching, causal ranker",
    "auto": "auto, block-mask ranker",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How long the sweep is."""

    num_requests: int  # that differ
    unloaded: int  # one after the other, for the rate to begin with
    factors: tuple[float, ...]  # of the rates, times what one at a time comes to
    seconds: float  # of arrivals at one rate
    least: int  # arrivals at one rate, however low
    overload_s: float


FULL = Sizes(24, 6, (0.4, 0.7, 1.0, 2.0), 45, 12, 60)
QUICK = Sizes(4, 2, (0.7, 2.0), 12, 5, 15)


@dataclasses.dataclass(frozen=True)
class Point:
    """One rate of one configuration."""

    offered: float  # requests per second, as they arrived
    answered: float  # per second, until the last answer
    ttft_ms: tuple[float, float, float]  # P50, P90, P99, at the client
    count: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """One configuration."""

    unloaded_ms: float  # P50 of one at a time
    points: tuple[Point, ...]

    @property
    def saturation(self) -> float:
        return max(each.answered for each in self.points)

    @property
    def usable(self) -> float:
        """The highest rate whose P90 stays in bounds; 0 where none does."""
        return max((each.offered for each in self.points if each.ttft_ms[1] <= BOUND * self.unloaded_ms), default=0.0)

    @property
    def is_saturated(self) -> bool:
        last = self.points[-1]
        return last.offered > 1.15 * last.answered


def saturation(chosen: Options) -> dict[str, float]:
    """Three configurations of one server, rates swept until more is asked than is answered."""
    sizes, curves = QUICK if chosen.quick else FULL, dict[str, Curve]()
    blocks = Serving("blocks", chosen.requests or sizes.num_requests, chosen.seed)
    with serving(blocks) as server:
        asked, num_tokens = server.requests, server.num_tokens
        curves["auto"] = sweep(server, "auto", sizes, chosen.seed)
    with serving(dataclasses.replace(blocks, variant="causal", is_warm=False)) as server:
        server.requests = asked
        curves["exact"] = sweep(server, "exact", sizes, chosen.seed)
        beyond = dataclasses.replace(sizes, factors=sizes.factors[-1:])  # it is never quicker: where it ends is enough
        curves["full"] = sweep(server, "full", beyond, chosen.seed)
    console.print("[yellow]vLLM's CPU build is no part of this environment (3.4 GB, a torch of its own): not measured")
    _draw(curves, chosen.out.with_name("serve.png"))
    return {"saturation_prompt_tokens_p50": num_tokens, **_told(curves)}


def sweep(server: Server, level: str, sizes: Sizes, seed: int) -> Curve:
    unloaded = alone_s(server, level, sizes.unloaded)
    points = []
    for number, factor in enumerate(sizes.factors):
        rate = factor / unloaded
        count = max(sizes.least, round(rate * sizes.seconds))
        at_s = poisson(rate, count, seed + number)
        most_s = at_s[-1] + 5 * count * unloaded + 30  # five times slower than alone, before it is given up
        shots = rankings(server.requests, f"{level}-{number}", at_s, level=level)
        points.append(point(run_load(Plan(server.address, most_s, shots))))
        console.print(
            f"{SYSTEMS[level]}: {points[-1].offered:.2f} asked, {points[-1].answered:.2f} answered per second"
        )
    return Curve(unloaded * 1e3, tuple(points))


def alone_s(server: Server, level: str, count: int) -> float:
    """Seconds of a ranking that has the server to itself; what comes first allocates, and does not count."""
    lane = rankings(server.requests, f"{level}-alone", [0.0] * (count + 1), level=level)
    sent = run_load(Plan(server.address, 60.0 * (count + 1), lanes=(lane,)))
    return statistics.median(each.took_s for each in answered(sent)[1:])


def answered(sent: Sequence[Sent]) -> list[Sent]:
    """Raises RuntimeError where a request had another end than its answer."""
    if other := [each for each in sent if each.status != 200]:
        raise RuntimeError(f"{len(other)} of {len(sent)} requests were not answered; the first: {other[0]}")
    return list(sent)


def point(sent: Sequence[Sent]) -> Point:
    took_ms = [each.took_s * 1e3 for each in answered(sent)]
    first_s = min(each.at_s for each in sent)
    return Point(
        (len(sent) - 1) / (max(each.at_s for each in sent) - first_s),
        len(sent) / (max(each.at_s + each.took_s for each in sent) - first_s),
        (statistics.median(took_ms), percentile(took_ms, 0.9), percentile(took_ms, 0.99)),
        len(sent),
    )


def _told(curves: dict[str, Curve]) -> dict[str, float]:
    metrics, rows = dict[str, float](), list[list[str]]()
    for name, what in SYSTEMS.items():
        curve = curves[name]
        metrics |= {
            f"saturation_rate_{name}": curve.saturation,
            f"saturation_usable_rate_{name}": curve.usable,
            f"saturation_reached_{name}": curve.is_saturated,
            f"saturation_unloaded_ms_{name}": curve.unloaded_ms,
        }
        for number, each in enumerate(curve.points):
            at = f"saturation_{name}_{number}"
            metrics |= {f"{at}_offered": each.offered, f"{at}_answered": each.answered, f"{at}_count": each.count}
            metrics |= {f"{at}_p{p}_ms": ms for p, ms in zip((50, 90, 99), each.ttft_ms, strict=True)}
            row = [f"{each.offered:.2f}", f"{each.answered:.2f}", *(f"{ms:,.0f}" for ms in each.ttft_ms)]
            rows.append([what, str(each.count), *row])
    columns = ["configuration", "requests", "asked per s", "answered per s", "P50 ms", "P90 ms", "P99 ms"]
    show("Poisson arrivals, items warm, every user new", columns, rows)
    metrics["saturation_ratio_auto_vs_prefix"] = curves["auto"].saturation / curves["exact"].saturation
    metrics["saturation_ratio_auto_vs_full"] = curves["auto"].saturation / curves["full"].saturation
    return metrics


def _draw(curves: dict[str, Curve], path: Path) -> None:
    figure, axes = new_figure(2)
    for colour, (name, what) in zip(COLOURS, SYSTEMS.items(), strict=False):
        points = curves[name].points
        rates = [each.offered for each in points]
        axes[0].plot(rates, [each.answered for each in points], "o-", color=colour, label=what, markersize=4)
        for place, line in enumerate(("-", "--", ":")):
            axes[1].plot(rates, [each.ttft_ms[place] for each in points], line, color=colour, marker="o", markersize=3)
    least, most = min(rates), max(each.offered for curve in curves.values() for each in curve.points)
    axes[0].plot([least, most], [least, most], color="#9aa4ae", linewidth=1, linestyle=":", label="all that is asked")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    label(axes[0], "asked per second", "answered per second")
    label(axes[1], "asked per second", "time to first token, ms: P50 —, P90 - -, P99 ···")
    path.write_bytes(to_png(figure))


# ---- beyond saturation -----------------------------------------------------------------------------------------------


def overload(chosen: Options) -> dict[str, float]:
    """Three times what the server can answer, with deadlines: who is taken in is in time, the rest is told at once."""
    sizes = QUICK if chosen.quick else FULL
    with serving(Serving("blocks", chosen.requests or sizes.num_requests, chosen.seed)) as server:
        unloaded = alone_s(server, "auto", max(4, sizes.unloaded))
        burst = rankings(server.requests, "burst", [0.0] * 16, level="auto")
        rate = OVERLOAD * point(run_load(Plan(server.address, 300.0, burst))).answered
        deadline_s = 5 * unloaded
        at_s = poisson(rate, round(rate * sizes.overload_s), chosen.seed)
        shots = rankings(server.requests, "over", at_s, level="auto", deadline_ms=deadline_s * 1e3)
        sent = run_load(Plan(server.address, at_s[-1] + 60, shots))
    return _told_overload(sent, server.told, rate, deadline_s)


def _told_overload(sent: Sequence[Sent], told: Mapping[str, int], rate: float, deadline_s: float) -> dict[str, float]:
    refused = [each.took_s * 1e3 for each in sent if each.status == 429]
    done = [each for each in sent if each.status == 200]
    accepted = len(done) + told["expired"]  # what was taken in and lost its time in the queue is answered 503
    in_time = sum(each.took_s <= deadline_s for each in done)
    found = {
        "num_requests": len(sent),
        "rate": rate,
        "deadline_ms": deadline_s * 1e3,
        "accepted_share": accepted / len(sent),
        "in_time_share": in_time / max(accepted, 1),
        "degraded_share": sum(each.degraded for each in done) / max(len(done), 1),
        "late_p99_ms": percentile([max(0.0, each.took_s - deadline_s) * 1e3 for each in done], 0.99) if done else 0.0,
        "expired": told["expired"],
        "late_at_the_door": told["late"],  # 503 at once: even alone it would be late
        "other_ends": sum(each.status not in (200, 429, 503) for each in sent),
        "refusal_p50_ms": statistics.median(refused) if refused else 0.0,
        "refusal_p99_ms": percentile(refused, 0.99) if refused else 0.0,
    }
    title = f"{OVERLOAD:.0f} times the rate that saturates, with a deadline"
    show(title, ["", "value"], [[name, f"{value:,.3f}"] for name, value in found.items()])
    return {f"overload_{name}": value for name, value in found.items()}
