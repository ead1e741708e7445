"""The guard's budget, sampling and thread, over a ranker with known answers and a clock that tests turn."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse
from rcllm.core.receipts import RankReceipt
from rcllm.errors import CapacityError, ConfigError
from rcllm.fidelity.guard import Guard, append_to
from rcllm.fidelity.monitor import GuardEvent, GuardPolicy
from rcllm.fidelity.shadow import GuardCore, Shadowing, kind_of
from tests.engine import tiny

LADDER = (Level("blocks"), Level("tail", 0.2), Level("exact"))
POLICY = GuardPolicy(LADDER)
GOOD, BAD = (3.0, 2.0, 1.0), (1.0, 2.0, 3.0)
SECONDS = {"full": 2.0, "blocks": 0.1, "tail(0.2)": 0.5, "exact": 1.0}


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Ranker:
    """Answers `drifted` levels backwards, and takes its time on the clock."""

    clock: Clock
    drifted: frozenset[str] = frozenset()
    passes: list[tuple[float, RankRequest]] = field(default_factory=list)  # when, what

    def rank(self, request: RankRequest) -> RankResponse:
        assert request.options is not None
        self.passes.append((self.clock(), request))
        self.clock.sleep(SECONDS[str(request.options.level)])
        return self.answer(request)

    def answer(self, request: RankRequest) -> RankResponse:
        level = str((request.options or RankOptions(level=Level("blocks"))).level)
        scores = BAD if level in self.drifted else GOOD
        return RankResponse(request.request_id, request.candidates, scores, (0, 1, 2), receipt(level))

    @property
    def levels(self) -> list[str]:
        return [str(request.options.level) for _, request in self.passes if request.options]


def receipt(level: str) -> RankReceipt:
    names = dict.fromkeys(("readout", "layout", "label_place", "context", "history", "bias", "backend"), "")
    names |= dict.fromkeys(("node", "model"), "")
    numbers = dict.fromkeys(("num_tokens", "num_fresh", "num_reused", "num_computed"), 1)
    numbers |= dict.fromkeys(("kv_bytes_read", "kv_bytes_copied", "batch_size"), 1)
    values: dict[str, Any] = {**names, **numbers}
    return RankReceipt(level=level, stage_ms={}, blocks=(), **values)


def make(ranker: Ranker, policy: GuardPolicy = POLICY, **options: Any) -> GuardCore:
    settings = {key: options.pop(key) for key in ("share", "cpu_share", "patience_s") if key in options}
    keywords: dict[str, Any] = {
        "defaults": RankOptions(),
        "seed": 0,
        "idle": lambda: True,
        "clock": ranker.clock,
        "wall_clock": lambda: 1e9 + ranker.clock(),
        "sleep": ranker.clock.sleep,
        "on_event": lambda event: None,
    }
    shadowing = Shadowing(**{"share": 1.0, **settings})
    return GuardCore(ranker.rank, policy, shadowing, **{**keywords, **options})


def serve(core: GuardCore, ranker: Ranker, count: int = 1, **options: Any) -> None:
    """Requests that are answered at the guard's level, and shadowed at once where they are sampled."""
    for _ in range(count):
        asked = tiny.request(3, **options)
        assert asked.options is not None
        asked = replace(asked, options=replace(asked.options, level=core.level(asked.options)))
        if shadow := core.sample(asked, ranker.answer(asked)):
            core.run(shadow)


@pytest.fixture
def ranker() -> Ranker:
    return Ranker(Clock())


# ---- the budget ----


@pytest.mark.parametrize("cpu_share", [0.05, 0.5, 1.0])
def test_the_budget_holds_between_any_two_passes(ranker: Ranker, cpu_share: float) -> None:
    core = make(ranker, replace(POLICY, start=1), cpu_share=cpu_share)
    serve(core, ranker, 20)
    starts = [start for start, _ in ranker.passes]
    costs = [SECONDS[level] for level in ranker.levels]
    assert len(starts) == 40
    for i in range(len(starts)):
        for j in range(i + 1, len(starts)):
            assert sum(costs[i:j]) <= cpu_share * (starts[j] - starts[i]) * (1 + 1e-9)
    # and it is used: a guard that always has work rests no longer than it must
    assert sum(costs[:-1]) == pytest.approx(cpu_share * (starts[-1] - starts[0]))
    assert core.stats().counts.shadow_s == pytest.approx(sum(costs))


