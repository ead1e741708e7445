"""Beam search over a catalogue, against Hugging Face `generate` and against a search that sorts everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.core.ranking import ItemId
from rcllm.core.receipts import BeamRule
from rcllm.decode.beam import BeamSearch, choosing_of, items_of
from rcllm.decode.beam_host import HostChoice
from rcllm.decode.beam_kv import StepBuffer, joined
from rcllm.model.attend.contract import Attended
from rcllm.model.decoder import Decoder
from rcllm.model.weights import load_model
from tests.decode.beam_cases import (
    FAMILIES,
    SAFE,
    VOCAB,
    Case,
    find,
    make_case,
    make_prompt,
    make_task,
    models,
    run,
    untimed,
)
from tests.reference.beam import hugging_face_beam, model_log_probs, slow_beam
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def _one_thread(one_compute_thread: None) -> None: ...


def _check_against_hugging_face(family: str, case: Case) -> bool:
    """Equal ids in equal order and close scores; returns whether the order hangs on rounding, so that it may differ."""
    decoder, model = models(family)
    [found] = find(decoder, case, make_task(decoder, case))
    ids = [tuple(int(case.tokens.ids[level][c]) for level, c in enumerate(row)) for row in case.codes(found)]
    theirs, scores = hugging_face_beam(model, case.prompt, case.valid, case.tokens.ids, case.beam)
    assert len(ids) == len(theirs) == min(case.beam, len(case.valid))
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    if ids == theirs:
        return False
    log_probs = model_log_probs(model, case.prompt, case.tokens.ids)
    margin = slow_beam(log_probs, case.valid, case.tokens.ids, case.beam, "mask").margin
    assert margin < SAFE, f"{ids} is not {theirs}, and no two scores are near each other ({margin})"
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face(family: str) -> None:
    undecided = sum(_check_against_hugging_face(family, make_case(seed)) for seed in range(20))
    assert undecided <= 2, "equal scores are rare"


@pytest.mark.parametrize("beam", [1, 2, 7, 64, 128])
def test_equals_hugging_face_at_every_width(beam: int) -> None:
    _check_against_hugging_face("qwen3", make_case(beam, beam, 120))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face_in_500_cases(family: str) -> None:
    undecided = sum(_check_against_hugging_face(family, make_case(seed)) for seed in range(1000, 1250))
    print(f"{family}: the order hung on rounding in {undecided} of 250 cases")
    assert undecided <= 12


@pytest.mark.parametrize("rule", ["renormalise", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_search_that_sorts_everything(family: str, rule: BeamRule) -> None:
    decoder, model = models(family)
    for seed in range(40, 46):
        case = make_case(seed, beam=5)
        [found] = find(decoder, case, make_task(decoder, case, rule))
        log_probs = model_log_probs(model, case.prompt, case.tokens.ids)
        expected = slow_beam(log_probs, case.valid, case.tokens.ids, case.beam, rule)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        assert case.codes(found) == expected.codes or expected.margin < SAFE


@pytest.mark.parametrize("rule", ["renormalise", "mask"])
def test_a_beam_that_holds_all_finds_all_and_its_probabilities_add_up(rule: BeamRule) -> None:
    decoder, _ = models("qwen3")
    case = make_case(50, beam=500, num_items=60)
    [found] = find(decoder, case, make_task(decoder, case, rule))
    assert sorted(case.codes(found)) == case.valid
    total = float(np.exp(found.scores.astype(np.float64)).sum())
    assert total == pytest.approx(1.0, abs=1e-5) if rule == "renormalise" else total < 1.0
    assert (np.diff(found.scores) <= 0).all()


def test_a_wide_beam_takes_no_more_rows_than_there_are_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are asked for: leaves are read by no pass."""
    decoder, _ = models("qwen3")
    case, made = make_case(50, beam=10**30, num_items=60), list[int]()
    prefixes = case.code_index.trie.num_nodes[-2]
    monkeypatch.setattr(
        "rcllm.decode.beam.StepBuffer", lambda spec, rows, *rest: made.append(rows) or StepBuffer(spec, rows, *rest)
    )
    found = find(decoder, case, make_task(decoder, case), make_task(decoder, replace(case, beam=3)))
    assert sorted(case.codes(found[0])) == case.valid
    assert made == [8, prefixes + 3], "of the search, and of what did not fit it"


