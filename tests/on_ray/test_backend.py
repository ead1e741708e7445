"""A cluster in one process: requests whose replica dies, changes that reach every replica, hedges, streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from rcllm.core.ranking import Item, ItemId, UserId
from rcllm.core.texts import TextRequest
from rcllm.errors import OverloadedError, RequestError, UnknownItemError
from rcllm.on_ray.backend import ClusterBackend
from rcllm.on_ray.envelope import Asked, Envelope, LostError
from rcllm.on_ray.ledger import Ledger
from rcllm.server.backend import EraseUser, PutItems, RemoveItems, WarmItems
from tests.engine import tiny
from tests.on_ray.local_fleet import local_cluster, requests

pytestmark = pytest.mark.usefixtures("one_compute_thread")
NEW = Item(ItemId("i1"), {"title": "quite other words"})


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def test_answers_are_those_of_one_engine() -> None:
    alone = tiny.fresh(items=tiny.catalogue())

    async def body() -> None:
        async with local_cluster(route="round_robin") as (backend, fleet, _):
            for request in requests(6):
                response = await backend.answer(Asked(request))
                assert response.scores == pytest.approx(alone.rank(request).scores, abs=1e-4)
            assert {node for node, _ in fleet.asked} == {0, 1}, "both answered"

    run(body)


def test_a_request_whose_replica_dies_is_answered_by_another_one_and_once() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, live):
            dead = []

            def dies(node: int, envelope: Envelope) -> None:
                if isinstance(envelope.ask, Asked) and not dead:
                    dead.append(node)
                    fleet.kill(node)
                    raise LostError("killed")

            fleet.before = dies
            answers = [await backend.answer(Asked(request)) for request in requests(4)]
            assert [each.request_id for each in answers] == ["r0", "r1", "r2", "r3"]
            (first, name), (second, again) = fleet.asked[:2]
            assert (first, second) == (dead[0], 1 - dead[0])
            assert name == again, "an attempt has the name of the one before"
            assert backend.tally.lost == 1
            assert live.up == (1 - dead[0],)

    run(body)


def test_a_request_that_every_replica_dies_over_is_refused_with_words() -> None:
    async def body() -> None:
        async with local_cluster(attempts=2) as (backend, fleet, _):

            def dies(node: int, envelope: Envelope) -> None:
                if isinstance(envelope.ask, Asked):
                    raise LostError("killed")

            fleet.before = dies
            with pytest.raises(OverloadedError, match="ask again"):
                await backend.answer(Asked(next(requests(1))))
            assert {node for node, _ in fleet.asked} == {0, 1}

    run(body)


def test_an_envelope_that_comes_again_is_not_computed_again() -> None:
    async def body() -> None:
        async with local_cluster(1) as (_, fleet, __):
            envelope = Envelope("the same", Asked(next(requests(1))))
            first, second = await asyncio.gather(fleet.ask(envelope), fleet.ask(envelope))
            later = await fleet.ask(envelope)
            assert first.value == second.value == later.value
            assert fleet.engines[0].costs.num_passes == 1

    run(body)


def test_changes_hold_on_every_replica_and_each_says_so() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, live):
            for request in requests(4):
                await backend.answer(Asked(request))
            put = await backend.change(PutItems((NEW,)))
            assert put.acknowledged == ("node 0", "node 1")
            assert all(engine.catalogue[NEW.item_id] == NEW for engine in fleet.engines.values())
            assert backend.items[NEW.item_id] == NEW
            removed = await backend.change(RemoveItems((ItemId("i2"),)))
            assert removed.acknowledged == ("node 0", "node 1")
            assert all("i2" not in engine.catalogue for engine in fleet.engines.values())
            await backend.change(EraseUser(UserId("u1")))
            assert not any(engine.pool.owners() & {"user:u1"} for engine in fleet.engines.values())
            with pytest.raises(UnknownItemError):
                await backend.change(RemoveItems((ItemId("i2"),)))
            assert live.num_nodes == 2

    run(body)


def test_what_a_replica_holds_stays_held_when_its_text_changes_and_what_is_removed_does_not() -> None:
    """From the first change on; whatever a lower tier had of the old text."""

    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            await backend.change(WarmItems())
            await _warmed(backend)
            owner = next(worker for worker in fleet.workers.values() if NEW.item_id in worker.shard())
            for worker in fleet.workers.values():
                worker._below = frozenset(range(60))
            await backend.change(PutItems((NEW,)))
            await backend.change(RemoveItems((ItemId("i2"),)))
            await _warmed(backend)
            assert all(not worker._below & {1, 2} for worker in fleet.workers.values())
            assert 1 in owner._held()
            await backend.change(PutItems((NEW,)))
            assert 1 in owner._below, "it reads as before"

    run(body)


async def _warmed(backend: ClusterBackend) -> None:
    await backend._look()
    while backend.stats().warmth.running:
        await asyncio.sleep(0.02)
        await backend._look()


@pytest.mark.parametrize("goes", ["before", "after"])
def test_an_item_that_goes_while_a_shard_is_looked_for_does_not_end_its_load(goes: str) -> None:
    async def body() -> None:
        async with local_cluster(1) as (backend, fleet, _):
            worker, engine = fleet.workers[0], fleet.engines[0]
            find = worker._found_below

            def found_below(item_ids: Sequence[ItemId]) -> frozenset[int]:
                if goes == "before":
                    engine.upsert_items((), gone=tiny.IDS[:1])
                found = find(item_ids)
                engine.upsert_items((), gone=tiny.IDS[:1])
                return found

            worker._found_below = found_below  # type: ignore[method-assign]
            await worker._load_shard(warm=True)
            await _warmed(backend)
            assert set(range(1, 50)) <= worker._held() <= set(range(1, 60)), "but for what the pool has no room for"

    run(body)


def test_no_answer_is_kept_of_a_user_who_is_erased() -> None:
    async def body() -> None:
        async with local_cluster(1) as (backend, fleet, _):
            for request in requests(4):
                await backend.answer(Asked(request))
            await backend.change(EraseUser(UserId("u1")))
            assert [each.user_id for each in fleet.workers[0]._answers.values()] == ["u0", "u2", "u3"]

    run(body)


def test_a_replica_that_was_down_knows_of_changes_before_it_answers() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            fleet.kill(1)
            made = await backend.change(PutItems((NEW,)))
            assert made.acknowledged == ("node 0",)
            await backend.change(RemoveItems((ItemId("i2"),)))
            await fleet.begin(1, 2)
            assert fleet.engines[1].catalogue[NEW.item_id] == NEW
            assert "i2" not in fleet.engines[1].catalogue

    run(body)


def test_a_replica_that_missed_a_change_reads_it_with_the_next_request() -> None:
    """It came up between the ledger and the change: only the envelope's version tells."""

    async def body() -> None:
        async with local_cluster(route="round_robin") as (backend, fleet, _):
            late = fleet.workers.pop(1)
            await backend.change(PutItems((NEW,)))
            fleet.workers[1] = late
            assert fleet.engines[1].catalogue[NEW.item_id] != NEW
            for request in requests(8):
                await backend.answer(Asked(request))
            assert {node for node, _ in fleet.asked} == {0, 1}
            assert fleet.engines[1].catalogue[NEW.item_id] == NEW

    run(body)