def test_a_quiet_night_saves_up_nothing(ranker: Ranker) -> None:
    core = make(ranker, cpu_share=0.1)
    serve(core, ranker)
    ranker.clock.sleep(1e6)
    serve(core, ranker, 2)
    (_, second, third) = (start for start, _ in ranker.passes)
    assert third - second == pytest.approx(SECONDS["full"] / 0.1)


def test_a_failed_pass_costs_what_it_took(ranker: Ranker) -> None:
    def fails(request: RankRequest) -> RankResponse:
        ranker.rank(request)
        raise CapacityError("too large")

    core = make(ranker, cpu_share=0.1)
    core._rank = fails
    for _ in range(2):
        with pytest.raises(CapacityError):
            serve(core, ranker)
    assert ranker.passes[1][0] - ranker.passes[0][0] == pytest.approx(SECONDS["full"] / 0.1)


def test_passes_wait_for_an_idle_engine(ranker: Ranker) -> None:
    core = make(ranker, idle=lambda: ranker.clock() >= 107.0, patience_s=30.0)
    serve(core, ranker)
    assert ranker.passes[0][0] == pytest.approx(107.0, abs=0.02)


def test_patience_ends(ranker: Ranker) -> None:
    """An engine that is never idle is still guarded."""
    core = make(ranker, idle=lambda: False, patience_s=30.0)
    serve(core, ranker)
    assert ranker.passes[0][0] == pytest.approx(130.0, abs=0.02)


# ---- what is shadowed, and how ----


def test_a_share_is_sampled_and_the_seed_decides_which(ranker: Ranker) -> None:
    def chosen(seed: int) -> list[bool]:
        core = make(ranker, share=0.1, seed=seed)
        asked = tiny.request(3)
        answer = ranker.answer(asked)
        return [core.sample(asked, answer) is not None for _ in range(5000)]

    first = chosen(1)
    assert 0.08 < sum(first) / len(first) < 0.12
    assert first == chosen(1)
    assert first != chosen(2)


def test_other_levels_than_the_one_in_use_are_not_judged(ranker: Ranker) -> None:
    core = make(ranker)
    asked = tiny.request(3, level="exact")
    assert core.sample(asked, ranker.answer(asked)) is None
    assert (core.stats().counts.num_observed, core.stats().counts.num_sampled) == (1, 0)


def test_a_shadow_of_a_level_that_was_left_is_stale(ranker: Ranker) -> None:
    ranker.drifted = frozenset({"blocks"})
    core = make(ranker)
    asked = tiny.request(3)
    waiting = core.sample(asked, ranker.answer(asked))
    assert waiting is not None
    serve(core, ranker, 10)
    before = len(ranker.passes)
    assert core.level(RankOptions()) == LADDER[1]
    core.run(waiting)
    assert (core.stats().counts.num_stale, len(ranker.passes)) == (1, before)


def test_users_are_left_out(ranker: Ranker) -> None:
    """What is derived from a user who was erased while the shadow waited must not be published again."""
    serve(make(ranker, replace(POLICY, start=1)), ranker)
    assert [request.user_id for _, request in ranker.passes] == [None, None]
    assert ranker.levels == ["full", "blocks"]


def test_a_running_bias_is_left_alone(ranker: Ranker) -> None:
    """It depends on the requests before, so the served scores cannot be compared: the level is ranked again."""
    serve(make(ranker), ranker, bias="running_mean")
    assert ranker.levels == ["full", "blocks"]
    assert [request.options.bias for _, request in ranker.passes if request.options] == ["none", "none"]


