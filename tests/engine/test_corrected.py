"""Level `corrected`: the engine against its slow twin, and what holds for every policy.

Close, 1e-4 on log-probabilities and logits, unless a test says otherwise; KV is kept in fp32.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rcllm.core.ranking import ItemId, Level, Policy, RankRequest, RankResponse, Reduction, Selection, UserId
from rcllm.core.receipts import BlockKind
from rcllm.engine import rankings
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError
from tests.engine import tiny
from tests.engine.test_reference import contexts, family_of, twin
from tests.reference.corrected import Corrected, CorrectedTwin

TOLERANCE = 1e-4
POLICIES: tuple[Policy, ...] = get_args(Policy)
SHAPES: list[dict[str, Any]] = [
    {},
    {"label_place": "before", "parallel": True},
    {"layout": "items_first"},
    {"layout": "items_first", "parallel": True, "label_place": "before"},
    {"readout": "pointwise"},
    {"readout": "likelihood"},
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())) or "label")
every_policy = pytest.mark.parametrize("policy", POLICIES)


def selection(policy: Policy, **changes: Any) -> Selection:
    return Selection(**{"policy": policy, "check_layer": int(policy == "k_difference"), **changes})


def expected(engine: Engine, asked: RankRequest) -> Corrected:
    prompt = engine.prompter.build(asked)
    return CorrectedTwin(twin(family_of(engine)), prompt, contexts(engine, prompt)).run(prompt.options.level)


def assert_close(response: RankResponse, scores: Any) -> None:
    errors = np.abs(np.array(response.scores) - np.array(scores))
    print(f"max error {errors.max():.2e}, mean {errors.mean():.2e}")
    assert errors.max() < TOLERANCE


def assert_as_the_twin(engine: Engine, asked: RankRequest) -> None:
    wanted = expected(engine, asked)
    for _ in range(2):  # an empty cache, and a warm one
        response = engine.rank(asked)
        assert_close(response, wanted.scores)
        blocks = response.receipt.blocks
        inside = [i for i, b in enumerate(blocks) if b.kind in (BlockKind.HISTORY, BlockKind.ITEM)]
        assert {i: blocks[i].num_fresh for i in inside} == {i: sum(b == i for b, _ in wanted.chosen) for i in inside}


# ---- against the twin -----------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "random"])
def test_every_policy_computes_what_the_dense_twin_computes(
    any_engine: Engine, policy: Policy, shape: dict[str, Any]
) -> None:
    asked = tiny.request((0, 1, 7, 58), (30, 31, 32), level="corrected(.3,.4)", selection=selection(policy), **shape)
    assert_as_the_twin(any_engine, asked)


@pytest.mark.parametrize(
    "chosen",
    [
        *(Selection(reduction=reduction) for reduction in ("question", "mean", "sum")),
        *(Selection(divergence=weight, check_layer=1) for weight in (0.0, 0.3, 1.0)),
        Selection("question", check_layer=1),
        Selection("two_pass", window=7),
        Selection(window=9, reduction="mean", check_layer=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4]], ids=lambda s: "-".join(map(str, s.values())))
def test_every_option_of_the_selection(engine: Engine, chosen: Selection, shape: dict[str, Any]) -> None:
    asked = tiny.request((5, 1, 7), (30, 31, 32), level="corrected(.25,.5)", selection=chosen, **shape)
    assert_as_the_twin(engine, asked)


@pytest.mark.parametrize("context", ["none", "bos", "typical", "mean(2)"])
@pytest.mark.parametrize("policy", ["rcllm", "two_pass", "static"])
def test_in_every_canonical_context(context: str, policy: Policy) -> None:
    samples = (tiny.request(4, (40, 41)), tiny.request((9, 8, 7), (50, 51, 52)))
    engine = tiny.build(context=context, samples=samples)
    assert_as_the_twin(engine, tiny.request((0, 1, 7), level="corrected(.3,.3)", selection=selection(policy)))


@pytest.mark.parametrize("attention", ["segmented", "gather"])
@pytest.mark.parametrize("family", [tiny.NATIVE, tiny.TORCH])
def test_with_every_attention_backend(family: str, attention: str) -> None:
    engine = tiny.build(family, attention=attention)
    for policy in ("rcllm", "two_pass"):
        asked = tiny.request((0, 1, 7), level="corrected(.3,.3)", selection=Selection(policy))
        assert_as_the_twin(engine, asked)
        assert engine.rank(asked).receipt.backend == attention


def test_scraps_of_blocks_are_gathered_and_whole_blocks_read_in_place(engine: Engine) -> None:
    scattered = engine.rank(tiny.request(level="corrected(.4,.4)", selection=Selection("random"))).receipt
    whole = engine.rank(tiny.request(level="corrected(0,0)", selection=Selection("random"))).receipt
    assert (scattered.backend, whole.backend) == ("gather", "segmented")
    assert scattered.kv_bytes_copied == scattered.kv_bytes_read > 0 == whole.kv_bytes_copied


@pytest.fixture(scope="module")
def served() -> Engine:
    """One engine for all examples, so that they meet each other's leavings."""
    return tiny.fresh()


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    shape=st.sampled_from(SHAPES),
    policy=st.sampled_from([policy for policy in POLICIES if policy != "random"]),
    reduction=st.sampled_from(get_args(Reduction)),
    divergence=st.floats(0, 1),
    window=st.sampled_from([0, 0, 1, 5, 1000]),
    check_layer=st.integers(0, 1),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    candidates=st.lists(st.integers(0, 58), min_size=1, max_size=4, unique=True).map(tuple),
    events=st.lists(st.one_of(st.integers(0, 58), st.sampled_from(["my words", "no more"])), max_size=4).map(tuple),
)
def test_any_selection_computes_what_the_dense_twin_computes(
    served: Engine,
    shape: dict[str, Any],
    policy: Policy,
    reduction: Reduction,
    divergence: float,
    window: int,
    check_layer: int,
    shares: tuple[float, float],
    candidates: tuple[int, ...],
    events: tuple[int | str, ...],
) -> None:
    chosen = Selection(policy, divergence, reduction, window, max(check_layer, int(policy == "k_difference")))
    level = f"corrected({shares[0]}, {shares[1]})"
    assert_as_the_twin(served, tiny.request(candidates, events, level=level, selection=chosen, **shape))


