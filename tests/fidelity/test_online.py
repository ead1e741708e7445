"""The guard in a serving loop: it runs where nothing else does, trips on drift by construction, is obeyed at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse, Selection, UserId
from rcllm.engine.engine import Engine
from rcllm.engine.job import Ticket
from rcllm.errors import ConfigError, UncalibratedError
from rcllm.fidelity.monitor import GuardEvent, GuardPolicy
from rcllm.fidelity.online import OnlineGuard
from rcllm.fidelity.shadow import Shadowing
from rcllm.schedule.admission import Admitted
from tests.fidelity.test_guard_drift import ISOLATED, add_noise_to_values, requests

AUTO = replace(ISOLATED, level=Level("auto"))
BLOCKS, EXACT = Level("blocks"), Level("exact")
ALL = Shadowing(share=1.0, cpu_share=1.0)
POLICY = GuardPolicy((BLOCKS, EXACT))


class Calibrated:
    """As if `blocks` had passed and `tail(0.1)` had not."""

    def admit(self, options: RankOptions) -> Admitted:
        if options.level == Level("tail", 0.1):
            raise UncalibratedError("it does not pass")
        return Admitted(replace(options, level=BLOCKS) if options.level.name == "auto" else options, ("calibrated",))

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        return (Admitted(replace(options, level=BLOCKS)),) if options.level == EXACT else ()


@dataclass
class Served:
    """A loop as a server runs it, in the test's own thread."""

    engine: Engine
    guard: OnlineGuard
    asked: Iterator[RankRequest]

    @classmethod
    def of(cls, engine: Engine, shadowing: Shadowing = ALL, policy: GuardPolicy = POLICY) -> Served:
        engine.admission = Calibrated()
        guard = OnlineGuard(engine, policy, shadowing)
        return cls(engine, guard, requests(AUTO, seed=0))

    def serve(self, idle: bool = True, **options: Any) -> RankResponse:
        asked = next(self.asked)
        if options:
            asked = replace(asked, options=replace(AUTO, **options))
        response = self.engine.rank(asked)
        self.guard.observe(asked, response)
        while idle and self.guard.turn():
            self.engine.step()
        return response


def spoil(engine: Engine) -> list[str]:
    """Corrupts every cached item, which `blocks` reads and `exact` does not; returns whose blocks these are."""
    owners = sorted({block.owner for block in engine.pool._blocks.values() if block.owner is not None})
    assert all(owner.startswith("item#") for owner in owners)
    return [owner for owner in owners if add_noise_to_values(engine, owner)]


@pytest.fixture
def served(engine: Engine) -> Served:
    return Served.of(engine)


def test_clean_answers_hold_and_receipts_say_so(served: Served) -> None:
    first, *_, last = [served.serve() for _ in range(12)]
    assert first.receipt.level == last.receipt.level == "blocks"
    assert first.receipt.guard == "blocks: no request of this kind was recomputed yet"
    assert last.receipt.guard.startswith("blocks: mean loss 0.00")
    assert last.receipt.guard.endswith("over 11 shadows")
    status = served.guard.status()
    assert (status.stats.counts.num_shadowed, status.events, status.num_waiting) == (12, (), 0)
    assert status.ladder == ("blocks", "exact")
    assert status.stats.counts.shadow_s > 0


