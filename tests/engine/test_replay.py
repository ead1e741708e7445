"""What was answered comes out again, whatever happened since; and where it does not, the first cause is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rcllm.core.decoding import GenerateOptions, GenerateRequest
from rcllm.core.ranking import Event, Item, RankOptions, RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.generate import Generator
from rcllm.errors import RequestError, answered
from rcllm.schedule.admission import Open
from rcllm.schedule.replay import Difference, first_difference, request_again
from tests.engine import tiny
from tests.engine.test_loop import items_for, recommender
from tests.fidelity.test_guard_drift import add_noise_to_values

ASKED = tiny.request(6, (30, 31), level="corrected(0.3, 0.3)")


def again(engine: Engine, request: RankRequest, response: RankResponse) -> RankResponse:
    pinned = request_again(request, response, engine.config.rank)
    assert isinstance(pinned, RankRequest)
    return answered(engine.run(engine.ranking(Open("causal")), [pinned]))[0]


@pytest.mark.parametrize("level", ["full", "exact", "tail(0.3)", "corrected(0.3, 0.3)", "blocks", "auto"])
def test_a_ranking_comes_out_again_on_a_cold_and_on_a_warm_cache(engine: Engine, level: str) -> None:
    asked = tiny.asking(ASKED, level=level)
    before = engine.rank(asked)
    for other in (engine, tiny.fresh()):
        after = again(other, asked, before)
        assert first_difference(before, after) is None
        assert after.receipt.level == before.receipt.level


def test_what_was_degraded_is_run_as_it_was_computed(engine: Engine) -> None:
    """The request asked for six candidates at the default level; three were ranked at `blocks`."""
    asked = replace(ASKED, options=None)
    before = engine.rank(replace(tiny.asking(ASKED, level="blocks"), candidates=ASKED.candidates[:3]))
    assert first_difference(before, again(engine, asked, before)) is None


def test_recommendations_and_texts_come_out_again(engine: Engine) -> None:
    recommending, generating = recommender(engine), Generator(engine)
    wanted = items_for("r", 5, 6)
    text = GenerateRequest("t", (Event(tiny.IDS[4]),), options=GenerateOptions(max_tokens=9, temperature=1.0, seed=5))
    for _ in range(2):
        assert first_difference(recommending.recommend(wanted), recommending.recommend(wanted)) is None
        one, other = answered(generating.generate([text, text]))
        assert first_difference(one, other) is None
    reseeded = replace(text, options=replace(text.options, seed=6))
    one, other = answered(generating.generate([text, reseeded]))
    found = first_difference(one, other)
    assert found is not None
    assert found.where.startswith("token_ids[")
    at = int(found.where[10:-1])
    assert (found.before, found.after) == (str(one.token_ids[at]), str(other.token_ids[at]))
    assert one.token_ids[:at] == other.token_ids[:at]
    fewer = recommending.recommend(replace(wanted, deny=(recommending.recommend(wanted).items[0],)))
    assert first_difference(recommending.recommend(wanted), fewer) is not None


def test_the_first_cause_is_named(engine: Engine) -> None:
    before = engine.rank(tiny.asking(ASKED, level="blocks"))
    changed = tiny.catalogue() | {
        tiny.IDS[2]: Item(tiny.IDS[2], {"title": "another text altogether, and a longer one"})
    }
    longer = again(tiny.fresh(items=changed), ASKED, before)
    found = first_difference(before, longer)
    assert found is not None
    assert found.where == "num_tokens"
    other = tiny.fresh(tiny.TORCH)
    assert first_difference(before, again(other, ASKED, before)) == Difference("model", engine.model_id, other.model_id)
    add_noise_to_values(engine, f"item:{tiny.IDS[1]}")
    found = first_difference(before, again(engine, ASKED, before))
    assert found is not None
    assert found.where.startswith("scores[")
    assert first_difference(before, again(engine, ASKED, before), tolerance=100.0) is None


def test_what_cannot_come_out_again_is_told(engine: Engine) -> None:
    running = tiny.asking(ASKED, level="blocks", bias="running_mean")
    with pytest.raises(RequestError, match="depends on the requests before it"):
        request_again(running, engine.rank(running), RankOptions())
    before = engine.rank(tiny.asking(ASKED, level="blocks"))
    kept = replace(before, receipt=replace(before.receipt, degraded=("last_scores",)))
    with pytest.raises(RequestError, match="last known scores"):
        request_again(ASKED, kept, RankOptions())
