"""The tier of blocks that other replicas have: asked after a replica's own tiers, and before anything is computed.

Never imports ray or torch. A replica says which of some blocks it has, and sends them sealed, so that a damaged one
fails its checksum and is a miss. Invariant: what was erased here is not fetched again; a replica that is asked by
another one asks nobody; no question lasts longer than its limit, and who did not answer is left alone for a while.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rcllm.core.ranking import ContentKey
from rcllm.metrics import Clock
from rcllm.on_ray.envelope import Get, Has, SentBlock
from rcllm.store.contract import Found, Stored, TierStats
from rcllm.store.guarded import Breaker
from rcllm.store.owners import one_name

MAX_ASKED = 4  # replicas, for one look-up: those that the router named last
_ERASED_S = 600.0  # for how long an erased user's blocks are refused; by then every replica has erased them
_WHERE = 20_000  # blocks whose replica is remembered between look-up and reading

Question = Callable[[Sequence[int], Has | Get], Mapping[int, Mapping[ContentKey, object]]]


class PeerStore:
    """See `store.contract.Store`. What is put here goes nowhere: who wants a block asks for it."""

    def __init__(self, ask: Question, clock: Clock) -> None:
        """`ask`: puts one question to some replicas at once; gives the answers of those that answered in time."""
        self._ask, self._clock = ask, clock
        self._nodes: OrderedDict[int, None] = OrderedDict()  # those named last come last
        self._breakers: dict[int, Breaker] = {}  # by node
        self._where: OrderedDict[ContentKey, int] = OrderedDict()
        self._erased: dict[str, float] = {}
        self._lock = threading.Lock()
        self._here = threading.local()
        self._refused = 0

    # ---- what the replica tells it ----

    def suggest(self, nodes: Iterable[int]) -> None:
        """Replicas that are likely to have what is missing here, the likeliest first."""
        with self._lock:
            for node in reversed(list(nodes)):
                self._nodes[node] = None
                self._nodes.move_to_end(node)
            while len(self._nodes) > MAX_ASKED:
                self._nodes.popitem(last=False)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """In this thread, it has nothing: for answers to other replicas."""
        self._here.is_silent = True
        try:
            yield
        finally:
            self._here.is_silent = False

    # ---- Store ----

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        wanted = tuple(keys)
        if not wanted or getattr(self._here, "is_silent", False):
            return {}
        with self._lock:
            nodes = list(reversed(self._nodes))
        found: dict[ContentKey, Found] = {}
        answers = self._answers(nodes, Has(wanted))
        with self._lock:
            for node in nodes:
                for key, num_bytes in answers.get(node, {}).items():
                    if key not in found:
                        assert isinstance(num_bytes, int)
                        found[key] = Found("peer", num_bytes)
                        self._where[key] = node
                        self._where.move_to_end(key)
            while len(self._where) > _WHERE:
                self._where.popitem(last=False)
        return found

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        if getattr(self._here, "is_silent", False):
            return {}
        by_node: dict[int, list[ContentKey]] = {}
        with self._lock:
            for key in keys:
                if (node := self._where.get(key)) is not None:
                    by_node.setdefault(node, []).append(key)
        blocks: dict[ContentKey, Stored] = {}
        for node, some in by_node.items():
            for key, sent in self._answers([node], Get(tuple(some))).get(node, {}).items():
                assert isinstance(sent, SentBlock)
                if not self._is_refused(sent.owner):
                    blocks[key] = Stored(memoryview(sent.data), sent.cost, sent.owner, sent.space)
        return blocks

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        pass

    def delete_owner(self, owner: str) -> int:
        """Each replica erases what it has; here it is remembered that nothing of a user may come back.

        An item is erased where its text changed, and the new one has other keys: nobody asks for the old.
        """
        name, now = one_name(owner), self._clock()
        if name is None or not name.startswith("user"):
            return 0
        with self._lock:
            self._erased = {each: at for each, at in self._erased.items() if now - at < _ERASED_S} | {name: now}
        return 0

    def stats(self) -> Sequence[TierStats]:
        return (TierStats("peer", 0, 0, 0, dropped=self._refused),)

    def close(self) -> None:
        pass

    def _answers(self, nodes: Iterable[int], ask: Has | Get) -> Mapping[int, Mapping[ContentKey, object]]:
        """What those of the nodes answer that are not left alone."""
        with self._lock:
            breakers = {node: self._breakers.setdefault(node, Breaker(self._clock)) for node in nodes}
        asked = [node for node, breaker in breakers.items() if breaker.lets_through()]
        answers = self._ask(asked, ask) if asked else {}
        for node in asked:
            if node in answers:
                breakers[node].worked()
            else:
                breakers[node].failed()
        return answers

    def _is_refused(self, owner: str | None) -> bool:
        name, now = one_name(owner), self._clock()
        with self._lock:
            refused = name is not None and now - self._erased.get(name, -_ERASED_S) < _ERASED_S
            self._refused += refused
        return refused
