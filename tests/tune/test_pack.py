"""The trainer sees what the server sees: packed prompts score as the engine scores them one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rcllm.core.ranking import RankOptions, RankRequest
from rcllm.engine.engine import Engine
from rcllm.model.weights import load_model
from rcllm.tune.loss import listwise_loss, readout_scores
from rcllm.tune.network import Network
from rcllm.tune.pack import Packed, pack
from tests.engine import tiny

REQUESTS = (
    tiny.request(4, (30, 31, 32), user="ann"),
    tiny.request((2, 7, 9), (30, 31), user="ann"),  # another target of the same user: its history is a prefix
    tiny.request((2, 3, 11, 12, 13), (40,), user="bob"),  # shares item 2 with both
    tiny.request(3, (), user=None),
)
READOUTS = [
    RankOptions(readout="pointwise"),
    RankOptions(readout="label"),
    RankOptions(readout="label", label_place="before", layout="items_first", parallel=True),
]


def scores_of(engine: Engine, requests: tuple[RankRequest, ...], mask: str) -> tuple[Packed, list[torch.Tensor]]:
    spec, weights = load_model(tiny.model_folder())
    network = Network(spec, weights, 4096, rank=2, alpha=4.0, seed=0)
    prompts = [engine.prompter.build(request) for request in requests]
    layout = prompts[0].options.layout
    packed = pack(prompts, mask, engine.prompter.contexts[layout])  # type: ignore[arg-type]
    hidden = network(packed, np.concatenate(packed.read_rows)).split([len(rows) for rows in packed.read_rows])
    return packed, [readout_scores(p, h, network.logits) for p, h in zip(prompts, hidden, strict=True)]


@pytest.mark.parametrize("options", READOUTS, ids=["pointwise", "label", "items-first"])
def test_causal_packs_score_as_a_full_prefill(engine: Engine, options: RankOptions) -> None:
    requests = tuple(replace(r, options=options) for r in REQUESTS)
    _, scores = scores_of(engine, requests, "causal")
    for request, ours in zip(requests, scores, strict=True):
        full = engine.rank(tiny.asking(request, level="full")).scores
        np.testing.assert_allclose(ours.detach().numpy(), full, atol=2e-5)


@pytest.mark.parametrize("options", READOUTS, ids=["pointwise", "label", "items-first"])
def test_block_packs_score_as_cached_blocks(engine: Engine, options: RankOptions) -> None:
    requests = tuple(replace(r, options=options) for r in REQUESTS)
    _, scores = scores_of(engine, requests, "blocks")
    for request, ours in zip(requests, scores, strict=True):
        reused = engine.rank(tiny.asking(request, level="blocks")).scores
        np.testing.assert_allclose(ours.detach().numpy(), reused, atol=2e-5)


def test_what_prompts_share_is_computed_once(engine: Engine) -> None:
    requests = tuple(replace(r, options=RankOptions(readout="pointwise")) for r in REQUESTS)
    prompts = [engine.prompter.build(request) for request in requests]
    alone = sum(prompt.num_tokens for prompt in prompts)
    instruction = len(prompts[0].blocks[0])
    events = [len(block) for block in prompts[1].blocks if block.kind == "history"]
    causal, _ = scores_of(engine, requests, "causal")
    assert causal.num_rows == alone - 3 * instruction - sum(events)
    blocks, _ = scores_of(engine, requests, "blocks")
    distinct = {
        block.key: len(block) for prompt in prompts for block in prompt.blocks if block.kind in ("item", "history")
    }
    fresh = [len(b) for prompt in prompts for b in prompt.blocks if b.kind in ("label", "question")]
    most = instruction + sum(distinct.values()) + sum(fresh)
    assert blocks.num_rows <= most < causal.num_rows, "delimiters that see the same are shared as well"


def test_gradients_reach_every_adapter_matrix_and_nothing_else(engine: Engine) -> None:
    spec, weights = load_model(tiny.model_folder())
    network = Network(spec, weights, 4096, rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for name, parameter in network.up.items():
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    prompt = engine.prompter.build(replace(REQUESTS[0], options=RankOptions(readout="pointwise")))
    packed = pack([prompt], "causal", {})
    listwise_loss(readout_scores(prompt, network(packed, packed.read_rows[0]), network.logits), 1).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert not weights.layers[0].qkv.requires_grad
