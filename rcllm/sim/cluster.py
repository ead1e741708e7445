"""The simulated cluster: requests arrive, are routed, wait, fetch or compute what is missing, and are answered.

Routing, scheduling and eviction are the objects of production (`cluster.route`, `schedule.Scheduler`, `store.Index`);
what is simulated is time. Invariant: a request is answered once, or counted as unanswered where no node is left.

    arrival → route → look-up ──▶ fetch ──▶ scheduler → pass → answer
       ▲                 └───── nothing to fetch ─────▲
       └── its node fails: routed again ◀─────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from rcllm.cluster.view import ClusterView, Holdings, Route
from rcllm.errors import CapacityError
from rcllm.schedule.work import PassLimits, Work
from rcllm.sim.cost import PassShape
from rcllm.sim.demand import Demand, There, demand
from rcllm.sim.holdings import LiveHoldings, user_key
from rcllm.sim.loop import EventKind, Loop
from rcllm.sim.machine import Machine
from rcllm.sim.node import BUILD, RANK, Node, Passing, PassRecord, SimJob
from rcllm.sim.outcome import Answered, Outcome
from rcllm.sim.spec import ClusterSpec, Failure, first_view, routed
from rcllm.sim.workload import ItemUpdate, SimRequest

_NO_LIMIT = 1 << 60


class Simulation:
    """One run.

    `on_pass`: told of every pass, for a trace. `is_enough`: asked after every answer; where it says so, the run ends,
    and what is then under way is unanswered.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        placed: Holdings,
        route: Route,
        *,
        failures: Iterable[Failure] = (),
        updates: Iterable[ItemUpdate] = (),
        on_pass: Callable[[PassRecord], None] | None = None,
        is_enough: Callable[[Answered], bool] | None = None,
    ) -> None:
        self.spec, self._route_by, self._on_pass, self._is_enough = spec, route, on_pass, is_enough
        self.loop = Loop()
        self.holdings = LiveHoldings(placed, spec.num_nodes)
        limits = PassLimits(spec.pass_rows, _NO_LIMIT)
        self.nodes = [Node(number, limits, spec.cache_bytes) for number in range(spec.num_nodes)]
        self.outcome = Outcome()
        self._free_s = np.zeros(spec.num_nodes)  # when a node's pass ends
        self._waiting_s = np.zeros(spec.num_nodes)  # estimated for what waits there
        num_machines = -(-spec.num_nodes // spec.per_machine)
        self._machines = [Machine(self.loop, spec.cores, spec.crowding, self._free_s) for _ in range(num_machines)]
        self._slow = dict(spec.slow)
        self._view = first_view(spec, self.holdings)
        self._requests: Iterator[SimRequest] = iter(())
        self._updates = iter(updates)
        self._last_s = float("inf")  # no update later than the last request
        self._num_jobs = 0
        self._stranded: list[SimJob] = []  # while no node is up
        for failure in failures:
            self.loop.at(failure.at_s, EventKind.NODE, self._fail, failure.node)
            if failure.back_s < float("inf"):
                self.loop.at(failure.back_s, EventKind.NODE, self._return, failure.node)

    def warm(self, number: int, key: int, tokens: int) -> None:
        """A node has a block in its cache before the first request, as far as it has room."""
        self._keep(self.nodes[number], key, tokens)

    def run(self, requests: Iterable[SimRequest]) -> Outcome:
        """Answers all requests, and says what became of them."""
        self._requests = iter(requests)
        self._next_arrival()
        self._next_update()
        if self.spec.view_s:
            self.loop.at(0.0, EventKind.VIEW, self._look)
        self.loop.run()
        self.outcome.num_unanswered = len(self._stranded) + sum(
            job.request is not None for node in self.nodes for job in node.jobs.values()
        )
        self.outcome.end_s = max((each.answered_s for each in self.outcome.answers), default=self.loop.now)
        self.outcome.num_events = self.loop.num_events
        self.outcome.busy_s = [node.busy_s for node in self.nodes]
        self.outcome.evictions += sum(node.cache.evictions for node in self.nodes)
        return self.outcome

    # ---- arriving ----

    def _next_arrival(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._last_s = self.loop.now
        else:
            self.loop.at(request.arrival_s, EventKind.ARRIVAL, self._arrive, request)

    def _arrive(self, request: SimRequest) -> None:
        self._next_arrival()
        self._num_jobs += 1
        job = SimJob(self._num_jobs, request)
        if self.spec.ingress_s:
            self._machines[0].begin(self.spec.ingress_s, EventKind.ARRIVAL, partial(self._send, job))
        else:
            self._send(job)

    def _send(self, job: SimJob) -> None:
        """To the node that the policy chooses."""
        assert job.request is not None
        try:
            decision = self._route_by(self._seen(), routed(self.spec, job.request))
        except CapacityError:  # no node is up
            self._stranded.append(job)
            return
        job.num_reachable = round(decision.reachable * decision.num_items)
        self._enter(self.nodes[decision.node], job)

    def _seen(self) -> ClusterView:
        """The cluster as the router knows it."""
        if not self.spec.view_s:
            self._refresh()
        return self._view

    def _look(self, _: object) -> None:
        self._refresh()
        if self.loop.now <= self._last_s or any(node.jobs for node in self.nodes):
            self.loop.at(self.loop.now + self.spec.view_s, EventKind.VIEW, self._look)

    def _refresh(self) -> None:
        queue = np.maximum(self._free_s - self.loop.now, 0.0) + self._waiting_s
        self._view = self._view.at(queue, np.minimum(queue / self.spec.full_queue_s, 1.0))

    # ---- on a node ----

    def _enter(self, node: Node, job: SimJob) -> None:
        """Looks up what is there, and fetches the rest where that is estimated to be sooner than computing it."""
        assert job.request is not None
        request, now = job.request, self.loop.now
        job.node, job.entered_s = node.number, now
        node.jobs[job.number] = job
        self._look_up(node, job, request)
        job.estimate_s = self.spec.costs.pass_s(self._demand(job, job.missing).shape)
        self._waiting_s[node.number] += job.estimate_s
        if job.fetched:
            self.loop.at(job.fetch_s, EventKind.FETCHED, self._fetched, (node, node.epoch, job))
        else:
            self._wait(node, job)

    def _look_up(self, node: Node, job: SimJob, request: SimRequest) -> None:
        holdings, number = self.holdings, node.number
        job.num_hits, job.num_fetched, job.missing, job.fetched = 0, 0, [], ()
        if self.spec.reuse.reads_items:
            for place, item in enumerate(request.items):
                if holdings.is_placed(number, item) or node.pin(job, item):
                    job.num_hits += 1
                else:
                    job.missing.append(place)
        job.history_there = self._has_history(node, job, request)
        if job.missing and self.spec.fetches:
            self._fetch(node, job, request)

    def _has_history(self, node: Node, job: SimJob, request: SimRequest) -> bool:
        return not self.spec.reuse.semantic_history and node.pin(job, user_key(request.user))

    def _fetch(self, node: Node, job: SimJob, request: SimRequest) -> None:
        spec, lengths = self.spec, request.tokens.items
        there = [place for place in job.missing if _is_held(self.holdings, request.items[place])]
        if not there:
            return
        begins = max(self.loop.now, node.link_free_s)
        ends = begins + spec.costs.fetch_s(sum(lengths[place] for place in there) * spec.kv_bytes_per_token)
        if ends - self.loop.now >= spec.costs.rows_s(sum(spec.reuse.saved_tokens(lengths[place]) for place in there)):
            return
        node.link_free_s = job.fetch_s = ends
        job.fetched = tuple(there)
        job.num_fetched = len(there)
        job.missing = [place for place in job.missing if place not in there]

    def _fetched(self, what: tuple[Node, int, SimJob]) -> None:
        node, epoch, job = what
        if epoch == node.epoch:
            self._wait(node, job)

    def _wait(self, node: Node, job: SimJob) -> None:
        if job.request is None:
            kind, rows = BUILD, job.build.tokens
        else:
            kind, rows = RANK, self._demand(job, job.missing).max_rows
        node.scheduler.add(Work(job.number, kind, rows, arrival_s=self.loop.now))
        self._start_soon(node)

    def _start_soon(self, node: Node) -> None:
        if node.passing is None and not node.start_is_due:
            node.start_is_due = True
            self.loop.at(self.loop.now, EventKind.PASS_START, self._start, (node, node.epoch))

    def _start(self, what: tuple[Node, int]) -> None:
        node, epoch = what
        if epoch != node.epoch:
            return
        node.start_is_due = False
        turn = node.scheduler.turn()
        if not turn.enter:
            return
        jobs = [node.jobs[number] for number in turn.enter]
        shape = self._pass_shape(node, jobs)
        now = self.loop.now
        seconds = self.spec.costs.pass_s(shape) * self._slow.get(node.number, 1.0)
        task = self._machine(node).begin(seconds, EventKind.PASS_END, partial(self._end, node), node.number)
        node.passing = Passing(jobs, shape, now, task)
        for job in jobs:
            job.started_s = now
            self._waiting_s[node.number] -= job.estimate_s

    def _machine(self, node: Node) -> Machine:
        return self._machines[node.number // self.spec.per_machine]

    def _pass_shape(self, node: Node, jobs: list[SimJob]) -> PassShape:
        """Of all that enters. What came into the cache since the look-up is read, and no block is built twice."""
        shape, building = PassShape(), set[int]()
        for job in jobs:
            if job.request is None:
                shape += PassShape(job.build.tokens, job.build.tokens**2 / 2)
                continue
            items = job.request.items
            job.history_there = job.history_there or self._has_history(node, job, job.request)
            job.missing = [place for place in job.missing if not node.pin(job, items[place])]
            job.built = [place for place in job.missing if items[place] not in building]
            found = self._demand(job, job.missing if self.spec.reuse.inline_misses else job.built)
            job.num_fresh, job.num_built = found.num_fresh, found.num_built
            if not self.spec.reuse.inline_misses:
                building.update(items[place] for place in job.built)
            shape += found.shape
        return shape

    def _demand(self, job: SimJob, missing: Iterable[int]) -> Demand:
        assert job.request is not None
        tokens = job.request.tokens
        sizes = [tokens.items[place] for place in missing]
        there = There(sum(tokens.items) - sum(sizes), sizes, job.history_there)
        return demand(tokens, there, self.spec.reuse, self.spec.model, self.spec.kv_bytes_per_token)

    def _end(self, node: Node) -> None:
        passing, now = node.passing, self.loop.now
        assert passing is not None
        node.passing = None
        node.busy_s += now - passing.started_s
        if self._on_pass is not None:
            self._on_pass(PassRecord(node.number, passing.started_s, now, len(passing.jobs), passing.shape))
        for job in passing.jobs:
            node.scheduler.end(job.number)
            node.unpin(job)
            del node.jobs[job.number]
            if job.request is None:
                self.holdings.renew(job.build.item)
            else:
                self._publish(node, job, job.request)
                if self.spec.egress_s:
                    told = partial(self._tell, job, job.request)
                    self._machine(node).begin(self.spec.egress_s, EventKind.PASS_END, told)
                else:
                    self._tell(job, job.request)
        self._start_soon(node)

    def _tell(self, job: SimJob, request: SimRequest) -> None:
        answered = _answer(job, request, self.loop.now)
        self.outcome.answers.append(answered)
        if self._is_enough is not None and self._is_enough(answered):
            self.loop.end()

    def _publish(self, node: Node, job: SimJob, request: SimRequest) -> None:
        """Blocks that came or were built stay in the node's cache, as far as it has room."""
        tokens = request.tokens
        kept = (*job.fetched, *(() if self.spec.reuse.inline_misses else job.built))
        for place in kept:
            self._keep(node, request.items[place], tokens.items[place])
        if not (self.spec.reuse.semantic_history or job.history_there) and tokens.history:
            self._keep(node, user_key(request.user), tokens.history)

    def _keep(self, node: Node, key: int, tokens: int) -> None:
        gone = node.keep(key, tokens * self.spec.kv_bytes_per_token, float(tokens * self.spec.model.num_layers))
        if gone is None:
            return
        self.holdings.add_copy(node.number, key)
        for each in gone:
            self.holdings.drop_copy(node.number, each)

    # ---- what happens to the cluster ----

    def _fail(self, number: int) -> None:
        """Everything on the node is gone; its requests are routed again, oldest first."""
        node = self.nodes[number]
        if not node.up:
            return
        jobs = [job for _, job in sorted(node.jobs.items())]
        self.outcome.evictions += node.cache.evictions
        for key in node.cache:
            self.holdings.drop_copy(number, int.from_bytes(key, "big", signed=True))
        node.up = False
        if node.passing is not None:
            node.busy_s += self.loop.now - node.passing.started_s
            self._machine(node).drop(node.passing.task)
        node.epoch += 1
        node.reset()
        self._free_s[number] = self._waiting_s[number] = 0.0
        self.holdings.lose(number)
        self._set_up(number, up=False)
        for job in jobs:
            if job.request is None:
                self._build(job.build)
                continue
            job.pinned.clear()
            job.retries += 1
            self._send(job)

    def _return(self, number: int) -> None:
        node = self.nodes[number]
        if node.up:
            return
        node.up = True
        self._set_up(number, up=True)
        num_bytes = sum(self.holdings.placed_bytes(number).values())
        self.loop.at(
            self.loop.now + num_bytes / self.spec.reload_bytes_per_s,
            EventKind.NODE,
            self._reloaded,
            (number, node.epoch),
        )
        stranded, self._stranded = self._stranded, []
        for job in stranded:
            self._send(job)

    def _reloaded(self, what: tuple[int, int]) -> None:
        number, epoch = what
        if self.nodes[number].epoch == epoch:
            self.holdings.regain(number)

    def _set_up(self, number: int, *, up: bool) -> None:
        states = self._view.up.copy()
        states[number] = up
        self._view = replace(self._view, up=states)

    def _next_update(self) -> None:
        update = next(self._updates, None)
        if update is not None:
            self.loop.at(update.time_s, EventKind.UPDATE, self._update, update)

    def _update(self, update: ItemUpdate) -> None:
        """Every block of the item is void; the node that it belongs to builds a new one."""
        if self.loop.now > self._last_s:
            return
        self._next_update()
        self.outcome.num_updates += 1
        self.holdings.outdate(update.item)
        for number in self.holdings.copies_of(update.item):
            self.nodes[number].drop(update.item)
            self.holdings.drop_copy(number, update.item)
        self._build(update)

    def _build(self, update: ItemUpdate) -> None:
        """Where no node of it is up, nobody builds it ahead: requests compute it as a miss."""
        home = self.holdings.placed_on(update.item)
        numbers = range(self.spec.num_nodes) if home.everywhere else home.nodes
        first = update.item % self.spec.num_nodes if home.everywhere else 0
        alive = (self.nodes[n] for n in (*numbers[first:], *numbers[:first]) if self.nodes[n].up)
        node = next(alive, None)
        if node is None:
            return
        self._num_jobs += 1
        job = SimJob(self._num_jobs, None, build=update)
        node.jobs[job.number] = job
        self._wait(node, job)


def _is_held(holdings: LiveHoldings, key: int) -> bool:
    held = holdings.held(key)
    return held.everywhere or bool(held.nodes)


def _answer(job: SimJob, request: SimRequest, now: float) -> Answered:
    return Answered(
        number=request.number,
        arrival_s=request.arrival_s,
        answered_s=now,
        queue_s=job.started_s - job.entered_s,
        node=job.node,
        num_items=len(request.items),
        num_hits=job.num_hits,
        num_reachable=job.num_reachable,
        num_fetched=job.num_fetched,
        num_tokens=request.tokens.total,
        num_fresh=job.num_fresh,
        num_built=job.num_built,
        retries=job.retries,
    )
