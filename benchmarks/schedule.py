"""Does the scheduler keep what it promises: quick decisions, deadlines under overload, rankings beside other work?

Regime: `decision` and `overload` run the scheduler, the cost model and the ladder under a virtual clock, with costs
like those of SmolLM2-135M on two cores, 10 % of noise in every pass, and rates that nobody told the cost model. `cost`,
`mixed` and `shared` run that model on this machine: paper-shaped rankings at `blocks` with warm items, searches of 32
beams and texts of 24 tokens whose prompts reuse blocks too.

`arrival` has one such ranking come 50 ms after a text of 400 tokens entered, with the text bounded in several ways.

Ceiling: with estimates that are never wrong all accepted requests are in time and the device is always busy. What
sharing a segment can save is the share of the pass that reads it, which `shared` measures.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.harness import Options, console, dataset, options, percentile, run_parts, show
from benchmarks.ttft import paper_shaped
from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.config import CacheConfig, Config, ScheduleConfig
from rcllm.core.decoding import GenerateOptions, GenerateRequest, RecommendRequest, Speculation
from rcllm.core.ranking import ContentKey, Level, RankOptions, RankRequest
from rcllm.core.texts import TextRequest
from rcllm.data import named_items
from rcllm.engine.engine import Engine
from rcllm.engine.job import Ticket
from rcllm.engine.jobs.generate import Generator
from rcllm.engine.jobs.recommend import Recommender
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.decoder import Pass
from rcllm.schedule.cost import CostModel, Demand, Rates
from rcllm.schedule.ladder import Probe, Rung, Taken, budget_ms, choose
from rcllm.schedule.overload import refusal
from rcllm.schedule.scheduler import Scheduler
from rcllm.schedule.work import NO_LIMIT, KindLimits, PassLimits, Work

QUESTION = (
    "Time of a decision, deadlines kept at 3x overload, error of estimates, and P99 of rankings beside other work"
)
PARTS = ("decision", "overload", "cost", "mixed", "arrival", "shared")
TRUE = Rates(4.0, 0.55, 0.2, 8e-8, 6e-5)  # ms, of the machine that is simulated
WRONG = Rates.first(2 * 135e6, 4 * 30 * 576)  # what the cost model assumes of it at first
DEADLINE_MS = 2000.0
_PROBE = -1  # the way of a request that is computed to test its estimate, whatever its deadline
OVERLOAD = 3.0
_LONG, _HEAD_START_S = 400, 0.05  # tokens of a text's prompt, and how long before a ranking it comes


def main() -> None:
    chosen = options("schedule", QUESTION, PARTS)
    machine = _Machine(chosen)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "decision": decision,
        "overload": lambda: overload(chosen),
        "cost": lambda: cost(machine, chosen),
        "mixed": lambda: mixed(machine, chosen),
        "arrival": lambda: arrival(machine, chosen),
        "shared": lambda: shared(machine, chosen),
    }
    run_parts("schedule", QUESTION, chosen, parts)


# ---- a decision ------------------------------------------------------------------------------------------------------


def decision() -> dict[str, float]:
    """Turns with 1,000 waiting of three kinds, and what one more would find."""
    found = {}
    for num_tenants in (1, 1000):
        made = Scheduler(PassLimits(2048, 1 << 40))
        for kind in ("rank", "recommend", "generate"):
            made.open(kind, KindLimits())
        for number in range(1000):
            keys = {ContentKey(f"{number}/{i}".encode()): 1000 for i in range(40)}
            kind = ("rank", "recommend", "generate")[number % 3]
            made.add(Work(number, kind, 120, None, keys, tenant=str(number % num_tenants), ms=50.0))
        one, turns, queues = Work(1000, "rank", 120, tenant="0", ms=50.0), list[float](), list[float]()
        while made.num_waiting:
            if made.num_waiting > 900:
                queues.append(_seconds(partial(made.queue, one)))
            start = time.perf_counter()
            turn = made.turn()
            turns.append(time.perf_counter() - start)
            for number in (*turn.enter, *turn.step):
                made.end(number)
        found[f"turn_us_{num_tenants}_tenants"] = statistics.median(turns) * 1e6
        found[f"queue_us_{num_tenants}_tenants"] = statistics.median(queues) * 1e6
    show("Median time of a decision, 1,000 waiting", ["decision", "µs"], [[k, f"{v:.0f}"] for k, v in found.items()])
    return {f"decision_{name}": value for name, value in found.items()}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---- overload under a virtual clock ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A ranking of 20 candidates, and what it asks for at each level, the dearest first."""

    at_s: float
    demands: tuple[np.ndarray, ...]  # [1 + candidates, rates] each