# ---- what holds for every policy ------------------------------------------------------------------------------------


@every_policy
@every_shape
def test_a_full_budget_is_full_and_none_is_blocks(any_engine: Engine, policy: Policy, shape: dict[str, Any]) -> None:
    """With a check layer of 0, `blocks` too has its exact layer 0: there K and V depend on the token alone."""
    asked = tiny.request(5, (30, 31, 32), selection=selection(policy), **shape)
    full, blocks = (any_engine.rank(tiny.asking(asked, level=level)).scores for level in ("full", "blocks"))
    assert not np.allclose(full, blocks, atol=1e-2), "else this test sees nothing"
    assert_close(any_engine.rank(tiny.asking(asked, level="corrected(1,1)")), full)
    if policy != "k_difference":
        assert_close(any_engine.rank(tiny.asking(asked, level="corrected(0,0)")), blocks)


@pytest.mark.parametrize("kv_dtype", ["fp16", "bf16"])
def test_a_full_budget_is_full_beside_a_cache_in_16_bits(kv_dtype: str) -> None:
    """approximate: only the instruction is read"""
    engine = tiny.fresh(kv_dtype=kv_dtype)
    full, corrected = (engine.rank(tiny.request(level=level)).scores for level in ("full", "corrected(1,1)"))
    assert np.abs(np.array(full) - np.array(corrected)).max() < 0.1


@pytest.mark.parametrize("kv_dtype", ["fp16", "fp32"])
def test_rounding_is_no_divergence(kv_dtype: str) -> None:
    """exact: in layer 0 the same text differs by rounding alone, and the choice is the question's."""
    engine = tiny.fresh(kv_dtype=kv_dtype)
    asked = [
        tiny.request(level="corrected(.3,.3)", selection=Selection(policy, divergence=0.5))
        for policy in ("rcllm", "question")
    ]
    fresh = [[b.num_fresh for b in engine.rank(request).receipt.blocks] for request in asked]
    assert fresh[0] == fresh[1]


@every_shape
def test_policies_are_compared_at_equal_numbers_of_fresh_tokens(engine: Engine, shape: dict[str, Any]) -> None:
    counts = set()
    for policy in POLICIES:
        asked = tiny.request(7, (30, 31, 32, 33), level="corrected(.3,.45)", selection=selection(policy), **shape)
        receipt = engine.rank(asked).receipt
        fresh = [
            sum(b.num_fresh for b in receipt.blocks if b.kind is kind) for kind in (BlockKind.ITEM, BlockKind.HISTORY)
        ]
        counts.add((receipt.num_fresh, *fresh))
    assert len(counts) == 1