def test_drift_trips_and_the_next_request_is_exact_without_a_restart(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[GuardEvent] = []
    served.guard._core._on_event = told.append
    for _ in range(10):
        served.serve()
    assert spoil(served.engine)
    with caplog.at_level(logging.WARNING, "rcllm.fidelity.shadow"):
        levels = [served.serve().receipt.level for _ in range(40)]
    at = levels.index("exact")
    assert levels == ["blocks"] * at + ["exact"] * (40 - at), "within 40 requests, and for good"
    assert [(event.kind, event.to_level) for event in told] == [("trip", "exact")]
    assert served.guard.status().events == tuple(told)
    assert "guard: trip from blocks to exact" in caplog.text
    after = served.serve(level=BLOCKS).receipt
    assert after.level == "exact", "also where the level that was left is asked for by its name"
    assert after.notes[-1] == "level exact instead of blocks, which the fidelity guard has left"
    assert after.guard.startswith("exact: ")


def test_a_level_that_was_left_is_on_no_ladder(served: Served) -> None:
    exact = replace(AUTO, level=EXACT)
    assert [each.options.level for each in served.engine.admission.cheaper(exact)] == [BLOCKS]
    for _ in range(20):
        served.serve()
    spoil(served.engine)
    while not served.guard.status().events:
        served.serve()
    assert served.engine.admission.cheaper(exact) == ()


def test_what_the_guard_does_not_know_is_as_the_calibration_says(served: Served) -> None:
    receipt = served.serve(level=Level("linked", 4)).receipt
    assert (receipt.level, receipt.guard, receipt.notes[-1]) == ("linked(4)", "", "calibrated")
    with pytest.raises(UncalibratedError):
        served.serve(level=Level("tail", 0.1))


def test_recovery_steps_back_once_the_drift_is_gone(engine: Engine) -> None:
    served = Served.of(engine, policy=GuardPolicy((BLOCKS, EXACT), target=0.2, margin=0.1, dwell=20))
    for _ in range(60):
        served.serve()
    spoilt = spoil(engine)
    while not served.guard.status().events:
        served.serve()
    for owner in spoilt:
        engine.pool.delete_owner(owner)
    while len(served.guard.status().events) < 2:
        served.serve()
    assert [event.kind for event in served.guard.status().events] == ["trip", "step_back"]
    assert served.serve().receipt.level == "blocks"


def test_shadows_wait_for_an_idle_engine_and_are_dropped_where_there_is_none(served: Served) -> None:
    for _ in range(6):
        served.serve(idle=False)
    assert served.guard.status().num_waiting == 4
    assert served.guard.status().stats.counts.num_dropped == 2
    assert served.guard.due_s == 0
    assert served.guard.turn()
    live = served.engine.submit(served.engine.rank_job, next(served.asked))
    assert served.engine.step()
    assert live.done, "what is asked goes before the shadow that was there first"
    assert served.guard.status().stats.counts.num_shadowed == 0
    while served.guard.turn():
        assert isinstance(served.guard._ticket, Ticket)
        served.engine.step()
    assert served.guard.status().stats.counts.num_shadowed == 4
    assert served.guard.due_s is None


def test_the_guard_rests_after_a_pass(engine: Engine) -> None:
    served = Served.of(engine, Shadowing(share=1.0, cpu_share=1e-6))
    served.serve()
    served.serve()
    counts = served.guard.status().stats.counts
    assert (counts.num_sampled, counts.num_shadowed) == (2, 1), "the second waits for the end of a long rest"
    assert served.guard.due_s == pytest.approx(served.guard.status().rests_s, rel=0.01)
    assert served.guard.status().rests_s > 100
    assert not served.guard.turn()


def test_fewer_candidates_are_held_against_as_many(served: Served) -> None:
    asked = next(served.asked)
    response = served.engine.rank(replace(asked, candidates=asked.candidates[1:5]))
    served.guard.observe(asked, response)
    while served.guard.turn():
        served.engine.step()
    counts = served.guard.status().stats.counts
    assert (counts.num_shadowed, counts.num_failed) == (1, 0)


def test_a_shadow_that_fails_ends_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(request: RankRequest) -> object:
        raise ConfigError("no")

    served.serve(idle=False)
    with monkeypatch.context() as patched:
        patched.setattr(served.guard._job, "open", refused)
        assert served.guard.turn()
        assert not served.engine.step()
        assert not served.guard.turn()
    assert served.guard.status().stats.counts.num_failed == 1
    served.serve()
    assert served.guard.status().stats.counts.num_shadowed == 1


def test_shadows_are_not_counted_as_requests(served: Served) -> None:
    for _ in range(3):
        served.serve()
    assert served.engine.intake.counts().num_accepted == 3


# ---- kinds of requests ----------------------------------------------------------------------------------------------

TAIL, CORRECTED, LINKED = Level("tail", 0.3), Level("corrected", 0.3, 0.3), Level("linked", 4)
TWO_PASS = Selection("two_pass")


class ByReadout:
    """As if `tail(0.3)` and `corrected` by two passes had passed for read-out label, and `linked(4)` for pointwise."""

    def admit(self, options: RankOptions) -> Admitted:
        if options.level.name != "auto":
            return Admitted(options)
        return (*self.cheaper(replace(options, level=EXACT)), Admitted(replace(options, level=EXACT)))[-2]

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        if options.level != EXACT:
            return ()
        corrected = replace(options, level=CORRECTED, selection=TWO_PASS)
        of_label = (corrected, replace(options, level=TAIL))
        return tuple(map(Admitted, of_label if options.readout == "label" else (replace(options, level=LINKED),)))


def test_each_kind_steps_along_what_its_admission_allows(engine: Engine) -> None:
    """A regression: there was one ladder, so that other kinds were not watched, or stepped to what had not passed."""
    engine.admission = ByReadout()
    guard = OnlineGuard(engine, GuardPolicy((TAIL, CORRECTED, EXACT)), ALL)
    served = Served(engine, guard, requests(AUTO, seed=0))
    kinds: list[dict[str, Any]] = [{}, {"readout": "pointwise", "layout": "history_first"}]
    assert [served.serve(**kind).receipt.level for kind in kinds] == ["tail(0.3)", "linked(4)"]
    label, pointwise = guard.status().stats.kinds
    assert (label.level, label.num_samples) == ("tail(0.3)", 1)
    assert (pointwise.level, pointwise.num_samples) == ("linked(4)", 1)
    for kind, after in zip(kinds, [(CORRECTED, TWO_PASS), (EXACT, Selection())], strict=True):
        asked = replace(AUTO, **kind)
        while guard._core.monitor(asked).observe(1.0, None, 0.0) is None:
            pass
        admitted = engine.admission.admit(asked)
        assert (admitted.options.level, admitted.options.selection) == after
        assert admitted.notes[-1].endswith("which the fidelity guard has left")
        assert guard._core.monitor(asked).rung == 1
    served.serve()
    assert guard.status().stats.kinds[0].num_samples == 1, "at the level that was stepped to"


def test_where_nothing_but_prefix_caching_is_allowed_there_is_nothing_to_guard(engine: Engine) -> None:
    """Their shadows would take the time of those that a step can follow from."""
    engine.admission = ByReadout()
    served = Served(engine, OnlineGuard(engine, GuardPolicy((TAIL, EXACT)), ALL), requests(AUTO, seed=0))
    engine.admission.inner.cheaper = lambda options: ()  # type: ignore[attr-defined]
    receipt = served.serve(level=EXACT).receipt
    assert (receipt.level, receipt.guard) == ("exact", "")
    assert served.guard.status().stats.counts.num_sampled == 0


def test_what_is_made_for_a_user_is_made_before_the_user_is_left_out(served: Served) -> None:
    """A regression: a training user's own choices counted in the recompute and not in the answer."""

    def complete(request: RankRequest) -> RankRequest:
        price = "known" if request.user_id == "u7" else "not"
        given = request.volatile or {item_id: {"price": price} for item_id in request.candidates}
        return replace(request, volatile=given)

    served.engine.prompter._complete = complete
    asked = replace(next(served.asked), user_id=UserId("u7"))
    shadow = served.guard._core.sample(asked, served.engine.rank(asked))
    assert shadow is not None
    full = next(served.guard._core.passes(shadow))
    assert full.user_id is None
    assert full.volatile[asked.candidates[0]] == {"price": "known"}