@dataclasses.dataclass
class Outcome:
    """What became of the arrivals of one run."""

    accepted: int = 0
    in_time: int = 0
    expired: int = 0
    refused: int = 0
    most_late_ms: float = 0.0
    slowest_refusal_s: float = 0.0  # of the decision itself, by the real clock
    busy_s: float = 0.0
    end_s: float = 0.0
    steps: Counter[str] = dataclasses.field(default_factory=Counter)


def overload(chosen: Options) -> dict[str, float]:
    """Poisson arrivals at three times what the device can do, with and without cheaper levels on the ladder."""
    count, rows, metrics = 1500 if chosen.quick else 6000, list[list[str]](), dict[str, float]()
    for name, levels in (("no_ladder", 1), ("ladder", 2)):
        done = simulate(list(_arrivals(count, levels, chosen.seed)), chosen.seed)
        shares = {
            "accepted": done.accepted / count,
            "refused": done.refused / count,
            "accepted_in_time": done.in_time / max(done.accepted, 1),
            "expired": done.expired / max(done.accepted, 1),
            "busy": done.busy_s / done.end_s,
        }
        rows.append(
            [
                name,
                *(f"{value:.3f}" for value in shares.values()),
                f"{done.most_late_ms:.0f}",
                f"{done.slowest_refusal_s * 1e3:.1f}",
            ]
        )
        metrics |= {f"overload_{name}_{key}": value for key, value in shares.items()}
        metrics[f"overload_{name}_slowest_refusal_ms"] = done.slowest_refusal_s * 1e3
        metrics[f"overload_{name}_most_late_ms"] = done.most_late_ms
        metrics |= {f"overload_{name}_{step}": number / count for step, number in done.steps.items()}
    show(
        f"{count} rankings at {OVERLOAD:.0f}x of what the device can do, deadline {DEADLINE_MS:.0f} ms, virtual time",
        [
            "",
            "accepted",
            "refused",
            "in time, of accepted",
            "expired",
            "device busy",
            "latest, ms",
            "slowest refusal, ms",
        ],
        rows,
    )
    return metrics


def _arrivals(count: int, levels: int, seed: int) -> Iterator[Arrival]:
    """At the dearest level about 700 of 2,600 tokens are fresh, at the cheapest 100."""
    draw, now = np.random.default_rng(seed), 0.0
    for _ in range(count):
        tokens = int(draw.integers(2200, 3000))
        demands = tuple(_demands(tokens, fresh, draw) for fresh in (700, 100)[:levels])
        first = 4.0 + float(demands[0].sum(axis=0) @ TRUE.array())
        now += float(draw.exponential(first / 1e3 / OVERLOAD))
        yield Arrival(now, demands)


def _demands(tokens: int, fresh: int, draw: np.random.Generator) -> np.ndarray:
    parts = np.zeros((21, 5))
    share = draw.dirichlet(np.full(20, 20.0))
    parts[1:, 1], parts[1:, 3] = share * fresh * 0.8, share * (tokens - fresh) * 23_040
    parts[0, 0], parts[0, 1] = 1.0, fresh * 0.2
    parts[:, 4] = parts[:, 1] * tokens / 2
    if draw.random() < 0.2:
        parts[1:, 2] = np.where(draw.random(20) < 0.1, 90.0, 0.0)
    return parts