def test_requests_without_options_take_the_defaults(ranker: Ranker) -> None:
    core = make(ranker, defaults=RankOptions(level=Level("blocks"), readout="pointwise"))
    asked = replace(tiny.request(3), options=None)
    shadow = core.sample(asked, ranker.answer(asked))
    assert shadow is not None
    core.run(shadow)
    assert core.stats().kinds[0].requests == kind_of(RankOptions(readout="pointwise"))


def test_nothing_to_lose_is_counted(ranker: Ranker) -> None:
    core = make(ranker)
    asked = replace(tiny.request(1), options=RankOptions(level=Level("blocks")))
    alone = replace(ranker.answer(asked), scores=(1.0,))
    core._rank = lambda request: alone
    shadow = core.sample(asked, alone)
    assert shadow is not None
    core.run(shadow)
    assert (core.stats().counts.num_undefined, core.stats().counts.num_shadowed) == (1, 0)


# ---- steps ----


def test_kinds_of_requests_have_their_own_rung(ranker: Ranker, caplog: pytest.LogCaptureFixture) -> None:
    events: list[GuardEvent] = []
    core = make(ranker, on_event=events.append)
    serve(core, ranker, 20, readout="pointwise")
    ranker.drifted = frozenset({"blocks"})
    with caplog.at_level(logging.INFO, "rcllm.fidelity"):
        serve(core, ranker, 10, readout="label")
    assert core.level(RankOptions(readout="label")) == LADDER[1]
    assert core.level(RankOptions(readout="pointwise")) == LADDER[0]
    assert core.level(RankOptions(readout="likelihood")) == LADDER[0]  # never seen
    assert events == list(core.events)
    assert [(event.kind, event.mean_loss) for event in events] == [("trip", 1.0)]
    assert events[0].time_s > 1e9
    assert "trip from blocks to tail(0.2)" in caplog.text
    label = next(kind for kind in core.stats().kinds if kind.requests.startswith("label"))
    assert label.level == "tail(0.2)"


def test_back_down_by_shadows_of_the_cheaper_level(ranker: Ranker) -> None:
    ranker.drifted = frozenset({"blocks"})
    core = make(ranker)
    serve(core, ranker, 300)
    assert [event.kind for event in core.events] == ["trip"]  # blocks is shadowed, and stays bad
    ranker.drifted = frozenset()
    serve(core, ranker, 600)
    assert [event.kind for event in core.events] == ["trip", "step_back"]
    assert core.level(RankOptions()) == LADDER[0]


def test_a_cheaper_level_that_is_refused_hides_nothing(ranker: Ranker) -> None:
    ranker.drifted = frozenset({"tail(0.2)"})
    core = make(ranker, replace(POLICY, start=1))

    def rank(request: RankRequest) -> RankResponse:
        if request.options is not None and request.options.level == LADDER[0]:
            raise ConfigError("not calibrated")
        return ranker.rank(request)

    core._rank = rank
    serve(core, ranker, 10)
    assert [event.to_level for event in core.events] == ["exact"]
    assert core.stats().counts.num_failed > 0


def test_events_are_written_as_json_lines(ranker: Ranker, tmp_path: Path) -> None:
    path = tmp_path / "guard.jsonl"
    ranker.drifted = frozenset({"blocks", "tail(0.2)"})
    serve(make(ranker, on_event=append_to(path)), ranker, 30)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["kind"], row["from_level"], row["to_level"]) for row in rows] == [
        ("trip", "blocks", "tail(0.2)"),
        ("trip", "tail(0.2)", "exact"),
    ]


# ---- the thread ----


@dataclass
class Gate:
    """A ranker that waits within a pass until it is told to go on."""

    ranker: Ranker
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    leave: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def rank(self, request: RankRequest) -> RankResponse:
        self.entered.release()
        self.leave.acquire()
        return self.ranker.answer(request)


@pytest.fixture
def gate(ranker: Ranker) -> Iterator[Gate]:
    made = Gate(ranker)
    yield made
    made.leave.release(1000)


