"""What runs next: who waits, who runs, and whose turn it is. Never imports torch, never sees a prompt.

Kinds and, within a kind, tenants take turns by the rows that they were given (start-time fair queueing: Goyal et al.,
1996); within a tenant, work goes by its deadline, or by its arrival where it has none. What runs takes a step in every
pass, beside the prompts that enter.

One rule bounds what holds up work of a single pass, which is hurried: between two of its passes, and beside one, what
goes on is given `PassLimits.other_rows` rows. What needs more has the next pass for itself, and hurried work enters
between the layers of that (`interlude`), whenever so many rows of it are done.

    add → waiting —turn, interlude→ running —end→ gone       cancel: from either, at once; expired: from waiting

Invariants: a number is in one place at a time; who was given least goes first, and is waited for where it needs more
room, so that nothing starves; what was cancelled is in no turn. The time is an argument. Not thread-safe: the engine
locks.
"""

from __future__ import annotations

import heapq
from bisect import bisect, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rcllm.core.ranking import ContentKey
from rcllm.schedule.cost import MARGIN
from rcllm.schedule.work import KindLimits, PassLimits, Queue, Turn, Work

_PATIENCE_S = 1.0  # work without a deadline stands in its queue like work that has this long from its arrival
_IDLE_TENANTS = 64  # whose shares are remembered before those that no longer matter are forgotten
_HOPELESS = 0.5  # work that has less than this share of its estimated time left is late even where that is too high

_Place = tuple[float, int, float]  # of waiting work in its queue: when it is due, its number, its estimated ms


@dataclass(slots=True)
class _Tenant:
    """The waiting work of one tenant, of one kind."""

    served: float  # rows that it was given, by its share; never behind those who waited while it did not
    share: float
    queue: list[_Place] = field(default_factory=list)  # in order
    ms: float = 0.0  # of all of it
    listed: bool = False  # in its kind's order

    def put(self, place: _Place) -> None:
        insort(self.queue, place)
        self.ms += place[2]

    def take(self, place: _Place) -> None:
        del self.queue[bisect(self.queue, place) - 1]
        self.ms = self.ms - place[2] if self.queue else 0.0

    def ms_before(self, due: float) -> float:
        """Of what is due earlier, or at the same time and was there before."""
        end = bisect(self.queue, due, key=lambda place: place[0])
        return self.ms if end == len(self.queue) else sum(place[2] for place in self.queue[:end])


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
    num_waiting: int = 0
    waiting_rows: int = 0

    def has_room(self, work: Work) -> bool:
        limits = self.limits
        return not self.running or (
            len(self.running) < limits.requests
            and self.step_rows + work.step_rows <= limits.step_rows
            and self.own_bytes + work.own_bytes <= limits.own_bytes
        )

    @property
    def waiting_ms(self) -> float:
        return sum(tenant.ms for tenant in self.tenants.values())

    def ms_before(self, tenant: str, due: float, ms: float, share: float) -> float:
        """The estimated time of what goes before new work of a tenant that has this share.

        Its own that is due earlier, and meanwhile of every other tenant as much as its share allows.
        """
        own = self.tenants.get(tenant)
        before = own.ms_before(due) if own else 0.0
        fair = (before + ms) / share
        others = (each for name, each in self.tenants.items() if each.queue and name != tenant)
        return before + sum(min(each.ms, fair * each.share) for each in others)