def simulate(arrivals: Sequence[Arrival], seed: int) -> Outcome:
    """Every arrival, in order; what becomes of them."""
    device = _Device(arrivals, seed)
    for number in range(len(arrivals)):
        device.run(until_s=arrivals[number].at_s)
        device.arrive(number)
    device.run(until_s=float("inf"))
    device.scheduler.check()
    return device.done


class _Device:
    """The scheduler, the cost model and the ladder, as the engine uses them, where passes take their true times."""

    def __init__(self, arrivals: Sequence[Arrival], seed: int) -> None:
        self._arrivals, self._draw = arrivals, np.random.default_rng(seed + 1)
        self.scheduler, self._costs, self._probe = Scheduler(PassLimits(2048, 1 << 40)), CostModel(WRONG), Probe()
        self.scheduler.open("rank", KindLimits())
        self._config, self.done = ScheduleConfig(min_candidates=10), Outcome()
        self._taken_as: dict[int, np.ndarray] = {}  # by number, the demands of those that were accepted
        self._probes = set[int]()
        self._entered: tuple[int, ...] = ()  # in the pass that runs
        self._demand, self._ms, self._ends_s, self._expected_s = Demand(), 0.0, 0.0, 0.0  # of that pass

    def run(self, until_s: float) -> None:
        """Ends the passes that end until then, and begins the next ones."""
        while self._entered and self._ends_s <= until_s:
            self._end()
            self._begin(self._ends_s)

    def arrive(self, number: int) -> None:
        """One request at the door, by the real clock as quick as it is."""
        start, arrival = time.perf_counter(), self._arrivals[number]
        taken = self._choice(arrival)
        if taken is None:
            self.done.refused += 1
            self.done.slowest_refusal_s = max(self.done.slowest_refusal_s, time.perf_counter() - start)
            return
        parts = arrival.demands[max(taken.way, 0)]
        self._taken_as[number] = parts if taken.keep is None else parts[[0, *(1 + i for i in taken.keep)]]
        work = self._work(number, arrival, self._taken_as[number])
        self.scheduler.add(dataclasses.replace(work, deadline_s=None) if taken.way == _PROBE else work)
        self._probes |= {number} if taken.way == _PROBE else set()
        self.done.accepted += taken.way != _PROBE
        self.done.steps.update(["level"] * (taken.way > 0) + ["candidates"] * (taken.keep is not None))
        if not self._entered:
            self._begin(arrival.at_s)

    def _choice(self, arrival: Arrival) -> Taken[int] | None:
        queue = self.scheduler.queue(self._work(-1, arrival, arrival.demands[0]))
        running_ms = max(0.0, self._expected_s - arrival.at_s) * 1e3 if self._entered else 0.0
        assert refusal(self._config, queue, running_ms) is None, "only deadlines bound this queue"
        rungs = [Rung(i, *_split(self._costs.each_ms(parts))) for i, parts in enumerate(arrival.demands)]
        left_ms = budget_ms(DEADLINE_MS, 0.0, running_ms + queue.ahead_ms)
        taken = choose(rungs, left_ms, (), self._config.min_candidates)
        if taken is None and self._probe.passes(lambda: not self._entered, self._costs.num_passes):
            return Taken(_PROBE)
        return taken

    def _work(self, number: int, arrival: Arrival, parts: np.ndarray) -> Work:
        rows, ms = int(parts[:, 1].sum()) + 1, sum(self._costs.each_ms(parts))
        deadline_s = arrival.at_s + DEADLINE_MS / 1e3
        return Work(number, "rank", rows, arrival_s=arrival.at_s, deadline_s=deadline_s, ms=ms)

    def _begin(self, now_s: float) -> None:
        turn = self.scheduler.turn(now_s)
        self.done.expired += len(turn.expired)
        self._entered = turn.enter
        if not turn.enter:
            return
        total = np.sum([self._taken_as[number].sum(axis=0) for number in turn.enter], axis=0)
        total[0] = 1.0
        self._demand, self._ms = Demand(*total.tolist()), float(total @ TRUE.array() * self._draw.lognormal(0.0, 0.1))
        self._expected_s, self._ends_s = now_s + self._costs.ms(self._demand) / 1e3, now_s + self._ms / 1e3
        self.done.busy_s += self._ms / 1e3

    def _end(self) -> None:
        self._costs.observe(self._demand, self._ms)
        self.done.end_s = self._ends_s
        for number in self._entered:
            self.scheduler.end(number)
            over_ms = (self._ends_s - self._arrivals[number].at_s) * 1e3 - DEADLINE_MS
            if number not in self._probes:
                self.done.in_time += over_ms <= 0
                self.done.most_late_ms = max(self.done.most_late_ms, over_ms)


