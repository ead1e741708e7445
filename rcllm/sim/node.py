"""One simulated node: the engine's own scheduler and cache index, and when its device and its link are free.

Knows nothing of other nodes or of the clock. Invariant: what a request reads from the cache is pinned until its pass
has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rcllm.core.ranking import ContentKey
from rcllm.errors import CapacityError
from rcllm.schedule.scheduler import Scheduler
from rcllm.schedule.work import KindLimits, PassLimits
from rcllm.sim.cost import PassShape
from rcllm.sim.machine import Task
from rcllm.sim.workload import ItemUpdate, SimRequest
from rcllm.store.index import Entry, Index

RANK, BUILD = "rank", "build"  # kinds of work: requests, and blocks of items whose text has changed
BUILD_SHARE = 0.25  # of the rows, where requests wait as well
_NOTHING = ItemUpdate(0.0, -1, 0)


def content_key(key: int) -> ContentKey:
    """Of an item or user in a cache index; real ones are hashes."""
    return ContentKey(key.to_bytes(9, "big", signed=True))


@dataclass(slots=True)
class SimJob:
    """A request on its way, or a block to build (then `request` is None)."""

    number: int
    request: SimRequest | None
    build: ItemUpdate = _NOTHING
    node: int = -1
    retries: int = 0
    entered_s: float = 0.0
    started_s: float = 0.0
    num_hits: int = 0
    num_reachable: int = 0  # items on the node that holds most of them
    num_fetched: int = 0
    fetch_s: float = 0.0
    missing: list[int] = field(default_factory=list)  # places of items that were not there at the look-up
    fetched: tuple[int, ...] = ()  # places of items that came from other nodes
    pinned: list[ContentKey] = field(default_factory=list)
    history_there: bool = False
    estimate_s: float = 0.0
    built: Sequence[int] = ()  # places of items that the pass computes as blocks
    num_fresh: int = 0
    num_built: int = 0


@dataclass(slots=True)
class Passing:
    """The pass that a node computes."""

    jobs: Sequence[SimJob]
    shape: PassShape
    started_s: float
    task: Task


class Node:
    """Mutable state; the cluster moves it on."""

    def __init__(self, number: int, limits: PassLimits, cache_bytes: int) -> None:
        self.number = number
        self.epoch = 0  # how often it has failed: events of an earlier life are void
        self.up = True
        self.start_is_due = False
        self.link_free_s = 0.0
        self.busy_s = 0.0  # in all
        self.passing: Passing | None = None
        self.jobs: dict[int, SimJob] = {}  # everything that is here and not answered
        self._limits, self._cache_bytes = limits, cache_bytes
        self.reset()

    def reset(self) -> None:
        """An empty node, as after a restart."""
        self.scheduler = Scheduler(self._limits)
        self.scheduler.open(RANK, KindLimits())
        self.scheduler.open(BUILD, KindLimits(share=BUILD_SHARE))
        self.cache = Index(self._cache_bytes)
        self.jobs = {}
        self.passing = None
        self.start_is_due = False
        self.link_free_s = 0.0

    def pin(self, job: SimJob, key: int) -> bool:
        """Whether the cache has a block; then it stays until the job ends."""
        named = content_key(key)
        if not self.cache.take([named]):
            return False
        job.pinned.append(named)
        return True

    def unpin(self, job: SimJob) -> None:
        for key in job.pinned:
            self.cache.unpin(key)
        job.pinned.clear()

    def drop(self, key: int) -> None:
        """A block is of no use any more. A request that has pinned it still reads it."""
        named = content_key(key)
        if named in self.cache:
            self.cache.remove(named)

    def keep(self, key: int, num_bytes: int, cost: float) -> list[int] | None:
        """Puts a block into the cache, and returns who had to go; None where it has no room."""
        named = content_key(key)
        if named in self.cache or num_bytes > self.cache.budget:
            return None
        try:
            gone = self.cache.make_room(num_bytes)
        except CapacityError:  # what is pinned leaves too little
            return None
        self.cache.add(named, Entry(num_bytes, cost, None))
        return [int.from_bytes(each, "big", signed=True) for each in gone]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass, for the trace."""

    node: int
    start_s: float
    end_s: float
    num_requests: int
    shape: PassShape