class Scheduler:
    """Decides for one device. `limits`: of one pass; `shares`: of tenants, 1 for those that are not named."""

    def __init__(self, limits: PassLimits, shares: Mapping[str, float] | None = None) -> None:
        self.limits, self._shares = limits, dict(shares or {})
        self._works: dict[int, Work] = {}  # all that wait or run
        self._kinds: dict[str, _Kind] = {}
        self._running: dict[int, _Kind] = {}
        self._latest: list[tuple[float, int]] = []  # a heap of (when its deadline is lost, number); some are gone
        self._now = 0.0  # what the kind that entered last had been given by then
        self._owed = False  # what goes on was left out for hurried work, and has the next turn
        self._pass_bytes = 0  # of KV that the prompts of the latest turn read, until their pass has ended
        self.num_hurried = 0  # that wait, of a single pass and not for idle time; to be looked at without a lock

    def open(self, kind: str, limits: KindLimits) -> None:
        """Names a kind of work; its limits may be given anew."""
        self._kinds.setdefault(kind, _Kind(limits)).limits = limits

    @property
    def num_waiting(self) -> int:
        return len(self._works) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def other_rows(self) -> int:
        """Of everything that goes on: the next steps of what runs, and the prompts that wait."""
        going_on = (kind for kind in self._kinds.values() if (work := self._head(kind)) is not None and work.goes_on)
        return sum(kind.step_rows for kind in self._kinds.values()) + sum(kind.waiting_rows for kind in going_on)

    def queue(self, work: Work) -> Queue:
        """What `work` would find, were it added now. Changes nothing."""
        kinds = {name: kind for name, kind in self._kinds.items() if kind.num_waiting and not kind.limits.idle}
        kind = self._kinds[work.kind]
        before = kind.ms_before(work.tenant, _due(work), work.ms, self._share(work.tenant))
        fair = (before + work.ms) / kind.limits.share
        others = sum(min(k.waiting_ms, fair * k.limits.share) for name, k in kinds.items() if name != work.kind)
        tenants = {name: len(t.queue) for k in kinds.values() for name, t in k.tenants.items() if t.queue}
        return Queue(
            sum(k.num_waiting for k in kinds.values()),
            sum(len(k.tenants[work.tenant].queue) for k in kinds.values() if work.tenant in k.tenants),
            len(tenants.keys() | {work.tenant}),
            before + others,
            sum(k.waiting_rows for k in kinds.values()),
        )

    def add(self, work: Work) -> None:
        """Puts work into its queue."""
        assert work.number not in self._works, "a number names one work"
        kind = self._kinds[work.kind]
        if not kind.order:
            kind.served = max(kind.served, self._now)  # who did not wait has earned no credit
        tenant = kind.tenants.setdefault(work.tenant, _Tenant(kind.now, self._share(work.tenant)))
        if not tenant.listed:
            tenant.served, tenant.listed = max(tenant.served, kind.now), True
            heapq.heappush(kind.order, (tenant.served, work.tenant))
        tenant.put(_place(work))
        kind.num_waiting += 1
        kind.waiting_rows += work.rows
        self.num_hurried += _is_hurried(work, kind)
        if work.deadline_s is not None:
            heapq.heappush(self._latest, (work.deadline_s - _HOPELESS * work.ms / 1e3, work.number))
        self._works[work.number] = work

    def cancel(self, number: int) -> bool:
        """Takes work out, wherever it is; returns whether there was such work."""
        if number in self._running:
            self.end(number)
        elif number in self._works:
            self._leave(self._works.pop(number))
        else:
            return False
        return True

    def end(self, number: int) -> None:
        """Work that ran is done."""
        work, kind = self._works.pop(number), self._running.pop(number)
        del kind.running[number]
        kind.step_rows -= work.step_rows
        kind.own_bytes -= work.own_bytes

    @property
    def waiting_rows(self) -> int:
        """Of all prompts that wait."""
        return sum(kind.waiting_rows for kind in self._kinds.values())

    def turn(self, now_s: float = 0.0, beside_bytes: int = 0) -> Turn:
        """Who computes in the next pass. Whoever enters runs until `end`; who has expired is gone.

        `beside_bytes`: of KV that a pass which is under way reads meanwhile.
        """
        expired = tuple(self._expiring(now_s))
        waiting, running = self._waiting(), list(self._running)
        heads = [work for kind in waiting.values() if (work := self._head(kind)) is not None]
        if self._owed and (running or any(work.goes_on for work in heads)):
            waiting = {name: kind for name, kind in waiting.items() if not self._heads_hurried(kind)}
            heads = [work for work in heads if work.goes_on]
        self._owed = False
        room = _Room(self.limits.other_rows if any(not work.goes_on for work in heads) else 1 << 60)
        stepping = {id(kind) for kind in self._kinds.values() if kind.running and room.take(kind.step_rows)}
        taken = _Taken(self.limits, now_s, beside_bytes)
        enter = tuple(self._entering(waiting, taken, room) if waiting or running else self._fill_idle_time(taken))
        self._owed, self._pass_bytes = room.was_short, taken.kv_bytes
        step = tuple(number for number in running if id(self._running[number]) in stepping)
        yields = not any(_is_hurried(self._works[number], self._running[number]) for number in enter)
        return Turn(enter, step, expired, yields, taken.kv_bytes - beside_bytes)

    def pass_ended(self, beside_bytes: int = 0) -> None:
        """What the prompts of the latest turn read is free again, but for what is read by passes under way."""
        self._pass_bytes = beside_bytes

    def interlude(self, rows: float, now_s: float = 0.0) -> Turn:
        """Hurried work that enters between the layers of a pass without any: the latest turn's, or another model's.

        `rows`: of that pass which went through all layers, or came to as much, since it began or made way.
        """
        if not self.num_hurried or rows < self.limits.other_rows:
            return Turn()
        expired = tuple(self._expiring(now_s))
        waiting = {name: kind for name, kind in self._waiting().items() if self._heads_hurried(kind)}
        taken = _Taken(self.limits, now_s, self._pass_bytes)
        return Turn(tuple(self._entering(waiting, taken, _Room(0))), (), expired)

    def _share(self, tenant: str) -> float:
        return self._shares.get(tenant, 1.0)

    # ---- waiting ----

    def _waiting(self) -> dict[str, _Kind]:
        """Kinds that have work waiting, but for what is for idle time."""
        return {name: kind for name, kind in self._kinds.items() if kind.num_waiting and not kind.limits.idle}

    def _heads_hurried(self, kind: _Kind) -> bool:
        return (work := self._head(kind)) is not None and not work.goes_on

    def _leave(self, work: Work) -> None:
        """Work leaves its queue."""
        kind = self._kinds[work.kind]
        kind.tenants[work.tenant].take(_place(work))
        kind.num_waiting -= 1
        kind.waiting_rows -= work.rows
        self.num_hurried -= _is_hurried(work, kind)

    def _expiring(self, now_s: float) -> Iterator[int]:
        """Takes out whose deadline can no longer be kept."""
        while self._latest and self._latest[0][0] < now_s:
            number = heapq.heappop(self._latest)[1]
            if number in self._works and number not in self._running:
                self._leave(self._works.pop(number))
                yield number

    # ---- entering ----

    def _entering(self, waiting: dict[str, _Kind], taken: _Taken, room: _Room) -> Iterator[int]:
        """`room`: for prompts of what goes on."""
        while waiting:
            name = min(waiting, key=lambda each: waiting[each].served)
            kind = waiting[name]
            work = self._head(kind)
            if work is None or not kind.has_room(work) or not taken.fits(work) or not self._is_let_in(work, room):
                del waiting[name]  # until the next turn: what came after it would overtake it
                continue
            taken.add(work)
            self._start(kind, work)
            yield work.number

    def _is_let_in(self, work: Work, room: _Room) -> bool:
        return not work.goes_on or room.take(work.rows)

    def _fill_idle_time(self, taken: _Taken) -> Iterator[int]:
        """One work of a kind that runs where nothing else does."""
        for kind in self._kinds.values():
            if kind.limits.idle and (work := self._head(kind)) is not None:
                taken.add(work)
                self._start(kind, work)
                yield work.number
                return

    def _head(self, kind: _Kind) -> Work | None:
        """The next work of a kind: of the tenant that was given least, the one that is due first."""
        while kind.order:
            served, name = kind.order[0]
            tenant = kind.tenants[name]
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
        self._leave(work)
        kind.now, self._now = tenant.served, kind.served
        tenant.served += work.rows / tenant.share
        kind.served += work.rows / kind.limits.share
        kind.running[work.number] = work
        kind.step_rows += work.step_rows
        kind.own_bytes += work.own_bytes
        self._running[work.number] = kind
        if len(kind.tenants) > 2 * len(kind.order) + _IDLE_TENANTS:
            kind.tenants = {name: t for name, t in kind.tenants.items() if t.listed or t.served > kind.now}

    def check(self) -> None:
        """Asserts that everything is in one place, and that sums are right."""
        queued = [number for kind in self._kinds.values() for t in kind.tenants.values() for _, number, _ in t.queue]
        assert len(queued) == len(set(queued)), "a number stands in two queues"
        assert not set(queued) & set(self._running), "what runs still waits"
        assert set(queued) | set(self._running) == set(self._works), "work was lost"
        kinds = [(self._works[number], self._kinds[self._works[number].kind]) for number in queued]
        assert self.num_hurried == sum(_is_hurried(work, kind) for work, kind in kinds)
        for name, kind in self._kinds.items():
            some = [work for work in self._works.values() if work.kind == name and work.number not in self._running]
            assert (kind.num_waiting, kind.waiting_rows) == (len(some), sum(work.rows for work in some))
            assert abs(kind.waiting_ms - sum(work.ms for work in some)) < 1e-6 * (1 + len(some))
            assert kind.step_rows == sum(work.step_rows for work in kind.running.values())
            assert kind.own_bytes == sum(work.own_bytes for work in kind.running.values())
            assert all(tenant.queue == sorted(tenant.queue) for tenant in kind.tenants.values())
            listed = [tenant for _, tenant in kind.order]
            assert sorted(listed) == sorted(name for name, tenant in kind.tenants.items() if tenant.listed)