def _split(each_ms: list[float]) -> tuple[float, tuple[float, ...]]:
    return each_ms[0], tuple(each_ms[1:])


# ---- on this machine -------------------------------------------------------------------------------------------------


class _Machine:
    """An engine with warm items, made when it is first wanted."""

    def __init__(self, chosen: Options) -> None:
        self._chosen = chosen
        self._made: tuple[Engine, list[RankRequest]] | None = None

    def __call__(self) -> tuple[Engine, list[RankRequest]]:
        """The engine, and requests at level `blocks`."""
        if self._made is None:
            data = dataset("amazon_scientific")
            schedule = ScheduleConfig(other_rows=64)
            engine = Engine.build(data.catalogue, Config(cache=CacheConfig(pool_mb=3000), schedule=schedule))
            found = paper_shaped(engine, data, 12 if self._chosen.quick else 40, self._chosen.seed)
            with console.status("warming"):
                engine.warm(named_items(found))
            blocks = RankOptions(level=Level("blocks"))
            self._made = engine, [dataclasses.replace(each, user_id=None, options=blocks) for each in found]
        return self._made


def cost(machine: _Machine, chosen: Options) -> dict[str, float]:
    """Rankings at three levels and of different length: how far each was off before it ran, from the first one on."""
    engine, requests = machine()
    assert engine.costs.stats().num_passes == 0, "it has seen no pass yet"
    draw, errors = np.random.default_rng(chosen.seed), list[float]()
    for number in range(40 if chosen.quick else 80):
        level = ("blocks", "blocks", "tail(0.1)", "linked(16)")[int(draw.integers(4))]
        request = requests[number % len(requests)]
        kept = request.candidates[: int(draw.integers(5, 21))]
        asked = dataclasses.replace(request, candidates=kept, options=RankOptions(level=Level.parse(level)))
        ticket = engine.submit(engine.rank_job, asked)
        assert isinstance(ticket, Ticket)
        estimate, start = engine.intake.needs_ms(ticket), time.perf_counter()
        assert engine.step()
        errors.append(abs(estimate / ((time.perf_counter() - start) * 1e3) - 1))
    found = {"first": errors[0], "of_20": statistics.median(errors[:20]), "after_20": statistics.median(errors[20:])}
    show("Relative error of the estimate of a ranking", ["", "error"], [[k, f"{v:.3f}"] for k, v in found.items()])
    return {f"cost_error_{name}": value for name, value in found.items()}


def mixed(machine: _Machine, chosen: Options) -> dict[str, float]:
    """Rankings at a fixed Poisson rate, alone and beside a text and a search that are always under way."""
    engine, requests = machine()
    count = 60 if chosen.quick else 200
    service = statistics.median(_seconds(partial(engine.rank, each)) for each in requests)
    gaps = np.random.default_rng(chosen.seed).exponential(4 * service, count)
    alone = _latencies(engine, requests, gaps, ())
    backgrounds: list[Callable[[], object]] = [_texts(engine, requests), _searches(engine, requests)]
    for background in backgrounds:
        background()  # the first of its kind allocates, and makes what it reads
    beside = _latencies(engine, requests, gaps, backgrounds)
    rows = [
        [name, *(f"{percentile(found, share) * 1e3:.0f}" for share in (0.5, 0.9, 0.99))]
        for name, found in (("rankings alone", alone), ("beside texts and searches", beside))
    ]
    show(f"{count} rankings, one in {4 * service * 1e3:.0f} ms", ["", "P50 ms", "P90 ms", "P99 ms"], rows)
    return {
        "mixed_rank_p99_ratio": percentile(beside, 0.99) / percentile(alone, 0.99),
        "mixed_rank_p50_ratio": percentile(beside, 0.5) / percentile(alone, 0.5),
        "mixed_alone_p99_ms": percentile(alone, 0.99) * 1e3,
        "mixed_beside_p99_ms": percentile(beside, 0.99) * 1e3,
    }


