"""Open prompts: what decoding continues equals the plain sequence."""

import copy
from dataclasses import replace

import pytest
import torch

from rcllm.core.decoding import OpenRequest
from rcllm.core.ranking import Event, Level, UserId
from rcllm.decode.beam_kv import beam_group
from rcllm.errors import ConfigError
from rcllm.model.decoder import Pass
from tests.engine.opening import opened
from tests.engine.tiny import IDS, NATIVE, TORCH, fresh, request


def _ask(name: str, *events: int, level: str = "exact") -> OpenRequest:
    return OpenRequest(name, tuple(Event(IDS[i]) for i in events), UserId("u1"), Level.parse(level))


@pytest.mark.parametrize("family", [NATIVE, TORCH])
def test_the_hidden_state_and_the_next_token_equal_the_plain_sequence(family: str) -> None:
    engine = fresh(family, kv_dtype="fp32")
    decoder = engine.decoder
    asked = [_ask("a", 1, 2, 3), _ask("b", 4), _ask("c", 1, 2, 3, 5)]
    for _ in range(2):  # the second time instruction and histories are cached
        for one, found in zip(asked, opened(engine, asked), strict=True):
            tokens = engine.prompter.build_open(one).token_ids
            assert found.end == len(tokens)
            assert sum(map(len, found.segments)) == len(tokens)
            expected = decoder.full_logits([*tokens, 7])
            assert torch.allclose(decoder.logits(found.last[None])[0], expected[-2], atol=1e-4)
            group = beam_group(found.segments, 1)
            passed = decoder.forward(Pass(torch.tensor([7]), torch.tensor([found.end]), [group], torch.tensor([0])))
            assert torch.allclose(decoder.logits(passed.hidden)[0], expected[-1], atol=1e-4)
    engine.pool.check()


def test_a_longer_history_extends_the_chain() -> None:
    engine = fresh(NATIVE)
    opened(engine, [_ask("a", 1, 2, 3)])
    [found] = opened(engine, [_ask("b", 1, 2, 3, 4)])
    assert found.planned.plan.num_reused > found.planned.plan.num_fresh


def test_levels_that_need_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match="open prompts take"):
        opened(fresh(NATIVE), [_ask("a", 1, level="auto")])


def test_an_open_template_ranks_nothing() -> None:
    engine = fresh(NATIVE)
    made = copy.copy(engine.prompter)
    made.template = replace(made.template, open=True)
    with pytest.raises(ConfigError, match="is for open prompts"):
        made.build(request())
