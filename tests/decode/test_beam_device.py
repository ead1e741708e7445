"""Beams that are chosen on the device: the same as in numpy, and without a wait from the first step to the last.

The device here is the CPU, or `meta`, whose tensors have shapes but no values: whatever looks at one fails.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.core.ranking import IntArray, ItemId
from rcllm.core.receipts import BeamRule
from rcllm.decode.beam import BeamSearch
from rcllm.decode.beam_device import OnDevice, rising
from rcllm.decode.beam_host import OnHost
from rcllm.decode.beam_kv import StepBuffer
from rcllm.decode.beam_task import BeamPrompt, BeamTask, Choice, Leaves
from rcllm.errors import ModelError
from rcllm.model.attend.segments import Segment
from rcllm.model.decoder import Decoder
from rcllm.model.weights import LayerWeights, Weights, load_model
from tests.decode.beam_cases import VOCAB, make_case, make_task, models, run, untimed
from tests.tiny_models import tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")
Floats = npt.NDArray[np.float32]
Model = Callable[[tuple[int, ...], int], Floats]  # logits after a request's number and the tokens so far
COARSE = np.array([0.0, -0.5, -1.0, -2.0, -np.inf], np.float32)  # many ties
RULES: tuple[BeamRule, ...] = ("renormalise", "mask")


# ---- choosing alone, with made-up logits -----------------------------------------------------------------------------


def _catalogue(seed: int, sizes: tuple[int, ...] | None = None, count: int | None = None) -> CodeIndex:
    rng = np.random.default_rng(seed)
    sizes = sizes or tuple(rng.integers(1, 12, size=rng.integers(2, 6)).tolist())
    count = int(rng.integers(1, 300)) if count is None else count
    codes = np.stack([rng.integers(0, size, count) for size in sizes], axis=1).astype(np.int32)
    return CodeIndex.build(codes, tuple(ItemId(f"i{i}") for i in range(count)), sizes)


def _tokens(sizes: Sequence[int]) -> CodeTokens:
    return CodeTokens(
        tuple(np.arange(100 * level, 100 * level + size, dtype=np.int32) for level, size in enumerate(sizes))
    )


def _tasks(code_index: CodeIndex, seed: int, rules: Sequence[BeamRule]) -> list[BeamTask]:
    """Of several widths and filters; some of them follow each other with the same filter, one allows nothing."""
    rng, ids = np.random.default_rng(seed), code_index.item_ids
    denied = code_index.allowed(None, [ids[i] for i in rng.integers(0, len(ids), len(ids) // 2).tolist()])
    few, none = code_index.allowed([ids[i] for i in rng.integers(0, len(ids), 3).tolist()]), code_index.allowed(())
    filters = [None, denied, denied, few, None, none, few]
    prompt = BeamPrompt((), 7, torch.zeros(0))
    beams = (2 ** rng.integers(0, 8, len(filters))).tolist()
    return [
        BeamTask(prompt, code_index, allowed, beam, rules[number % len(rules)])
        for number, (allowed, beam) in enumerate(zip(filters, beams, strict=True))
    ]


def _drive(choice: Choice, tasks: Sequence[BeamTask], model: Model, with_lse: bool = True) -> list[Leaves]:
    """A whole search over a model that gives logits for prefixes, with their logsumexp in the last column."""
    prefixes: list[tuple[int, ...]] = [(number,) for number in range(len(tasks))]
    for size in tasks[0].code_index.sizes:
        if not any(choice.num_rows):
            break
        choice.expand()
        given = torch.from_numpy(np.array([model(prefix, size + 1) for prefix in prefixes], np.float32))
        choice.choose(given[:, :-1], given[:, -1] if with_lse else None)
        rows = choice.rows
        parents = rows.parents.tolist()
        assert parents == sorted(parents), "parents never fall"
        prefixes = [(*prefixes[parent], token) for parent, token in zip(parents, rows.token_ids.tolist(), strict=True)]
        owners = [prefix[0] for prefix in prefixes]
        assert owners == np.repeat(np.arange(len(tasks)), choice.num_rows).tolist()
    return choice.found()


def _model(seed: int, values: Floats | None = None, broken: Callable[[tuple[int, ...]], bool] | None = None) -> Model:
    """Logits that are normal, or drawn from `values`; NaN after a prefix that is `broken`."""

    def logits(prefix: tuple[int, ...], count: int) -> Floats:
        rng = np.random.default_rng([seed, *prefix])
        drawn = rng.normal(size=count) * 3 if values is None else rng.choice(values, count)
        drawn[-1] = 1.0  # the logsumexp
        if broken is not None and broken(prefix):
            drawn[:-1] = np.nan
        return drawn.astype(np.float32)

    return logits


def _both(tasks: Sequence[BeamTask], model: Model, with_lse: bool = True) -> tuple[list[Leaves], list[Leaves]]:
    tokens = _tokens(tasks[0].code_index.sizes)
    choices = OnHost(tokens).begin(tasks), OnDevice(tokens, CPU).begin(tasks)
    on_host, on_device = (_drive(choice, tasks, model, with_lse) for choice in choices)
    return on_host, on_device


def _assert_same(some: Leaves, other: Leaves, atol: float = 1e-5) -> None:
    np.testing.assert_array_equal(some.nodes, other.nodes)
    np.testing.assert_allclose(some.scores, other.scores, atol=atol, rtol=0)
    assert [replace(step, num_skipped=0) for step in some.steps] == list(other.steps)
    assert type(some.error) is type(other.error)


@pytest.mark.parametrize("rules", [RULES, RULES[:1], RULES[1:]], ids=["both rules", *RULES])
def test_what_is_chosen_is_what_numpy_chooses(rules: tuple[BeamRule, ...]) -> None:
    for seed in range(60):
        tasks = _tasks(_catalogue(seed), seed, rules)
        for some, other in zip(*_both(tasks, _model(seed), with_lse="mask" in rules), strict=True):
            _assert_same(some, other)


def test_ties_and_minus_infinity_come_in_the_order_of_the_trie() -> None:
    """To the bit: under the rule `mask` both subtract and add the same numbers."""
    num_ties = 0
    for seed in range(80):
        tasks = _tasks(_catalogue(seed), seed, ["mask"])
        for some, other in zip(*_both(tasks, _model(seed, COARSE)), strict=True):
            _assert_same(some, other, atol=0)
            num_ties += len(some.scores) - len(set(some.scores.tolist()))
    assert num_ties > 1000


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("beam", [1, 3, 8, 27, 40])
def test_all_equal_keeps_the_first(rule: BeamRule, beam: int) -> None:
    codes = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int32)
    code_index = CodeIndex.build(codes, tuple(ItemId(f"i{i}") for i in range(27)), (3, 3, 3))
    task = BeamTask(BeamPrompt((), 7, torch.zeros(0)), code_index, None, beam, rule)
    for [leaves] in _both([task], lambda prefix, count: np.zeros(count, np.float32)):
        assert leaves.nodes.tolist() == list(range(min(beam, 27)))


def test_a_beam_may_be_wider_than_any_number_of_the_device() -> None:
    task = BeamTask(BeamPrompt((), 7, torch.zeros(0)), _catalogue(3, (4, 5), 90), None, 10**30, "renormalise")
    on_host, on_device = _both([task], _model(3))
    _assert_same(*on_host, *on_device)
    assert len(on_host[0].nodes) == task.code_index.trie.num_nodes[-1]


def test_a_catalogue_without_items_gives_nothing() -> None:
    empty = CodeIndex.build(np.zeros((0, 2), np.int32), (), (4, 5))
    task = BeamTask(BeamPrompt((), 7, torch.zeros(0)), empty, None, 8, "renormalise")
    for [leaves] in _both([task], _model(3)):
        assert (len(leaves.nodes), leaves.error) == (0, None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scores_that_are_not_numbers_are_the_error_of_their_request_alone(rule: BeamRule, depth: int) -> None:
    """At the first level or later, in all beams or in one."""
    code_index = _catalogue(3, (4, 5, 6), 90)
    prompt = BeamPrompt((), 7, torch.zeros(0))
    tasks = [BeamTask(prompt, code_index, None, beam, rule) for beam in (8, 5, 90, 8)]
    sound, _ = _both(tasks, _model(3))
    on_host, on_device = _both(tasks, _model(3, broken=lambda prefix: prefix[0] == 2 and len(prefix) == depth))
    for number, (some, other) in enumerate(zip(on_host, on_device, strict=True)):
        _assert_same(some, other)
        assert isinstance(other.error, ModelError) is (number == 2)
        if number != 2:
            _assert_same(sound[number], other)
    assert len(on_device[2].steps) == depth - 1
    assert not len(on_device[2].nodes)


def test_infinite_logits_are_no_numbers_either() -> None:
    code_index = _catalogue(3, (4, 5), 90)
    tasks = [BeamTask(BeamPrompt((), 7, torch.zeros(0)), code_index, None, 5, "renormalise")]
    for [leaves] in _both(tasks, _model(3, np.array([np.inf, 0.0], np.float32))):
        assert isinstance(leaves.error, ModelError)


def test_an_empty_catalogue_has_no_leaves() -> None:
    code_index = CodeIndex.build(np.zeros((0, 2), np.int32), (), (4, 5))
    tasks = [BeamTask(BeamPrompt((), 7, torch.zeros(0)), code_index, None, 5, rule) for rule in RULES]
    for leaves in _both(tasks, _model(0)):
        for each in leaves:
            assert (len(each.nodes), each.error, len(each.steps)) == (0, None, 1)


def test_rising_numbers_have_the_order_of_scores() -> None:
    rng = np.random.default_rng(0)
    ends = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38]
    scores = np.concatenate([rng.normal(size=500) * 10 ** rng.normal(size=500), ends]).astype(np.float32)
    keys = rising(torch.from_numpy(scores), torch.ones(len(scores), dtype=torch.bool)).numpy()
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), np.argsort(scores, kind="stable"))
    missing = rising(torch.tensor([-math.inf]), torch.zeros(1, dtype=torch.bool))
    assert int(missing) < keys.min()


# ---- whole searches --------------------------------------------------------------------------------------------------


def _found(search: BeamSearch, decoder: Decoder, tasks: Sequence[BeamTask]) -> list[Leaves]:
    return [Leaves(each.leaves, each.scores, each.steps, each.error) for each in run(search, decoder, tasks)]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("seed", [60, 61, 62])
def test_searches_on_the_device_find_what_searches_in_numpy_find(
    one_compute_thread: None, family: str, seed: int
) -> None:
    decoder, _ = models(family)
    base = make_case(seed, num_items=120)
    ids = base.code_index.item_ids
    tasks = [
        make_task(decoder, replace(base, prompt=base.prompt[: 2 + 5 * number], beam=beam), RULES[number % 2])
        for number, beam in enumerate((1, 30, 9, 64))
    ]
    tasks.append(replace(tasks[1], allowed=base.code_index.allowed(ids[3:9], (ids[4],)), rule="mask"))
    broken = replace(tasks[2].prompt, hidden=torch.full_like(tasks[2].prompt.hidden, math.nan))
    tasks.insert(2, replace(tasks[2], prompt=broken))
    on_host = _found(BeamSearch(decoder, OnHost(base.tokens), 200), decoder, tasks)
    search = BeamSearch(decoder, OnDevice(base.tokens, CPU), 200)
    for _ in range(2):  # in the same buffer
        for number, (some, other) in enumerate(zip(on_host, _found(search, decoder, tasks), strict=True)):
            _assert_same(some, other)
            assert (other.error is not None) is (number == 2)


def test_beams_that_the_host_does_not_know_move_as_those_that_it_knows() -> None:
    spec, rng = models("qwen3")[0].spec, np.random.default_rng(0)
    known, unknown = (StepBuffer(spec, 12, 2, torch.float32, CPU) for _ in range(2))
    queries = torch.randn(9, spec.q_size + 2 * spec.kv_size)
    for buffer in (known, unknown):
        buffer.append(
            torch.arange(12.0)[None, None, None, :, None].expand(
                spec.num_layers, 2, spec.num_kv_heads, -1, spec.head_dim
            )
        )
    parents: IntArray = np.sort(rng.integers(0, 12, 9)).astype(np.int32)
    known.reorder(parents)
    unknown.reorder(torch.from_numpy(parents).long())
    assert torch.equal(known(1, queries).output, unknown(1, queries).output)
    assert known.state[1:] == unknown.state[1:] == (9, 1)


def test_a_trie_is_kept_as_long_as_somebody_holds_its_epoch() -> None:
    """A search goes on with the epoch that it began with, and its tensors go with it."""
    live = LiveCodes(_catalogue(5, (4, 5, 6), 80))
    choosing = OnDevice(_tokens((4, 5, 6)), CPU)

    def task(code_index: CodeIndex) -> BeamTask:
        allowed = code_index.allowed(None, code_index.item_ids[:3])
        return BeamTask(BeamPrompt((), 7, torch.zeros(0)), code_index, allowed, 6, "mask")

    tasks = [task(live.epoch())]
    expected = _both(tasks, _model(5))[0]
    choice = choosing.begin(tasks)
    before = choosing.device_bytes
    trie = live.epoch().trie
    arrays = [*trie.first, *trie.code, *(np.zeros(count, np.bool_) for count in trie.num_nodes[1:])]
    offsets = sum(8 * int(np.diff(first).max()) for first in trie.first)
    assert before == sum(array.nbytes for array in arrays) + offsets
    assert choosing.begin(tasks) is not choice
    assert choosing.device_bytes == before, "sent once"
    live.remove(live.epoch().item_ids[3:40])
    changed = [task(live.flush())]
    again = _drive(choosing.begin(changed), changed, _model(5))
    assert not {live.epoch().items_of(leaf)[0] for leaf in again[0].nodes.tolist()} & {0, 1, 2}
    assert choosing.device_bytes > before
    for some, other in zip(expected, _drive(choice, tasks, _model(5)), strict=True):
        _assert_same(some, other)
    del choice, tasks
    gc.collect()
    assert choosing.device_bytes < before, "the old epoch has gone, the smaller one has not"
    del changed
    live.disable(live.epoch().item_ids[:1])
    live.flush()
    gc.collect()
    assert choosing.device_bytes == 0


# ---- nothing waits ---------------------------------------------------------------------------------------------------


def _without_values(decoder: Decoder, weights: Weights) -> Decoder:
    """The same model on the device `meta`."""

    def moved(of: Any) -> dict[str, Any]:
        tensors = {field.name: getattr(of, field.name) for field in dataclasses.fields(LayerWeights)}
        return {name: None if tensor is None else tensor.to(META) for name, tensor in tensors.items()}

    layers = [LayerWeights(**moved(layer)) for layer in weights.layers]
    there = Weights(weights.embed.to(META), layers, weights.final_norm.to(META), weights.lm_head.to(META))
    return Decoder(decoder.spec, there)


class _Watching(TorchDispatchMode):
    """Counts operators, views apart; refuses what makes a GPU's host wait though no value is read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].device != out.device:
            assert "upload" in [frame.name for frame in traceback.extract_stack()], "from memory that is not pinned"
        self.count += not func.is_view
        return out


