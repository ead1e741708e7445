"""Blocks between replicas: asked for, sealed, checked; a damaged one is a miss; an erased user's do not come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from rcllm.core.ranking import ContentKey
from rcllm.engine.engine import Engine
from rcllm.engine.tiers import open_tiers
from rcllm.on_ray.envelope import Get, Has, SentBlock
from rcllm.on_ray.peers import MAX_ASKED, PeerStore
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_compute_thread")


class Others:
    """Other replicas: their pools by node, which `damage` may harm on the way."""

    def __init__(self, pools: Mapping[int, Engine]) -> None:
        self.pools, self.asked, self.is_damaging = pools, list[tuple[tuple[int, ...], object]](), False

    def __call__(self, nodes: Sequence[int], ask: Has | Get) -> Mapping[int, Mapping[ContentKey, object]]:
        self.asked.append((tuple(nodes), ask))
        return {node: self._answer(self.pools[node], ask) for node in nodes if node in self.pools}

    def _answer(self, engine: Engine, ask: Has | Get) -> Mapping[ContentKey, object]:
        if isinstance(ask, Has):
            return {key: each.num_bytes for key, each in engine.pool.lookup_many(ask.keys).found.items()}
        sent = {}
        for key, block in engine.pool.sealed(ask.keys).items():
            data = np.frombuffer(block.data, dtype=np.uint8).copy()
            if self.is_damaging:
                data[-1] ^= 1
            data.flags.writeable = False  # as the object store hands it out
            sent[key] = SentBlock(data, block.cost, block.owner, block.space)
        return sent


def pair() -> tuple[Engine, Engine, Others, PeerStore]:
    """An engine that has everything, and one that has nothing but the other one for a peer."""
    full = tiny.fresh(items=tiny.catalogue())
    full.warm(tiny.IDS[:40])
    others = Others({7: full})
    peers = PeerStore(others, lambda: 0.0)
    peers.suggest([7])
    plain = tiny.fresh(items=tiny.catalogue())
    tiers = open_tiers(replace(plain.config.store, enabled=False), "", {}, peers)
    pool = type(plain.pool)(plain.pool.budget, plain.pool.dtype, plain.pool.device, tiers.store)
    empty = Engine(plain.config, plain.decoder, plain.prompter, pool, plain.model_id, tiers=tiers)
    empty.pool.rates.bytes_of["peer"].per_s = 1e12  # sooner than computing, whatever the machine
    return full, empty, others, peers


def test_what_a_peer_has_is_read_and_not_computed() -> None:
    full, empty, _, __ = pair()
    request = tiny.request(5)
    expected, got = full.rank(request), empty.rank(request)
    assert got.scores == pytest.approx(expected.scores, abs=1e-5)
    sources = [block.source for block in got.receipt.blocks if block.num_reused]
    assert sources
    assert set(sources) == {"peer"}
    again = empty.rank(request)
    assert {block.source for block in again.receipt.blocks if block.num_reused} == {"device"}, "it is kept"


def test_a_damaged_block_is_a_counted_miss() -> None:
    full, empty, others, _ = pair()
    others.is_damaging = True
    request = tiny.request(5)
    got = empty.rank(request)
    assert got.scores == pytest.approx(full.rank(request).scores, abs=1e-5)
    assert "peer" not in {block.source for block in got.receipt.blocks}
    stats = empty.pool.stats()
    assert stats.store_errors == stats.misses > 0


def test_what_is_sooner_computed_is_not_fetched() -> None:
    _, empty, __, ___ = pair()
    empty.pool.rates.bytes_of["peer"].per_s = 1.0
    assert "peer" not in {block.source for block in empty.rank(tiny.request(5)).receipt.blocks}


def test_warming_takes_from_peers_what_it_has_not_itself() -> None:
    full, empty, _, __ = pair()
    done = empty.warm(tiny.IDS[:10])
    assert done.done_blocks == done.total_blocks
    assert len(empty.pool.owners()) == len(full.pool.owners() & empty.pool.owners()) >= 10
    assert empty.costs.num_passes == 0


def test_a_replica_that_is_asked_asks_nobody() -> None:
    _, empty, others, peers = pair()
    keys = [block.key for block in [empty.prompter.item_block(tiny.catalogue()[tiny.IDS[0]], "history_first")]]
    with peers.silent():
        assert not empty.pool.lookup_many(keys).found
        assert not empty.pool.sealed(keys)
    assert not others.asked


def test_an_erased_users_blocks_do_not_come_back() -> None:
    full, empty, _, peers = pair()
    request = tiny.request(3, ("words of ann",), user="ann")
    full.rank(request)
    empty.erase_user("ann")  # type: ignore[arg-type]
    got = empty.rank(replace(request, request_id="later"))
    assert not [b for b in got.receipt.blocks if b.source == "peer" and b.owner == "ann"]
    assert peers.stats()[0].dropped > 0


def test_a_silent_peer_is_left_alone_for_growing_pauses() -> None:
    now = 0.0
    full = tiny.fresh(items=tiny.catalogue())
    full.warm(tiny.IDS[:1])
    key = full.prompter.item_block(tiny.catalogue()[tiny.IDS[0]], "history_first").key
    others = Others({7: full})
    peers = PeerStore(others, lambda: now)
    peers.suggest([7, 8])
    for at, expected in ((0.0, (7, 8)), (0.4, (7,)), (0.6, (7, 8)), (1.5, (7,)), (1.7, (7, 8))):
        now = at
        assert set(peers.lookup_many([key])) == {key}
        assert others.asked[-1][0] == expected, at
    others.pools = {8: full}
    assert peers.get_many([key]) == {}, "7 had it, and answers no more"
    asked = len(others.asked)
    assert peers.get_many([key]) == {}
    assert len(others.asked) == asked


def test_few_are_asked_those_named_last_first() -> None:
    others = Others({})
    peers = PeerStore(others, lambda: 0.0)
    assert peers.lookup_many([ContentKey(b"x")]) == {}
    assert not others.asked, "nobody is known"
    peers.suggest([1, 2, 3])
    peers.suggest([4, 5])
    peers.lookup_many([ContentKey(b"x")])
    nodes, _ = others.asked[0]
    assert nodes == (4, 5, 1, 2)
    assert len(nodes) == MAX_ASKED