def test_only_fresh_tokens_run_after_the_check_layer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute really shrinks: the rows that each layer's MLP and each phase's attention see, counted."""
    asked = tiny.request(7, level="corrected(.3,.3)", selection=Selection(check_layer=1))
    engine.rank(asked)
    rows: list[int] = []

    def counting(feed: Any) -> Any:
        return lambda residual, attended: rows.append(len(residual)) or feed(residual, attended)

    with monkeypatch.context() as patched:
        for layer in engine.decoder._layers:
            patched.setattr(layer, "feed", counting(layer.feed))
        receipt = engine.rank(asked).receipt
    assert receipt.num_computed == 0
    assert rows == [receipt.num_tokens, receipt.num_fresh, 1], "after the last attention one row is read"
    attended: list[int] = []
    attend = engine.decoder._attend

    def counted(work: Any) -> Any:
        attended.append(len(work.token_ids))
        return attend(work)

    monkeypatch.setattr(engine.decoder, "_attend", counted)
    engine.rank(asked)
    assert attended == [receipt.num_tokens, receipt.num_fresh]


@every_policy
def test_published_blocks_never_change(engine: Engine, policy: Policy) -> None:
    asked = tiny.request(level="blocks")
    engine.rank(asked)
    before = {key: block.kv.clone() for key, block in engine.pool._blocks.items()}
    engine.rank(tiny.asking(asked, level="corrected(.5,.5)", selection=selection(policy)))
    assert set(engine.pool._blocks) == set(before), "and nothing approximate is published"
    assert all(torch.equal(engine.pool._blocks[key].kv, kv) for key, kv in before.items())


@every_policy
def test_a_request_is_answered_the_same_each_time(engine: Engine, policy: Policy) -> None:
    asked = tiny.request(6, level="corrected(.3,.3)", selection=selection(policy))
    scores = [engine.rank(replace(asked, request_id=name)).scores for name in ("a", "b")]
    assert scores[0] == scores[1]


def test_a_batch_of_all_policies_and_levels_answers_as_each_request_alone(any_engine: Engine) -> None:
    kinds: list[dict[str, Any]] = [
        {"level": "corrected(.3,.3)", "selection": selection(policy), **shape}
        for policy, shape in zip(POLICIES * 2, itertools.cycle(SHAPES), strict=False)
    ]
    kinds += [{"level": "blocks"}, {"level": "full"}, {"level": "exact", "history": "chain"}]
    kinds += [{"level": "corrected(.2)", "selection": Selection(check_layer=1), "history": "chain"}]
    requests = [
        tiny.request((i, i + 3, 59 - i), (30, 31 + i), user=f"u{i}", name=f"r{i}", **kind)
        for i, kind in enumerate(kinds)
    ]
    family = family_of(any_engine)
    for got, asked in zip(any_engine.rank_batch(requests), requests, strict=True):
        assert got.request_id == asked.request_id
        assert_close(got, tiny.fresh(family).rank(asked).scores)


def test_a_users_chain_is_published_whole_and_exact(engine: Engine) -> None:
    """Its first layers come from the scoring pass, the rest from the second."""
    asked = tiny.request(history="chain", level="corrected(.3,.3)")
    other = tiny.fresh()
    engine.rank(asked)
    other.rank(tiny.asking(asked, level="exact"))
    blocks = engine.prompter.build(asked).blocks
    chain = [b.chain_key for b in blocks if b.kind is BlockKind.HISTORY and b.chain_key is not None]
    assert len(chain) == 3
    for key in chain:
        torch.testing.assert_close(engine.pool._blocks[key].kv, other.pool._blocks[key].kv, atol=1e-5, rtol=1e-5)
    again = engine.rank(asked).receipt
    assert all(b.num_fresh == 0 for b in again.blocks if b.kind is BlockKind.HISTORY)


def test_the_error_falls_as_the_budget_grows(engine: Engine) -> None:
    """approximate: on average over requests, from no budget to a full one; at full budget it is gone"""
    for policy in ("rcllm", "two_pass", "static"):
        means = []
        for share in (0, 0.5, 0.9, 1):
            errors = []
            for start in range(12):
                asked = tiny.request(tuple(range(start, start + 5)), (30 + start, 31, 32), selection=selection(policy))
                levels = ("full", f"corrected({share})")
                full, got = (engine.rank(tiny.asking(asked, level=level)).scores for level in levels)
                errors.append(np.abs(np.array(full) - np.array(got)).mean())
            means.append(float(np.mean(errors)))
        print(policy, means)
        assert means[-1] < TOLERANCE < means[2] < means[0]


@pytest.mark.parametrize("policy", ["first", "static", "tail"])
@pytest.mark.parametrize("readout", ["pointwise", "likelihood"])
def test_isolated_candidates_score_the_same_in_any_order_and_list(engine: Engine, policy: Policy, readout: str) -> None:
    """Where the choice looks at no other candidate; the attention of `rcllm` to the history is a mean over all."""
    numbers = (0, 1, 7, 58, 9)
    how: dict[str, Any] = {"level": "corrected(.3,.3)", "readout": readout, "selection": Selection(policy)}
    forward = engine.rank(tiny.request(numbers, **how))
    backward = engine.rank(tiny.request(numbers[::-1], **how))
    alone = [engine.rank(tiny.request((n,), **how)).scores[0] for n in numbers]
    assert np.allclose(forward.scores, backward.scores[::-1], atol=1e-5)
    assert np.allclose(forward.scores, alone, atol=1e-5)


# ---- receipts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "why", "note"),
    [
        ("rcllm", "rcllm's score", "layers 0 to 0 ran for all"),
        ("two_pass", "question's attention in a first pass", "a first pass at level blocks computed"),
        ("static", "rank in a canonical prompt", "blocks were ranked"),
        ("tail", "last reused tokens", ""),
    ],
)
def test_a_receipt_says_what_was_chosen_and_why(engine: Engine, policy: Policy, why: str, note: str) -> None:
    asked = tiny.request(level="corrected(.3,.2)", selection=selection(policy, window=2))
    receipt = engine.rank(asked).receipt
    assert receipt.level == "corrected(0.3, 0.2)"
    assert receipt.num_fresh == sum(b.num_fresh for b in receipt.blocks)
    assert any(why in b.why for b in receipt.blocks if b.kind is BlockKind.ITEM)
    assert any("in the window" in b.why for b in receipt.blocks)
    assert any(note in text for text in receipt.notes) if note else not receipt.notes
    assert "select" in receipt.stage_ms


def test_the_bytes_that_a_request_read(engine: Engine) -> None:
    """By the pass, from the layer after the check layer on, and by the comparison of one layer's history."""
    asked = tiny.request(level="corrected(.3,.3)", selection=Selection(check_layer=1))
    receipt = engine.rank(asked).receipt
    per_layer = engine.decoder.spec.kv_bytes_per_token(4) // engine.decoder.spec.num_layers
    history = sum(b.num_fresh + b.num_reused for b in receipt.blocks if b.kind is BlockKind.HISTORY)
    assert receipt.kv_bytes_read == (receipt.num_reused + history) * per_layer