@pytest.fixture
def tiny_on_meta(tmp_path: Any) -> Decoder:
    spec, weights = load_model(tiny_model("llama", tmp_path, vocab_size=VOCAB), torch.float32, "cpu")
    return _without_values(Decoder(spec, weights), weights)


def _task_on_meta(decoder: Decoder, code_index: CodeIndex, number: int) -> BeamTask:
    spec = decoder.spec
    kv = torch.empty(spec.num_layers, 2, spec.num_kv_heads, 20, spec.head_dim, device=META)
    prompt = BeamPrompt(
        (Segment(kv, 0, 0, 9, 0), Segment(kv, 9, 0, 20, 1)), 29, torch.empty(spec.hidden_size, device=META)
    )
    allowed = code_index.allowed(None, code_index.item_ids[: 3 * number])
    return BeamTask(prompt, code_index, allowed, 4 + number, RULES[number % 2])


def test_a_search_waits_for_no_value_until_it_is_read(tiny_on_meta: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """All levels of several requests, passes included, on a device from which nothing can be read."""
    monkeypatch.delattr(torch, "tensor")  # it copies from memory that is not pinned, beneath what can be watched
    code_index = _catalogue(9, (6, 7, 5, 8), 200)
    tokens = CodeTokens(tuple(np.arange(9, dtype=np.int32) + 9 * level for level in range(4)))
    tasks = [_task_on_meta(tiny_on_meta, code_index, number) for number in range(4)]
    search = BeamSearch(tiny_on_meta, OnDevice(tokens, META), 30)
    num_passes = 0
    with _Watching():
        search.begin(tasks, untimed)
        while not search.ended:
            work = search.next_pass()
            assert len(work.token_ids) == sum(group.num_rows for group in work.groups)
            search.take(tiny_on_meta.forward(work), untimed)
            num_passes += 1
    assert num_passes == 3
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        search.found()


def test_what_is_sent_from_memory_that_is_not_pinned_is_seen() -> None:
    with _Watching(), pytest.raises(AssertionError, match="not pinned"):
        torch.arange(3).to(META)


def test_choosing_in_numpy_would_wait(tiny_on_meta: Decoder) -> None:
    """That the test before this one can fail."""
    tokens = CodeTokens(tuple(np.arange(9, dtype=np.int32) + 9 * level for level in range(4)))
    choosing = OnHost(tokens)
    choosing.columns = [column.to(META) for column in choosing.columns]
    with pytest.raises(TypeError, match="meta"):
        BeamSearch(tiny_on_meta, choosing, 30).begin([_task_on_meta(tiny_on_meta, _catalogue(9), 1)], untimed)


def test_as_many_operators_for_one_request_as_for_many(tiny_on_meta: Decoder) -> None:
    """They are launched one by one, so their number is told in docs/gpu.md."""
    code_index = _catalogue(9, (6, 7, 5), 200)
    counts = []
    for number in (1, 8):
        task = replace(_task_on_meta(tiny_on_meta, code_index, 0), allowed=None, rule="renormalise")
        choice = OnDevice(_tokens((6, 7, 5)), META).begin([task] * number)
        with _Watching() as watching, torch.inference_mode():
            choice.expand()
            choice.choose(torch.empty(number, 6, device=META), None)
            _ = choice.rows
        counts.append(watching.count)
    print(f"{counts[0]} operators to choose the beams of a level")
    assert counts[0] == counts[1] <= 45
