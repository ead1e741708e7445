"""The part `simulated` of `benchmarks.cluster`: the same requests, arrivals, placement and policy, run and simulated.

The cost of a pass is fitted to requests that are asked one at a time before the loads of the first route, and what a
request spends outside of passes is the rest of their time, which is taken for work of one core. Then two are asked at a
time: by how much their passes are slower, one node slows down the other. Cores are shared by all that runs at once.
A machine that others share is not always as fast: before and after each load some are asked one at a time again, and
costs are as much higher as these took longer. Nothing is fitted to the loads themselves.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.cluster_setup import (
    KV_DTYPE_BYTES,
    Items,
    Reply,
    arrivals,
    ask,
    ask_at_rate,
    ask_steadily,
    pool_bytes,
    served,
)
from benchmarks.harness import Options, console, percentile, show
from rcllm.cluster.route import make_route
from rcllm.cluster.view import FixedHoldings
from rcllm.config import num_usable_cores
from rcllm.core.requests import Level
from rcllm.sim.cluster import Simulation
from rcllm.sim.cost import Fitted, Point, fit
from rcllm.sim.demand import Reuse, There, Tokens, demand
from rcllm.sim.hardware import find_model
from rcllm.sim.outcome import Answered
from rcllm.sim.spec import ClusterSpec
from rcllm.sim.workload import SimRequest

USE = (0.15, 0.3, 0.45)  # of both nodes, by their passes alone and at their pace when alone: the three loads
ROUTES = ("round_robin", "ttft")
COPIES = 1.33
_MODEL = find_model("smollm2-135m")
_PER_TOKEN = _MODEL.kv_bytes_per_token(KV_DTYPE_BYTES)
_REUSE = Reuse(Level("blocks"))
_PASS_STAGES = ("plan", "materialise", "select", "assemble", "forward", "publish", "read", "reply")
_SIZES = (1, 2, 4, 8, 12, 16)  # candidates of the requests that costs are fitted to
_RATED = 9  # requests whose passes say what the rates of the loads are
_FIRST = 20  # requests of a load that do not count
_PASS_ROWS = 2048
_IDLE_S = 5.0  # in which nobody asks
_APART_S = 10.0  # in the simulation, between requests of which no two were under way


@dataclass(frozen=True)
class Costed:
    """What was measured before the loads."""

    fitted: Fitted
    outside_s: float  # of a request, beside its pass
    cores: float  # of the machine, less what the cluster keeps busy while nobody asks
    crowding: float  # by how much a node that computes slows the other one down

    def at(self, pace: float) -> Costed:
        """On a machine that takes `pace` times as long."""
        fitted = self.fitted
        slower = {name: getattr(fitted, name) * pace for name in ("overhead_s", "row_s", "pair_s", "byte_s")}
        return replace(self, fitted=replace(fitted, **slower), outside_s=self.outside_s * pace)


def simulated(chosen: Options) -> dict[str, float]:
    """Two replicas of one core each at three loads: times that were measured beside those that were simulated."""
    figures: dict[str, float] = {}
    costed: Costed | None = None  # of the machine, whatever the route; `ttft` seldom lets two passes run side by side
    for route in ROUTES[:1] if chosen.quick else ROUTES:
        costed, found = _by(route, chosen, costed)
        figures |= {f"simulated_{route}_{name}": each for name, each in found.items()}
    return figures


def _by(route: str, chosen: Options, costed: Costed | None = None) -> tuple[Costed, dict[str, float]]:
    """`costed`: measured before, else here."""
    num_requests = chosen.requests or (60 if chosen.quick else 500)
    items = Items(60 if chosen.quick else 120, chosen.seed)
    bodies = items.bodies(num_requests, 1)
    with served(items, 2, COPIES, route=route, peers=False) as client:
        trials = _tried(client, items, 60 if chosen.quick else 100)
        costed, before = costed or _cost_of(trials), [*trials.alone, *trials.both]
        paced = [_alone(client, bodies)]
        mean_s = statistics.median(costed.fitted.pass_s(_shape_of(reply)) for reply in paced[0])
        rates, measured = [use * 2 / mean_s for use in USE], list[list[Reply]]()
        for rate in rates:
            measured.append(ask_at_rate(client, bodies, rate, chosen.seed))
            paced.append(_alone(client, bodies))
    asked, figures, rows = _after([], [*before, *paced[0]]), _told(costed), []
    for place, (use, rate, replies) in enumerate(zip(USE, rates, measured, strict=True)):
        begins_s = asked[-1][1] + _APART_S
        asked += zip(replies, begins_s + arrivals(num_requests, rate, chosen.seed), strict=True)
        pace = _pace(costed.fitted, [*paced[place], *paced[place + 1]])
        # what caches hold is of all that came before, too
        found = _simulate(costed.at(pace), items, route, asked)[-num_requests:]
        compared = _compared(f"{use:.0%}".rstrip("%"), rate, pace, replies, found)
        figures |= compared
        rows.append([f"{use:.0%}", *(f"{each:,.2f}" for each in compared.values())])
        asked = _after(asked, paced[place + 1])
    columns = [name.split("_", 1)[1] for name in list(figures)[-len(rows[0]) + 1 :]]
    show(f"{num_requests} rankings, two replicas of one core, route {route}", ["in use", *columns], rows)
    return costed, figures


def _alone(client: httpx.Client, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
    """The first few requests, one at a time."""
    return [ask(client, body, number) for number, body in enumerate(bodies[:_RATED])]


def _pace(fitted: Fitted, alone: Sequence[Reply]) -> float:
    """How many times as long as the costs say the passes took of requests that nothing else ran beside."""
    return statistics.median(_pass_s(reply) / fitted.pass_s(_shape_of(reply)) for reply in alone)


def _after(asked: Sequence[tuple[Reply, float]], replies: Sequence[Reply]) -> list[tuple[Reply, float]]:
    """`asked` and when, and then these, so far apart that no two are under way at once."""
    last_s = asked[-1][1] + _APART_S * 2 if asked else 0.0
    return [*asked, *((reply, last_s + _APART_S * place) for place, reply in enumerate(replies, 1))]


# ---- what a pass costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trials:
    """What costs are fitted to. They come before the loads of any route, for caches hold what they asked for."""

    cores: float  # as in `Costed`
    alone: list[Reply]
    both: list[Reply]  # two at a time


def _tried(client: httpx.Client, items: Items, count: int) -> _Trials:
    """Requests of many sizes, one at a time and then two at a time; each is asked twice, the second time warm."""
    cores = num_usable_cores() * (1.0 - psutil.cpu_percent(interval=_IDLE_S) / 100)
    random = np.random.default_rng([7, items.num_items])
    bodies = []
    for number in range(count):
        drawn = random.choice(items.num_items, size=_SIZES[number % len(_SIZES)] + 3, replace=False)
        ids = [items.item_ids[item] for item in drawn]
        bodies += 2 * [{"candidates": ids[:-3], "history": ids[-3:], "explain": True}]
    alone = [ask(client, body, number) for number, body in enumerate(bodies)]
    return _Trials(cores, alone, ask_steadily(client, bodies, 2))


def _cost_of(trials: _Trials) -> Costed:
    alone, cores = trials.alone, trials.cores
    fitted = fit([Point(_shape_of(reply), _pass_s(reply)) for reply in alone])
    outside_s = statistics.median(reply.ms / 1e3 - _pass_s(reply) for reply in alone)
    single = [reply for reply in trials.both if reply.receipt["batch_size"] == 1]
    slower = statistics.median(_pass_s(reply) / fitted.pass_s(_shape_of(reply)) for reply in single)
    beside = statistics.median(_pass_s(reply) / (reply.ms / 1e3) for reply in single)  # share of time in a pass
    console.print(
        f"{len(alone)} alone: {fitted.overhead_s * 1e3:.1f} ms + {fitted.row_s * 1e6:.0f} µs a row + "
        f"{fitted.pair_s * 1e9:.1f} ns a pair + {fitted.byte_s * 1e12:.0f} ps a byte, residual {fitted.residual:.1%}; "
        f"outside {outside_s * 1e3:.1f} ms, {cores:.2f} cores free. "
        f"Two at a time: {slower:.2f} times, in a pass {beside:.0%} of the time"
    )
    waits = max(1.0, 2 / cores)  # which two tasks do for a core, and the simulated ones as well
    return Costed(fitted, outside_s, cores, max(0.0, slower / waits - 1.0) / beside)


def _pass_s(reply: Reply) -> float:
    """Seconds of the pass that answered."""
    stages: Mapping[str, float] = reply.receipt["stage_ms"]
    return sum(stages.get(name, 0.0) for name in _PASS_STAGES) / 1e3


def _shape_of(reply: Reply) -> Any:
    tokens, built = _tokens(reply), _built(reply)
    there = There(sum(tokens.items) - sum(built), built, history=True)
    return demand(tokens, there, _REUSE, _MODEL, _PER_TOKEN).shape


def _blocks(reply: Reply, *kinds: str) -> list[Mapping[str, Any]]:
    return [block for block in reply.receipt["blocks"] if block["kind"] in kinds]


def _length(block: Mapping[str, Any]) -> int:
    return int(block["num_fresh"] + block["num_reused"])


def _built(reply: Reply) -> list[int]:
    return [_length(each) for each in _blocks(reply, "item", "history") if each["source"] == "computed"]


def _tokens(reply: Reply) -> Tokens:
    """Events that name an item are read as items are, and count as such."""
    sizes = tuple(_length(each) for each in _blocks(reply, "item", "history"))
    instruction = sum(map(_length, _blocks(reply, "instruction")))
    return Tokens(instruction, 0, sizes, reply.receipt["num_tokens"] - instruction - sum(sizes))


# ---- the same, simulated --------------------------------------------------------------------------------------------


def _simulate(costed: Costed, items: Items, route: str, asked: Sequence[tuple[Reply, float]]) -> list[Answered]:
    """The simulator's answers to what was asked, and when, in that order.

    An event of an item is a block of its own, with a number after those of items.
    """
    spec = ClusterSpec(
        num_nodes=2,
        costs=costed.fitted,
        model=_MODEL,
        kv_bytes_per_token=_PER_TOKEN,
        reuse=_REUSE,
        cache_bytes=pool_bytes(items, 2, COPIES),
        pass_rows=_PASS_ROWS,
        fetches=False,
        ingress_s=costed.outside_s / 2,
        egress_s=costed.outside_s / 2,
        per_machine=2,
        cores=costed.cores,
        crowding=costed.crowding,
    )
    requests = [_request(items, number, reply, float(due_s)) for number, (reply, due_s) in enumerate(asked)]
    simulation = Simulation(spec, FixedHoldings(), make_route(route))
    lengths = {key: size for each in requests for key, size in zip(each.items, each.tokens.items, strict=True)}
    usual, placement = round(statistics.mean(lengths.values())), items.placed(2, COPIES)
    for node in range(2):
        for item in np.flatnonzero(placement.held_by(node)).tolist():
            for key in (item, item + items.num_items):
                simulation.warm(node, key, lengths.get(key, usual))
    return sorted(simulation.run(requests).answers, key=lambda each: each.number)


def _request(items: Items, number: int, reply: Reply, due_s: float) -> SimRequest:
    numbers = {item_id: number for number, item_id in enumerate(items.item_ids)}
    keys = [
        numbers[block["owner"]] + items.num_items * (block["kind"] == "history")
        for block in _blocks(reply, "item", "history")
    ]
    return SimRequest(number, due_s, number, tuple(keys), _tokens(reply))


def _compared(
    name: str, rate: float, pace: float, replies: Sequence[Reply], found: Sequence[Answered]
) -> dict[str, float]:
    ms = [reply.ms for reply in replies[_FIRST:]]
    sim_ms = [each.ttft_s * 1e3 for each in found[_FIRST:]]
    missed = sum(len(_built(reply)) for reply in replies[_FIRST:]) / sum(each.num_items for each in found[_FIRST:])
    sim_missed = 1 - sum(each.num_hits for each in found[_FIRST:]) / sum(each.num_items for each in found[_FIRST:])
    figures = {"rate_per_s": rate, "pace": pace, "missed": missed, "missed_sim": sim_missed}
    for share in (0.5, 0.99):
        at = f"p{share * 100:.0f}"
        real, made = percentile(ms, share), percentile(sim_ms, share)
        figures |= {f"{at}_ms": real, f"{at}_sim_ms": made, f"{at}_sim_over_measured": made / real}
    return {f"{name}_{key}": value for key, value in figures.items()}


def _told(costed: Costed) -> dict[str, float]:
    fitted = costed.fitted
    return {
        "overhead_ms": fitted.overhead_s * 1e3,
        "us_per_row": fitted.row_s * 1e6,
        "ns_per_pair": fitted.pair_s * 1e9,
        "ps_per_byte": fitted.byte_s * 1e12,
        "fit_residual": fitted.residual,
        "outside_ms": costed.outside_s * 1e3,
        "cores": costed.cores,
        "crowding": costed.crowding,
    }