def threaded(rank: Callable[[RankRequest], RankResponse], **options: Any) -> Guard:
    return Guard(rank, POLICY, Shadowing(share=1.0, cpu_share=1.0, queue_size=2), **options)


def test_a_request_never_waits_for_a_pass(gate: Gate, ranker: Ranker) -> None:
    with threaded(gate.rank) as guard:
        asked = [replace(tiny.request(3), request_id=f"r{i}") for i in range(6)]
        guard.observe(asked[0], ranker.answer(asked[0]))
        gate.entered.acquire()  # the pass has begun, and will not end before `leave`
        for request in asked[1:]:
            guard.observe(request, ranker.answer(request))
        assert guard.stats().counts.num_dropped == 3  # two may wait
        assert guard.level(RankOptions()) == LADDER[0]
        gate.leave.release(1000)
        gate.entered.acquire()
        gate.entered.acquire()
    stats = guard.stats().counts
    assert (stats.num_observed, stats.num_sampled) == (6, 6)
    assert 2 <= stats.num_shadowed <= 3  # the last one may have been given up on leaving


def test_a_request_is_completed_while_its_user_is_known(ranker: Ranker) -> None:
    def complete(request: RankRequest) -> RankRequest:
        return replace(request, volatile={request.candidates[0]: {"price": str(request.user_id)}})

    with threaded(ranker.rank, complete=complete) as guard:
        asked = tiny.request(3)
        guard.observe(asked, ranker.answer(asked))
        while not guard.stats().counts.num_shadowed:
            pass
    assert [request.user_id for _, request in ranker.passes] == [None]
    assert ranker.passes[0][1].volatile == {asked.candidates[0]: {"price": "u1"}}


def test_the_thread_trips_and_tells(ranker: Ranker) -> None:
    ranker.drifted = frozenset({"blocks"})
    tripped = threading.Event()
    with threaded(ranker.answer, on_event=lambda event: tripped.set()) as guard:
        asked = tiny.request(3)
        while not tripped.wait(0.001):
            guard.observe(asked, ranker.answer(asked))
        assert guard.level(RankOptions()) == LADDER[1]
        assert [event.kind for event in guard.events] == ["trip"]


def test_errors_do_not_end_the_guard(ranker: Ranker, caplog: pytest.LogCaptureFixture) -> None:
    answered = threading.Event()

    def rank(request: RankRequest) -> RankResponse:
        if request.request_id == "bad":
            raise CapacityError("does not fit")
        answered.set()
        return ranker.answer(request)

    with threaded(rank) as guard, caplog.at_level(logging.ERROR, "rcllm.fidelity"):
        for name in ("bad", "good"):
            asked = replace(tiny.request(3), request_id=name)
            guard.observe(asked, ranker.answer(asked))
        assert answered.wait(60)
    assert guard.stats().counts.num_failed == 1
    assert "request bad could not be shadowed" in caplog.text


def test_leaving_ends_a_rest(ranker: Ranker) -> None:
    """A pass took long, so the guard rests for hours; leaving it must not take as long."""
    clock, passes = Clock(), threading.Semaphore(0)

    def rank(request: RankRequest) -> RankResponse:
        clock.sleep(1e5)
        passes.release()
        return ranker.answer(request)

    with Guard(rank, POLICY, Shadowing(share=1.0, cpu_share=0.01), clock=clock) as guard:
        asked = tiny.request(3)
        for _ in range(3):
            guard.observe(asked, ranker.answer(asked))
        passes.acquire()
    assert guard.stats().counts.num_shadowed <= 1
    assert guard._thread is not None
    assert not guard._thread.is_alive()


def test_making_one_starts_nothing(ranker: Ranker) -> None:
    before = threading.active_count()
    guard = threaded(ranker.rank)
    assert threading.active_count() == before
    asked = tiny.request(3)
    for _ in range(3):
        guard.observe(asked, ranker.answer(asked))
    assert not ranker.passes


@pytest.mark.parametrize("wrong", [{"share": 1.1}, {"cpu_share": 0.0}, {"queue_size": 0}, {"patience_s": -1.0}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Shadowing(**wrong)