# ---- static ---------------------------------------------------------------------------------------------------------


def test_static_ranks_a_block_once_and_forgets_it_with_its_owner(engine: Engine) -> None:
    asked = tiny.request((0, 1), (30, "my own words"), level="corrected(.3,.3)", selection=Selection("static"))
    engine.rank(asked)
    known = engine._prefill.corrector.rankings
    assert len(known) == 4
    assert engine.rank(asked).receipt.notes == (), "nothing was ranked the second time"
    engine.erase_user(UserId("u1"))
    assert len(known) == 3
    engine.retire_item(tiny.IDS[0])
    assert len(known) == 2
    engine.rank(tiny.asking(asked, readout="pointwise"))
    assert len(known) == 2 + 4, "another question, other ranks"


def test_static_ranks_are_there_after_warming() -> None:
    engine = tiny.fresh()
    asked = tiny.request((0, 1), (30,), level="corrected(.3,.3)", selection=Selection("static"))
    assert asked.options is not None
    engine.config = replace(engine.config, rank=asked.options)
    engine.warm([ItemId(i) for i in (tiny.IDS[0], tiny.IDS[1], tiny.IDS[30])])
    receipt = engine.rank(asked).receipt
    assert receipt.notes == ()
    assert receipt.num_computed == 0


def test_static_remembers_a_bounded_number_of_ranks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankings, "_MAX_RANKINGS", 3)
    static = {"level": "corrected(.3,.3)", "selection": Selection("static")}
    for start in range(0, 20, 5):
        asked = tiny.request(tuple(range(start, start + 5)), (30,), **static)
        engine.rank(asked)
        assert len(engine._prefill.corrector.rankings) == 6, "those that a request needs, at least"
    engine.rank(tiny.request((0,), (), **static))
    assert len(engine._prefill.corrector.rankings) == 3


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "chosen", "message"),
    [
        ("corrected", Selection("best"), "selection.policy must be one of rcllm, .*, got 'best'"),  # type: ignore[arg-type]
        ("corrected", Selection(reduction="max"), "selection.reduction must be one of question, mean, sum, got 'max'"),  # type: ignore[arg-type]
        ("corrected", Selection(divergence=1.5), "selection.divergence must be at most 1, got 1.5"),
        ("corrected", Selection(window=-1), "selection.window must be at least 0, got -1"),
        ("corrected", Selection(check_layer=-1), "selection.check_layer must be at least 0, got -1"),
        ("corrected", Selection(check_layer=2), r"check_layer is 2; the model has the layers 0 to 2, of which .* last"),
        ("corrected", Selection("k_difference"), "k_difference needs selection.check_layer of 1 or more"),
        (Level("corrected", 1.5), Selection(), r"unknown reuse level 'corrected\(1\.5, 0\.0\)'.* shares from 0 to 1"),
        (Level("corrected", 0.5, -1), Selection(), r"unknown reuse level 'corrected\(0\.5, -1\)'.* shares from 0 to 1"),
    ],
)
def test_wrong_selections_are_refused(engine: Engine, level: Any, chosen: Selection, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.rank(tiny.request(level=level, selection=chosen))
