"""Which share of a request's items does its best node hold, by placement, number of nodes and memory?

Regime: requests of 20 candidates that a retriever finds from the last ten events of a user. Placements are made from
three requests of each training user and judged by one of each other user, which neither graph nor halo has seen. Items
have one size, so that figures compare with published ones; `sizes` repeats some with the sizes of the items' texts.
Memory of all nodes is `copies` × the catalogue; one copy means 1.1, for the imbalance that partitions are allowed and
for what is replicated.

Names: {data}_k{nodes}_c{copies}_{policy}; `_load` is the fullest node's share of requests over the mean, `_at_load` and
`_load_at_load` the same where routing minds the load (prices learnt from past requests). metis_lru: METIS, and free
memory is an LRU cache; requests go to the node that holds most, and the cache is warmed by past ones. random_lru: the
same memory, all of it cache, and requests go anywhere.

Ceiling: 1. With candidates drawn uniformly a node can hold no more than its share of the memory: `sources` shows it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks.harness import SHARED, Options, console, options, run_parts, show
from rcllm.cluster.cached import CachedHoldings
from rcllm.cluster.evaluate import evaluate
from rcllm.cluster.options import TrialConfig
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import PlacedHoldings, Placement, Room
from rcllm.cluster.route import HitOnly, RoundRobin
from rcllm.cluster.statistics import Requests, Statistics, collect
from rcllm.cluster.trial import Trial, make_trial
from rcllm.cluster.view import ClusterView, NodeState, Route, RoutedBlock, RoutedRequest
from rcllm.data import Dataset, fetch_movielens, load_dataset

QUESTION = "Share of a held-out request's items on its best node, by placement, nodes and copies of the catalogue"
DATA = {
    "yelp": "yelp",
    "goodreads": "goodreads",
    "scientific": "amazon_scientific",
    "games": "amazon_games",
    "movielens": "movielens_100k",
}
NODES, COPIES = (4, 8, 20, 40, 100), (1, 2, 4)
ITEM_BYTES = 1_000_000
WARM = 10_000  # past requests that fill caches
POLICIES = ("hash", "popularity", "metis", "halo", "learned", "spread")


def main() -> None:
    parts: dict[str, Callable[[], dict[str, float]]] = {}
    chosen = options("placement", QUESTION, (*DATA, "sources", "sizes", "time"))
    parts |= {name: partial(data_set, name, chosen) for name in DATA}
    parts |= {"sources": partial(sources, chosen), "sizes": partial(sizes, chosen), "time": partial(by_time, chosen)}
    run_parts("placement", QUESTION, chosen, parts, slow=("games", "sizes", "time"))


def data_set(name: str, chosen: Options) -> dict[str, float]:
    """All policies, nodes and copies on one data set."""
    data = loaded(DATA[name])
    if data is None:
        return {}
    trial = make_trial(data, TrialConfig(seed=chosen.seed, per_user=1 if chosen.quick else 3))
    statistics = collected(trial, np.full(len(trial.item_ids), ITEM_BYTES))
    nodes = (8, 40) if chosen.quick else NODES
    copies = (2,) if chosen.quick else COPIES
    metrics: dict[str, float] = {}
    for num_nodes in nodes:
        for each in copies:
            room = Room(num_nodes, room_of(each, statistics, num_nodes))
            metrics |= compared(f"{name}_k{num_nodes}_c{each}", statistics, trial, room)
    table(name, metrics, nodes, copies)
    return metrics


def compared(key: str, statistics: Statistics, trial: Trial, room: Room) -> dict[str, float]:
    """All placements of one room."""
    metrics: dict[str, float] = {}
    for policy in POLICIES:
        place = make_place(policy)
        start = time.perf_counter()
        placement = place(statistics, room)
        seconds = time.perf_counter() - start
        placement.check()
        report = evaluate(placement, statistics, trial.held_out)
        name = f"{key}_{policy}"
        metrics |= {name: report.best, f"{name}_load": report.balance.requests, f"{name}_seconds": seconds}
        metrics |= {f"{name}_at_load": report.spread, f"{name}_load_at_load": report.balance.spread}
        if policy == "metis":
            metrics |= {f"{key}_edge_cut": report.edge_cut, f"{key}_evicted": float(placement.evicted.mean())}
            metrics |= {f"{key}_byte_balance": report.balance.num_bytes, f"{key}_heat_balance": report.balance.heat}
            metrics[f"{key}_metis_lru"] = with_cache(placement, HitOnly(), trial)
    metrics[f"{key}_random_lru"] = with_cache(empty(placement), RoundRobin(), trial)
    return metrics


def empty(placement: Placement) -> Placement:
    """The same room with nothing placed in it."""
    none = tuple(np.empty(0, np.int64) for _ in placement.halos)
    nowhere, everywhere = np.ones_like(placement.evicted), np.zeros_like(placement.replicated)
    return dataclasses.replace(placement, evicted=nowhere, replicated=everywhere, halos=none)


def with_cache(placement: Placement, route: Route, trial: Trial) -> float:
    """Mean share on the node that a policy chooses, where the free memory of nodes is an LRU cache."""
    holdings = CachedHoldings(PlacedHoldings.of(placement, range(placement.num_items)))
    names = [NodeState(f"n{node}") for node in range(placement.room.num_nodes)]
    view = ClusterView.of(names, holdings)
    achieved = []
    warm = Requests(trial.past.starts[-min(WARM, len(trial.past)) - 1 :], trial.past.items)
    for request in (*requests(warm, placement), *requests(trial.held_out, placement)):
        decision = route(view, request)
        holdings.served(decision.node, request.items)
        achieved.append(decision.achieved)
    return float(np.mean(achieved[len(warm) :]))


def requests(asked: Requests, placement: Placement) -> Iterator[RoutedRequest]:
    num_bytes = placement.num_bytes.tolist()
    for place in range(len(asked)):
        yield RoutedRequest(place, tuple(RoutedBlock(item, num_bytes[item], 1) for item in asked[place].tolist()))


def sources(chosen: Options) -> dict[str, float]:
    """Yelp at 40 nodes and 2 copies, by where candidates come from."""
    data = loaded("yelp")
    metrics: dict[str, float] = {}
    for source in ("popularity", "uniform") if data is not None else ():
        trial = make_trial(data, TrialConfig(source=source, seed=chosen.seed, per_user=1))  # type: ignore[arg-type]
        statistics = collected(trial, np.full(len(trial.item_ids), ITEM_BYTES))
        room = Room(40, room_of(2, statistics, 40))
        for policy in ("hash", "metis", "halo", "learned"):
            placement = make_place(policy)(statistics, room)
            report = evaluate(placement, statistics, trial.held_out)
            metrics[f"yelp_{source}_k40_c2_{policy}"] = report.best
    show("Yelp, 40 nodes, 2 copies", ["", "share"], [[key, f"{value:.3f}"] for key, value in metrics.items()])
    return metrics


def sizes(chosen: Options) -> dict[str, float]:
    """Amazon Scientific at 40 nodes with items of the sizes of their texts."""
    data = loaded("amazon_scientific")
    if data is None:
        return {}
    trial = make_trial(data, TrialConfig(seed=chosen.seed))
    lengths = [sum(len(text) for text in item.fields.values()) for item in data.catalogue.values()]
    statistics = collected(trial, np.maximum(lengths, 4) * (ITEM_BYTES // 100))
    metrics: dict[str, float] = {}
    for copies in COPIES:
        key = f"scientific_sizes_k40_c{copies}"
        metrics |= compared(key, statistics, trial, Room(40, room_of(copies, statistics, 40)))
    table("scientific_sizes", metrics, (40,), COPIES)
    return metrics


def by_time(chosen: Options) -> dict[str, float]:
    """MovieLens, which has a clock: what came before a moment places what comes after."""
    folder = SHARED / "movielens_latest_small" / "official"
    if not folder.is_dir():
        console.print(f"[yellow]{folder} is not here; skipped")
        return {}
    trial = make_trial(load_dataset("auto", folder), TrialConfig(split="time", seed=chosen.seed))
    statistics = collected(trial, np.full(len(trial.item_ids), ITEM_BYTES))
    metrics = compared("movielens_time_k8_c2", statistics, trial, Room(8, room_of(2, statistics, 8)))
    table("movielens_time", metrics, (8,), (2,))
    return metrics


def loaded(folder: str) -> Dataset | None:
    """A set of the shared folder; MovieLens from its package where that is missing, and nothing for the others."""
    if (SHARED / folder).is_dir():
        return load_dataset("common", SHARED / folder)
    if folder == DATA["movielens"]:
        return fetch_movielens()
    console.print(f"[yellow]{folder} is not here; skipped")
    return None


def collected(trial: Trial, num_bytes: object) -> Statistics:
    return collect(trial.past, trial.item_ids, np.asarray(num_bytes))


def room_of(copies: int, statistics: Statistics, num_nodes: int) -> int:
    """Bytes of a node where all nodes hold so many copies of the catalogue."""
    return int((1.1 if copies == 1 else copies) * statistics.num_bytes.sum() / num_nodes)


def table(name: str, metrics: dict[str, float], nodes: tuple[int, ...], copies: tuple[int, ...]) -> None:
    columns = ["hash", "popularity", "random_lru", "metis", "metis_lru", "halo", "learned", "learned_load"]
    columns += ["spread_at_load", "spread_load_at_load", "byte_balance", "heat_balance"]
    rows = []
    for num_nodes in nodes:
        for each in copies:
            key = f"{name}_k{num_nodes}_c{each}"
            rows.append([f"{num_nodes} nodes, {each} copies", *(f"{metrics[f'{key}_{c}']:.2f}" for c in columns)])
    show(f"{name}: share of a request's items on its best node", ["", *(c.replace("_", " ") for c in columns)], rows)


if __name__ == "__main__":
    main()