def test_a_ledger_that_was_lost_is_kept_again_and_is_sent_for_nothing_else() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            await backend.change(PutItems((NEW,)))
            kept = fleet._ledger
            for lost in (False, True):
                before = kept.num_adopted
                if lost:
                    kept.ledger = Ledger()
                await backend._look()
                assert kept.num_adopted - before == lost
                assert kept.ledger.version == 1

    run(body)


def test_a_change_that_no_replica_takes_is_in_no_ledger() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            with pytest.raises(RequestError, match="codes"):
                await backend.change(PutItems((NEW,), {NEW.item_id: (1, 2)}))
            assert (await fleet._ledger.since(0)).version == 0
            await backend.answer(Asked(next(requests(1))))

    run(body)


def test_a_slow_replica_is_hedged_and_its_work_withdrawn() -> None:
    async def body() -> None:
        async with local_cluster(hedge_ms=20.0) as (backend, fleet, _):
            slow: list[int] = []

            async def waits() -> None:
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    slow.append(-1)
                    raise

            def first_is_slow(node: int, envelope: Envelope) -> Any:
                if isinstance(envelope.ask, Asked) and not slow:
                    slow.append(node)
                    return waits()
                return None

            fleet.before = first_is_slow
            response = await backend.answer(Asked(next(requests(1))))
            assert response.request_id == "r0"
            assert (backend.tally.hedged, backend.tally.hedges_won) == (1, 1)
            assert [node for node, _ in fleet.asked] == [slow[0], 1 - slow[0]]
            await asyncio.sleep(0)
            assert slow[1:] == [-1], "the slow one was withdrawn"

    run(body)