def arrival(machine: _Machine, chosen: Options) -> dict[str, float]:
    """A ranking that comes while the prompt of a text goes through the layers, by what bounds the text, in turn."""
    engine, requests = machine()
    scheduler, generator = engine.loop.scheduler, Generator(engine)
    words = engine.prompter.tokenizer.encode("A customer bought a lamp, a chair and a table. " * 200)[:_LONG]
    limits, found = scheduler.limits, dict[str, list[tuple[float, float]]]()
    for number in range(5 if chosen.quick else 20):
        request = requests[number % len(requests)]
        for rows in (None, NO_LIMIT, 128, 64, 32):
            scheduler.limits = dataclasses.replace(limits, other_rows=rows or NO_LIMIT)
            text = TextRequest(f"text-{number}", parts=(words,), options=GenerateOptions(max_tokens=1))
            took = _arriving(engine, request, None if rows is None else partial(engine.submit, generator, text))
            found.setdefault("alone" if rows is None else str(rows), []).append(took)
    scheduler.limits = limits
    found["unbounded"] = found.pop(str(NO_LIMIT))
    metrics, table = dict[str, float](), list[list[str]]()
    for name, times in found.items():
        ratio = statistics.median(own / alone for (own, _), (alone, _) in zip(times, found["alone"], strict=True))
        own_ms, text_ms = (statistics.median(each) * 1e3 for each in zip(*times, strict=True))
        metrics |= {f"arrival_ms_{name}": own_ms, f"arrival_ratio_{name}": ratio, f"arrival_text_ms_{name}": text_ms}
        table.append([name, f"{own_ms:,.0f}", f"{ratio:.2f}", f"{text_ms:,.0f}"])
    show(f"A ranking beside a prompt of {_LONG} tokens", ["other_rows", "P50 ms", "x alone", "until both ms"], table)
    return metrics


def _arriving(engine: Engine, request: RankRequest, first: Callable[[], object] | None) -> tuple[float, float]:
    """Seconds until the ranking is answered, and until everything is; `first` was begun before."""
    over = threading.Event()
    tickets = [] if first is None else [first()]

    def drive() -> None:
        while not over.is_set():
            if not engine.turn():
                time.sleep(1e-3)

    loop = threading.Thread(target=drive)
    loop.start()
    time.sleep(_HEAD_START_S if tickets else 0.0)
    start = time.perf_counter()
    ranking = engine.submit(engine.rank_job, request)
    done_s = [_done_s(each, start) for each in (ranking, *tickets)]
    over.set()
    loop.join()
    return done_s[0], max(done_s)


def _done_s(ticket: object, start: float) -> float:
    assert isinstance(ticket, Ticket)
    while not ticket.done:
        time.sleep(5e-4)
    return time.perf_counter() - start


def _latencies(
    engine: Engine, requests: Sequence[RankRequest], gaps: np.ndarray, backgrounds: Sequence[Callable[[], object]]
) -> list[float]:
    """Seconds from the arrival of each ranking to its answer; one thread runs the loop, one each asks for the rest."""
    over, found, lock = threading.Event(), list[float](), threading.Lock()
    others = [threading.Thread(target=_until, args=(over, background)) for background in backgrounds]
    for thread in others:
        thread.start()

    def ask(request: RankRequest) -> None:
        took = _seconds(partial(engine.rank, request))
        with lock:
            found.append(took)

    asking = []
    for number, gap in enumerate(gaps):
        time.sleep(gap)
        thread = threading.Thread(target=ask, args=(requests[number % len(requests)],))
        thread.start()
        asking.append(thread)
    for thread in asking:
        thread.join()
    over.set()
    for thread in others:
        thread.join()
    return found


