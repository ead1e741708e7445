"""The engine asks before it plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rcllm.core.ranking import Level, RankOptions
from rcllm.engine.engine import Engine
from rcllm.errors import UncalibratedError
from rcllm.fidelity.calibration import Calibrated
from rcllm.schedule.admission import Admitted, Identity, Open
from tests.engine import tiny


def test_without_a_calibration_auto_is_exact(engine: Engine) -> None:
    auto, exact = (engine.rank(tiny.request(level=level, user=None)) for level in ("auto", "exact"))
    assert auto.receipt.level == "exact"
    assert auto.scores == exact.scores
    assert "rcllm calibrate" in auto.receipt.notes[-1]
    assert engine.rank(tiny.request(level="blocks")).receipt.level == "blocks", "the library's default is open"


def test_a_refused_request_computes_nothing(engine: Engine) -> None:
    engine.admission = Calibrated.of(None, engine.identity, "instruction")
    with pytest.raises(UncalibratedError, match="--allow-uncalibrated"):
        engine.rank(tiny.request(level="tail(0.1)"))
    assert engine.stats().num_blocks == 0
    assert engine.rank(tiny.request(level="auto")).receipt.level == "exact"


def test_what_is_admitted_is_what_is_computed(engine: Engine) -> None:
    class Half:
        def admit(self, options: RankOptions) -> Admitted:
            return Admitted(replace(options, level=Level("tail", 0.5)), ("half",))

    asked = engine.rank(tiny.request(level="tail(0.5)", user=None))
    engine.admission = Half()
    given = engine.rank(tiny.request(level="blocks", user=None))
    assert (given.receipt.level, given.receipt.notes[-1]) == ("tail(0.5)", "half")
    assert given.scores == asked.scores


def test_build_tells_the_factory_what_the_engine_is(one_compute_thread: None) -> None:
    told: list[tuple[Identity, str]] = []

    def factory(identity: Identity, context: str) -> Open:
        told.append((identity, context))
        return Open.of(identity, context)

    engine = Engine.build(tiny.catalogue(), tiny.config(context="bos", mask="blocks"), admission=factory)
    assert told == [(engine.identity, "bos")]
    assert (engine.identity.mask, engine.identity.dtype, engine.identity.kv_dtype) == ("blocks", "fp32", "fp32")
    assert engine.rank(tiny.request(level="auto")).receipt.level == "blocks"
    other = tiny.fresh(tiny.TORCH).identity
    assert {text.split()[0] for text in engine.identity.differences(other)} == {"model", "mask"}


def test_what_is_open_saves_time_by_what_is_exact_alone() -> None:
    exact = RankOptions(Level("exact"))
    assert Open("causal").cheaper(exact) == ()
    (blocks,) = Open("blocks").cheaper(exact)
    assert blocks.options.level == Level("blocks")
    assert "exact as well under the model's mask" in blocks.notes[0]
    assert Open("blocks").cheaper(blocks.options) == ()