def test_a_hedge_goes_elsewhere_where_the_first_host_never_says_that_it_took_the_request() -> None:
    async def body() -> None:
        async with local_cluster(hedge_ms=20.0, route="round_robin") as (backend, fleet, _):
            fleet.cut.add(0)
            for request in requests(4):
                response = await backend.answer(Asked(request))
                assert response.request_id == request.request_id
            assert backend.tally.hedged == backend.tally.hedges_won > 0

    run(body)


def test_a_text_goes_on_at_another_replica_where_it_stopped() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            request = TextRequest("t", parts=((5, 6, 7, 8),))
            whole: list[int] = []
            expected = await backend.answer(Asked(request, on_tokens=whole.extend))
            parts: list[int] = []

            def dies(node: int, envelope: Envelope) -> None:
                if isinstance(envelope.ask, Asked) and len(parts) >= 3 and len(fleet.workers) == 2:
                    fleet.kill(node)

            fleet.before = dies
            got = await backend.answer(Asked(request, on_tokens=parts.extend))
            assert len(fleet.workers) == 1
            assert got.token_ids == expected.token_ids
            assert parts == whole, "no token is told twice, and none is missing"

    run(body)


def test_each_replica_warms_what_is_placed_there() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, live):
            await backend.change(WarmItems())
            while backend.stats().warmth.running or backend.stats().num_blocks < 60:
                await asyncio.sleep(0.05)
                await backend._look()
            for node, worker in fleet.workers.items():
                held = set(worker._held())
                assert {tiny.IDS[n] for n in held} == set(worker.shard())
                live.heard(worker.report())
                assert all(node in live.holdings.held(item_id).nodes for item_id in worker.shard())
            assert not set(fleet.workers[0].shard()) & set(fleet.workers[1].shard())

    run(body)


def test_stats_add_up() -> None:
    async def body() -> None:
        async with local_cluster() as (backend, fleet, _):
            for request in requests(4):
                await backend.answer(Asked(request))
            await backend._look()
            stats = backend.stats()
            assert stats.num_blocks == sum(len(engine.pool._index) for engine in fleet.engines.values())
            assert stats.door.outcomes["accepted"] == 4
            assert stats.num_items == 60

    run(body)


def test_a_replica_without_peers_tells_the_router_to_count_on_no_fetch() -> None:
    """Else what is missing seems as good as there, and `ttft` sends requests anywhere."""

    async def body() -> None:
        async with local_cluster(route="ttft") as (backend, fleet, live):
            await backend.change(WarmItems())
            while backend.stats().warmth.running or backend.stats().num_blocks < 60:
                await asyncio.sleep(0.05)
                await backend._look()
            for worker in fleet.workers.values():
                live.heard(worker.report())
            assert live.view().fetch_bytes_per_s.tolist() == [1.0, 1.0]
            for node, worker in fleet.workers.items():
                shard = worker.shard()
                places = tuple(tiny.IDS.index(item_id) for item_id in shard[:5])
                await backend.answer(Asked(tiny.request(places, name=f"of {node}")))
                assert fleet.asked[-1][0] == node, "where its items are"

    run(body)