def _until(over: threading.Event, run: Callable[[], object]) -> None:
    while not over.is_set():
        run()


def _texts(engine: Engine, requests: Sequence[RankRequest]) -> Callable[[], object]:
    generating, numbers = Generator(engine, batch_size=4), iter(range(1 << 30))

    def run() -> object:
        number = next(numbers)
        plain = GenerateOptions(max_tokens=24, speculation=Speculation("none"))
        history = requests[number % len(requests)].history
        asked = GenerateRequest(f"t{number}", history, None, plain, Level("blocks"), "shared")
        return generating.generate([asked])

    return run


def _searches(engine: Engine, requests: Sequence[RankRequest]) -> Callable[[], object]:
    sizes, draw, numbers = (64, 64, 64), np.random.default_rng(0), iter(range(1 << 30))
    items = tuple(engine.prompter.catalogue)[:5000]
    codes = np.stack([draw.integers(0, size, len(items)) for size in sizes], axis=1).astype(np.int32)
    tokens = CodeTokens(tuple(np.arange(1000 + 64 * i, 1064 + 64 * i, dtype=np.int32) for i in range(3)))
    recommending = Recommender(engine, LiveCodes(CodeIndex.build(codes, items, sizes)), tokens)

    def run() -> object:
        number = next(numbers)
        history = requests[number % len(requests)].history
        asked = RecommendRequest(f"s{number}", history, n=10, beam=32, level=Level("blocks"))
        return recommending.recommend_batch([asked])

    return run


def shared(machine: _Machine, chosen: Options) -> dict[str, float]:
    """Eight rankings in one pass that all read one segment, as eight groups and as one group that reads it once.

    The one group is what reading once would cost at best: the same rows and keys, without what each row must not see.
    """
    engine, _ = machine()
    decoder, per_request, count = engine.decoder, 100, 8
    spec, found = decoder.spec, dict[str, float]()
    for length in (200, 800, 2400):
        shape = (spec.num_layers, 2, spec.num_kv_heads, length, spec.head_dim)
        kv = torch.randn(shape, dtype=engine.pool.dtype) * 0.1
        apart = _pass(kv, [per_request] * count)
        once = _pass(kv, [per_request * count])
        none = _pass(kv[:, :, :, :1].contiguous(), [per_request] * count)
        times = {name: list[float]() for name in ("apart", "once", "none")}
        for _ in range(4 if chosen.quick else 10):
            for name, work in (("apart", apart), ("once", once), ("none", none)):
                times[name].append(_seconds(partial(decoder.forward, work)))
        apart_s, once_s, none_s = (statistics.median(values[1:]) for values in times.values())
        found[f"{length}_apart_ms"], found[f"{length}_once_ms"] = apart_s * 1e3, once_s * 1e3
        found[f"{length}_reading_share"] = 1 - none_s / apart_s
        found[f"{length}_gain"] = apart_s / once_s
    show(
        "A pass of 8 rankings, 100 rows each, that read one segment",
        ["tokens of the segment", "8 groups, ms", "read once, ms", "share that reads it", "gain"],
        [
            [str(n), *(f"{found[f'{n}_{k}']:.2f}" for k in ("apart_ms", "once_ms", "reading_share", "gain"))]
            for n in (200, 800, 2400)
        ],
    )
    return {f"shared_{name}": value for name, value in found.items()}


def _pass(kv: torch.Tensor, rows: Sequence[int]) -> Pass:
    """Groups of so many rows, each row a question of its own after the segment."""
    length, groups = kv.shape[3], list[Group]()
    for count in rows:
        sees = np.zeros((count + 1, count + 1), dtype=bool)
        sees[1:, 0] = True
        block, offset = np.arange(1, count + 1, dtype=np.int32), np.zeros(count, dtype=np.int32)
        groups.append(Group((Segment(kv, 0, 0, length, 0),), block, offset, sees))
    total = sum(rows)
    ids, positions = torch.arange(total) % 1000 + 1000, torch.full((total,), length)
    return Pass(ids, positions, groups, torch.arange(total))


if __name__ == "__main__":
    main()
