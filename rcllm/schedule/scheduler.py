"""What runs next: who waits, who runs, and whose turn it is. Never imports torch, never sees a prompt or a clock.

Kinds and, within a kind, tenants take turns by the rows that they were given (start-time fair queueing: Goyal et al.,
1996); within a tenant, work goes by its deadline, or by its arrival where it has none. Everything that runs takes a
step in every pass, and prompts that fit go through the layers beside it.

    add → waiting —turn→ running —end→ gone           cancel: from either, at once

Invariants: a number is in one place at a time; who was given least goes first, and is waited for where it needs more
room, so that nothing starves; what was cancelled is in no turn. Not thread-safe: the engine locks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from rcllm.core.ranking import ContentKey
from rcllm.schedule.work import KindLimits, PassLimits, Turn, Work

_PATIENCE_S = 1.0  # work without a deadline stands in its queue like work that has this long from its arrival
_IDLE_TENANTS = 64  # whose shares are remembered before those that no longer matter are forgotten


@dataclass(slots=True)
class _Tenant:
    """The waiting work of one tenant, of one kind."""

    served: float  # rows that it was given; never behind those who waited while it did not
    queue: list[tuple[float, int]] = field(default_factory=list)  # a heap of (due, number)
    listed: bool = False  # in its kind's order


@dataclass(slots=True)
class _Kind:
    """One kind of work: its tenants, and what of it runs."""

    limits: KindLimits
    served: float = 0.0
    now: float = 0.0  # what the tenant that entered last had been given by then
    tenants: dict[str, _Tenant] = field(default_factory=dict)
    order: list[tuple[float, str]] = field(default_factory=list)  # a heap of (served, tenant), each listed once
    running: dict[int, Work] = field(default_factory=dict)
    step_rows: int = 0  # of what runs, as the next
    own_bytes: int = 0

    def has_room(self, work: Work) -> bool:
        limits = self.limits
        return not self.running or (
            len(self.running) < limits.requests
            and self.step_rows + work.step_rows <= limits.step_rows
            and self.own_bytes + work.own_bytes <= limits.own_bytes
        )


class Scheduler:
    """Decides for one device. `limits`: of the prompts in one pass."""

    def __init__(self, limits: PassLimits) -> None:
        self.limits = limits
        self._works: dict[int, Work] = {}  # all that wait or run
        self._kinds: dict[str, _Kind] = {}
        self._running: dict[int, _Kind] = {}
        self._now = 0.0  # what the kind that entered last had been given by then

    def open(self, kind: str, limits: KindLimits) -> None:
        """Names a kind of work; its limits may be given anew."""
        self._kinds.setdefault(kind, _Kind(limits)).limits = limits

    @property
    def num_waiting(self) -> int:
        return len(self._works) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, work: Work) -> None:
        """Puts work into its queue."""
        assert work.number not in self._works, "a number names one work"
        kind = self._kinds[work.kind]
        if not kind.order:
            kind.served = max(kind.served, self._now)  # who did not wait has earned no credit
        tenant = kind.tenants.setdefault(work.tenant, _Tenant(kind.now))
        if not tenant.listed:
            tenant.served, tenant.listed = max(tenant.served, kind.now), True
            heapq.heappush(kind.order, (tenant.served, work.tenant))
        due = work.arrival_s + _PATIENCE_S if work.deadline_s is None else work.deadline_s
        heapq.heappush(tenant.queue, (due, work.number))
        self._works[work.number] = work

    def cancel(self, number: int) -> bool:
        """Takes work out, wherever it is; returns whether there was such work."""
        if number in self._running:
            self.end(number)
            return True
        return self._works.pop(number, None) is not None  # its place in the queue is skipped when it comes up

    def end(self, number: int) -> None:
        """Work that ran is done."""
        work, kind = self._works.pop(number), self._running.pop(number)
        del kind.running[number]
        kind.step_rows -= work.step_rows
        kind.own_bytes -= work.own_bytes

    def turn(self) -> Turn:
        """Who computes in the next pass. Whoever enters runs until `end`."""
        step = tuple(self._running)
        return Turn(tuple(work.number for work in self._entering()), step)

    def _entering(self) -> Iterator[Work]:
        waiting = {name: kind for name, kind in self._kinds.items() if kind.order}
        taken = _Taken(self.limits)
        while waiting:
            name = min(waiting, key=lambda each: waiting[each].served)
            kind = waiting[name]
            work = self._head(kind)
            if work is None or not kind.has_room(work) or not taken.add(work):
                del waiting[name]  # until the next turn: what came after it would overtake it
                continue
            self._start(kind, work)
            yield work

    def _head(self, kind: _Kind) -> Work | None:
        """The next work of a kind: of the tenant that was given least, the one that is due first."""
        while kind.order:
            served, name = kind.order[0]
            tenant = kind.tenants[name]
            while tenant.queue and tenant.queue[0][1] not in self._works:
                heapq.heappop(tenant.queue)  # was cancelled
            if not tenant.queue:
                tenant.listed = False
                heapq.heappop(kind.order)
            elif served != tenant.served:
                heapq.heapreplace(kind.order, (tenant.served, name))
            else:
                return self._works[tenant.queue[0][1]]
        return None

    def _start(self, kind: _Kind, work: Work) -> None:
        tenant = kind.tenants[work.tenant]
        heapq.heappop(tenant.queue)
        kind.now, self._now = tenant.served, kind.served
        tenant.served += work.rows
        kind.served += work.rows / kind.limits.share
        kind.running[work.number] = work
        kind.step_rows += work.step_rows
        kind.own_bytes += work.own_bytes
        self._running[work.number] = kind
        if len(kind.tenants) > 2 * len(kind.order) + _IDLE_TENANTS:
            kind.tenants = {name: t for name, t in kind.tenants.items() if t.listed or t.served > kind.now}

    def check(self) -> None:
        """Asserts that everything is in one place, and that sums are right."""
        queued = [number for kind in self._kinds.values() for t in kind.tenants.values() for _, number in t.queue]
        alive = [number for number in queued if number in self._works]
        assert len(queued) == len(set(queued)), "a number stands in two queues"
        assert not set(alive) & set(self._running), "what runs still waits"
        assert set(alive) | set(self._running) == set(self._works), "work was lost"
        for kind in self._kinds.values():
            assert kind.step_rows == sum(work.step_rows for work in kind.running.values())
            assert kind.own_bytes == sum(work.own_bytes for work in kind.running.values())
            listed = [name for _, name in kind.order]
            assert sorted(listed) == sorted(name for name, tenant in kind.tenants.items() if tenant.listed)


class _Taken:
    """What the prompts of one pass take of its limits; the first one always fits.

    Blocks that prompts share count once. They are told apart only where the pass would be too large without sharing.
    """

    def __init__(self, limits: PassLimits) -> None:
        self._limits = limits
        self._works: list[Work] = []
        self._rows = self._kv_bytes = 0  # bytes: no fewer than it takes
        self._keys: dict[ContentKey, int] = {}  # of the first `_num_merged` works
        self._num_merged = 0

    def add(self, work: Work) -> bool:
        """Takes work in, if it fits."""
        rows, kv_bytes = self._rows + work.rows, self._kv_bytes + sum(work.keys.values())
        if self._works:
            if work.phase != self._works[0].phase or rows > self._limits.rows:
                return False
            if kv_bytes > self._limits.kv_bytes:
                kv_bytes = self._kv_bytes_with(work)
                if kv_bytes > self._limits.kv_bytes:
                    return False
        self._works.append(work)
        self._rows, self._kv_bytes = rows, kv_bytes
        return True

    def _kv_bytes_with(self, work: Work) -> int:
        for taken in self._works[self._num_merged :]:
            self._keys.update(taken.keys)
        self._num_merged = len(self._works)
        return sum(self._keys.values()) + sum(n for key, n in work.keys.items() if key not in self._keys)