@pytest.mark.parametrize("computing", [{"products": "bf16"}, {"products": "int8", "kept": "int8"}, {}], ids=str)
def test_logits_and_their_sum_are_of_one_product_under_mask(
    computing: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And other requests of the batch get what they get without that one."""
    given: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    monkeypatch.setattr(HostChoice, "choose", lambda _, logits, lse: given.append((logits, lse)))
    path = tiny_model("qwen3", tmp_path, vocab_size=VOCAB)
    decoder, case = Decoder(*load_model(path, torch.float32, "cpu"), **computing), make_case(60, beam=9)  # type: ignore[arg-type]
    search = BeamSearch(decoder, choosing_of(case.tokens, decoder.device), 8)
    tasks = [make_task(decoder, case, rule) for rule in ("renormalise", "mask")]
    for some in (tasks, tasks[:1]):
        search.begin(some, untimed)
    (logits, sums), (alone, none) = given
    assert sums is not None
    assert none is None
    whole = decoder.logits(tasks[1].prompt.hidden[None])
    torch.testing.assert_close(logits[1], whole[0, search._choosing.columns[0]], atol=1e-6, rtol=0)
    torch.testing.assert_close(sums[1], torch.logsumexp(whole[0], -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits[0], alone[0], atol=1e-6, rtol=0)


def test_what_is_searched_together_is_found_alone() -> None:
    """Prompts, widths, filters and rules of their own; one buffer, used again and again."""
    decoder, _ = models("qwen3")
    base = make_case(60, beam=9, num_items=120)
    rng = np.random.default_rng(0)
    ids = base.code_index.item_ids
    tasks = [
        make_task(decoder, replace(base, prompt=rng.integers(0, VOCAB, length).tolist(), beam=beam), rule)
        for length, beam, rule in ((5, 1, "mask"), (40, 30, "renormalise"), (17, 9, "mask"), (3, 64, "renormalise"))
    ]
    none, some = base.code_index.allowed(()), base.code_index.allowed(ids[3:9], (ids[4],))
    tasks += [replace(tasks[1], allowed=none), replace(tasks[2], allowed=some)]
    search = BeamSearch(decoder, choosing_of(base.tokens, decoder.device), 4)  # too small at first
    together = run(search, decoder, tasks)
    for task, found in zip(tasks, together, strict=True):
        [alone] = run(search, decoder, [task])
        np.testing.assert_array_equal(found.leaves, alone.leaves)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        assert found.steps == alone.steps
        assert (found.bytes_read, found.bytes_naive) == (alone.bytes_read, alone.bytes_naive)
    assert not len(together[4].leaves)


def test_nothing_comes_that_is_not_allowed() -> None:
    decoder, _ = models("qwen3")
    rng = np.random.default_rng(1)
    for seed in range(70, 90):
        case = make_case(seed)
        ids = case.code_index.item_ids
        allow = tuple(rng.choice(np.array(ids), rng.integers(0, len(ids) + 1), replace=False).tolist())
        deny = tuple(rng.choice(np.array(ids), rng.integers(0, len(ids) + 1) // 2, replace=False).tolist())
        left = set(allow) - set(deny)
        allowed = case.code_index.allowed(allow, deny)
        task = replace(make_task(decoder, case, "renormalise"), allowed=allowed, beam=max(case.beam, 10))
        [found] = find(decoder, case, task)
        items, scores = items_of(case.code_index, allowed, found, 10)
        assert set(items) <= left
        assert len(set(items)) == len(items) == len(scores) == min(10, len(left))
        assert list(scores) == sorted(scores, reverse=True)


def test_items_of_one_id_come_in_the_order_of_the_catalogue() -> None:
    decoder, _ = models("qwen3")
    codes = np.array([[1, 1], [0, 1], [1, 1], [1, 1], [0, 0]], dtype=np.int32)
    code_index = CodeIndex.build(codes, tuple(map(ItemId, "abcde")), (2, 2))
    case = Case(code_index, CodeTokens((np.array([5, 6], np.int32), np.array([7, 8], np.int32))), [1, 2, 3], 4)
    [found] = find(decoder, case, make_task(decoder, case))
    items, scores = items_of(code_index, None, found, 5)
    assert sorted(items) == list("abcde")
    assert [item for item in items if item in "acd"] == ["a", "c", "d"]
    assert len({score for item, score in zip(items, scores, strict=True) if item in "acd"}) == 1
    allowed = code_index.allowed(None, (ItemId("a"),))
    assert "a" not in items_of(code_index, allowed, found, 5)[0]


def test_equal_scores_come_in_the_order_of_the_trie() -> None:
    """Two codes stand for one token, so that every pair of sequences is a tie."""
    decoder, _ = models("qwen3")
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.int32)
    code_index = CodeIndex.build(codes, tuple(map(ItemId, "abcd")), (2, 2))
    tokens = CodeTokens((np.array([5, 5], np.int32), np.array([7, 7], np.int32)))
    for beam in (1, 2, 3, 4):
        case = Case(code_index, tokens, [1, 2, 3], beam)
        [found] = find(decoder, case, make_task(decoder, case))
        assert len(set(found.scores.tolist())) == 1
        assert items_of(code_index, None, found, 4)[0] == tuple("abcd"[:beam])


def test_the_steps_say_what_they_did() -> None:
    decoder, _ = models("qwen3")
    case = make_case(91, beam=6, num_items=100)
    [found] = find(decoder, case, make_task(decoder, case))
    widths = [step.num_kept for step in found.steps]
    assert [step.num_parents for step in found.steps] == [1, *widths[:-1]]
    assert len(found.steps) == case.code_index.num_levels
    assert all(step.num_kept == min(6, step.num_children) and step.num_dead == 0 for step in found.steps)
    denied = case.code_index.allowed(None, case.code_index.item_ids[::2])
    [found] = find(decoder, case, replace(make_task(decoder, case), allowed=denied))
    assert sum(step.num_dead for step in found.steps) > 0


def test_kv_is_counted_once_a_step_against_once_a_beam() -> None:
    decoder, _ = models("qwen3")
    case = make_case(3, beam=16)  # four levels, of which the first has fewer codes than beams
    [found] = find(decoder, case, make_task(decoder, case))
    per_token = decoder.spec.kv_bytes_per_token(4)
    widths = [step.num_kept for step in found.steps[:-1]]
    own = sum(width * step for step, width in enumerate(widths))
    assert found.bytes_read == per_token * (len(widths) * len(case.prompt) + own)
    assert found.bytes_naive == per_token * (sum(widths) * len(case.prompt) + own)


# ---- what beams read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_scraps_are_joined_without_changing_what_is_read(family: str) -> None:
    decoder, _ = models(family)
    case = make_case(92, beam=20, num_items=100)
    prompt = make_prompt(decoder, case.prompt, num_pieces=len(case.prompt) // 2)
    one = joined(prompt.segments, decoder.rope, decoder.dtype)
    assert len(one) == 1 < len(prompt.segments)
    assert joined(one, decoder.rope, decoder.dtype) is one
    task = replace(make_task(decoder, case), prompt=prompt)
    [scraps], [whole] = (
        find(decoder, case, each) for each in (task, replace(task, prompt=replace(prompt, segments=one)))
    )
    np.testing.assert_array_equal(scraps.leaves, whole.leaves)
    np.testing.assert_allclose(scraps.scores, whole.scores, atol=1e-5)


def test_the_buffer_follows_its_beams() -> None:
    """Widths that grow and shrink, of several requests at once, against a plain list per beam."""
    decoder, _ = models("qwen3")
    spec, rng = decoder.spec, np.random.default_rng(2)
    buffer = StepBuffer(spec, 40, 3, torch.float32, torch.device("cpu"))
    for _ in range(20):
        buffer.clear()
        beams: list[list[float]] = [[] for _ in range(int(rng.integers(1, 40)))]
        for step in range(3):
            if step:
                parents = np.sort(rng.integers(0, len(beams), rng.integers(1, 40))).astype(np.int32)
                buffer.reorder(parents)
                beams = [list(beams[parent]) for parent in parents]
            values = rng.random(len(beams)).astype(np.float32)
            kv = torch.from_numpy(values)[None, None, None, :, None].expand(
                spec.num_layers, 2, spec.num_kv_heads, -1, spec.head_dim
            )
            buffer.append(kv)
            for beam, value in zip(beams, values.tolist(), strict=True):
                beam.append(value)
        attended = buffer(1, torch.zeros(len(beams), spec.q_size + 2 * spec.kv_size))
        assert attended.output[:, 0].tolist() == pytest.approx([np.mean(beam) for beam in beams], abs=1e-6)
        assert attended.lse[:, 0].tolist() == pytest.approx([np.log(3)] * len(beams), abs=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (14, 2, 64), (3, 3, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_steps_are_joined_in_one_launch_as_in_many(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Close: fp32, 1e-5; bf16, a step of its own. In Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
    spec = replace(models("qwen3")[0].spec, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    buffer = StepBuffer(spec, 9, 3, dtype, torch.device("cpu"))
    for _ in range(2):
        buffer.append(torch.randn(spec.num_layers, 2, kv_heads, 7, head_dim).to(dtype))
    qkv = torch.randn(7, spec.q_size + 2 * spec.kv_size).to(dtype)
    output, lse = torch.randn(7, spec.q_size).to(dtype), torch.randn(7, heads)
    expected, got = (Attended(output.clone(), lse.clone()) for _ in range(2))
    buffer.join(1, qkv, expected)
    assert not torch.equal(expected.output, output)
    buffer._is_fused = True
    buffer.join(1, qkv, got)
    step = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.output, expected.output, atol=step, rtol=step)
    torch.testing.assert_close(got.lse, expected.lse, atol=1e-5, rtol=1e-5)