def _due(work: Work) -> float:
    return work.arrival_s + _PATIENCE_S if work.deadline_s is None else work.deadline_s


def _place(work: Work) -> _Place:
    return _due(work), work.number, work.ms


def _is_hurried(work: Work, kind: _Kind) -> bool:
    """Whether it is answered by a single pass, and somebody waits for that."""
    return not work.goes_on and not kind.limits.idle


class _Room:
    """Rows of what goes on, beside hurried work."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.was_short = False  # somebody was left out

    def take(self, rows: int) -> bool:
        """Takes them, if there are so many."""
        if rows > self._rows:
            self.was_short = True
            return False
        self._rows -= rows
        return True


class _Taken:
    """What the prompts of one pass take of its limits; the first one always fits.

    Blocks that prompts share count once. They are told apart only where the pass would be too large without sharing.
    Nobody joins whose rows would make one that is in it late: an answer comes with the end of its pass.
    """

    def __init__(self, limits: PassLimits, now_s: float, beside_bytes: int = 0) -> None:
        """`beside_bytes`: of KV that another pass holds meanwhile; the first one waits where both are too much."""
        self._limits, self._now_s, self._beside_bytes = limits, now_s, beside_bytes
        self._works: list[Work] = []
        self._rows, self._kv_bytes = 0, beside_bytes  # bytes: no fewer than it takes
        self._ms, self._deadline_s = 0.0, float("inf")
        self._keys: dict[ContentKey, int] = {}  # of the first `_num_merged` works
        self._num_merged = 0

    @property
    def kv_bytes(self) -> int:
        return self._kv_bytes

    def fits(self, work: Work) -> bool:
        """Whether work may join."""
        if self._works:
            if work.phase != self._works[0].phase or self._rows + work.rows > self._limits.rows:
                return False
            if self._now_s + MARGIN * (self._ms + work.ms) / 1e3 > self._deadline_s:
                return False
        elif not self._beside_bytes:
            return True
        return self._bytes_with(work) <= self._limits.kv_bytes

    def add(self, work: Work) -> None:
        """Takes work in, which fits."""
        self._kv_bytes = self._bytes_with(work)
        self._works.append(work)
        self._rows += work.rows
        self._ms += work.ms
        if work.deadline_s is not None and self._now_s + MARGIN * self._ms / 1e3 <= work.deadline_s:  # it can be kept
            self._deadline_s = min(self._deadline_s, work.deadline_s)

    def _bytes_with(self, work: Work) -> int:
        most = self._kv_bytes + sum(work.keys.values())
        if most <= self._limits.kv_bytes:
            return most
        for taken in self._works[self._num_merged :]:
            self._keys.update(taken.keys)
        self._num_merged = len(self._works)
        own = sum(n for key, n in work.keys.items() if key not in self._keys)
        return self._beside_bytes + sum(self._keys.values()) + own
