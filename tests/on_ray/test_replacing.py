"""A new placement for replicas that run: moves are bounded, nobody waits, and who comes back knows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest

from rcllm.cluster.live import dealt
from rcllm.cluster.moves import matched
from rcllm.cluster.placement import Placement, Room
from rcllm.errors import DataError
from rcllm.on_ray.backend import ClusterBackend
from rcllm.server.backend import Asked, PlaceItems, PutItems, WarmItems
from tests.engine import tiny
from tests.on_ray.local_fleet import LocalFleet, local_cluster, requests
from tests.on_ray.test_backend import NEW

pytestmark = pytest.mark.usefixtures("one_compute_thread")
BYTES = 1000


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def by_parity() -> Placement:
    """Even items on node 0, odd ones on node 1, with room for two thirds of them."""
    owner = np.arange(len(tiny.IDS), dtype=np.int64) % 2
    none = np.zeros(len(tiny.IDS), dtype=np.bool_)
    sizes = np.full(len(tiny.IDS), BYTES, dtype=np.int64)
    room = Room(2, BYTES * len(tiny.IDS) * 2 // 3)
    return Placement(tiny.IDS, sizes, room, none, none, owner, (np.empty(0, np.int64),) * 2, "test")


def goal() -> list[set[str]]:
    """What each node holds at least in the end: nodes of a new placement are named as most stays."""
    old = replace(dealt(tiny.IDS, 2), num_bytes=by_parity().num_bytes, room=by_parity().room)
    new = matched(old, by_parity())
    return [{tiny.IDS[n] for n in np.flatnonzero(new.held_by(node))} for node in range(2)]


async def loaded(backend: ClusterBackend, fleet: LocalFleet) -> None:
    for worker in fleet.workers.values():
        if worker._loading is not None:
            await worker._loading
    await backend._look()
    while backend.stats().warmth.running:
        await asyncio.sleep(0.02)
        await backend._look()


def held(fleet: LocalFleet, node: int) -> set[str]:
    return {tiny.IDS[number] for number in fleet.workers[node]._held()}


def test_moves_are_bounded_and_none_is_left_in_the_end() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, live):
            await backend.change(WarmItems())
            await loaded(backend, fleet)
            left, steps = 1, 0
            while left:
                before = [set(worker.shard()) for worker in fleet.workers.values()]
                made = await backend.change(PlaceItems(by_parity(), max_moves=7))
                assert made.acknowledged == ("node 0", "node 1")
                after = [set(worker.shard()) for worker in fleet.workers.values()]
                assert sum(len(new - old) for old, new in zip(before, after, strict=True)) == made.num_items <= 7
                left, steps = made.num_left, steps + 1
            await loaded(backend, fleet)
            assert steps > 2
            for node, worker in fleet.workers.items():
                assert goal()[node] <= set(worker.shard()) <= held(fleet, node)
                live.heard(worker.report())
                assert all(node in live.holdings.held(item_id).nodes for item_id in goal()[node])

    run(body)


def test_every_request_meanwhile_is_answered_as_before() -> None:
    alone = tiny.fresh(items=tiny.catalogue())

    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            await backend.change(WarmItems())
            await loaded(backend, fleet)
            asked = list(requests(40))

            async def ask() -> list[object]:
                return [await backend.answer(Asked(request)) for request in asked]

            answering = asyncio.ensure_future(ask())
            while (await backend.change(PlaceItems(by_parity(), max_moves=5))).num_left:
                await asyncio.sleep(0.01)
            answers = await answering
            for request, response in zip(asked, answers, strict=True):
                assert response.scores == pytest.approx(alone.rank(request).scores, abs=1e-4)  # type: ignore[attr-defined]

    run(body)


def test_a_replica_that_comes_back_takes_its_new_shard() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            await backend.change(PutItems((NEW,)))
            fleet.kill(1)
            made = await backend.change(PlaceItems(by_parity()))
            assert (made.acknowledged, made.num_left) == (("node 0",), 0)
            await fleet.begin(1, 2)
            assert goal()[1] <= set(fleet.workers[1].shard())
            assert fleet.engines[1].catalogue[NEW.item_id] == NEW

    run(body)


def test_a_placement_of_other_items_or_nodes_is_refused_and_changes_nothing() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            for wrong in (dealt(tiny.IDS, 3), dealt(tiny.IDS[:10], 2)):
                with pytest.raises(DataError, match="expected two placements with the same"):
                    await backend.change(PlaceItems(wrong))
            assert (await fleet._ledger.since(0)).version == 0

    run(body)
