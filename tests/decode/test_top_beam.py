"""Top-beam against a full stable sort, ties included, and beams that move inside their buffer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.decode.beam_kv import reorder_in_place
from rcllm.decode.top_beam import top_beam
from rcllm.errors import ModelError
from tests.reference.top_beam import full_sort, heap_merge, reorder_one_by_one

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
COARSE = st.sampled_from([0.0, -0.5, -1.0, -2.0, -np.inf])  # many ties
FINE = st.floats(-50, 0, width=32)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Floats, Ints, Floats, int]:
    values = draw(st.sampled_from([COARSE, FINE]))
    counts = draw(st.lists(st.integers(0, 40), max_size=12))
    total = sum(counts)
    parents = draw(st.lists(values, min_size=len(counts), max_size=len(counts)))
    children = draw(st.lists(values, min_size=total, max_size=total))
    beam = draw(st.integers(1, 8) | st.integers(1, 600))
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    return np.array(parents, np.float32), first, np.array(children, np.float32), beam


@given(steps())
@settings(deadline=None)
def test_equals_a_full_sort(step: tuple[Floats, Ints, Floats, int]) -> None:
    parents, first, children, beam = step
    best = top_beam(parents, first, children, beam)
    assert best.indices.tolist() == full_sort(parents, first, children, beam).tolist()
    assert best.indices.tolist() == heap_merge(parents, first, children, beam)[0].tolist()
    scores = children + np.repeat(parents, np.diff(first))
    assert best.scores.tolist() == scores[best.indices].tolist()
    assert 0 <= best.num_skipped <= len(children) - len(best.indices)


def _step(rows: int, width: int, spread: float, seed: int = 0) -> tuple[Floats, Ints, Floats]:
    """Beams whose scores differ by `spread`, with log-probabilities below each."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, width)).astype(np.float32) * 3
    children = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    parents = rng.normal(size=rows).astype(np.float32) * np.float32(spread)
    return parents, np.arange(rows + 1) * width, children.ravel()


@pytest.mark.parametrize("spread", [0.0, 2.0, 30.0], ids=["equal", "usual", "one dominates"])
@pytest.mark.parametrize(("rows", "width", "beam"), [(512, 256, 512), (128, 20, 128), (1, 4096, 64), (700, 1, 64)])
def test_large_steps_equal_a_full_sort_and_skip_most_of_it(rows: int, width: int, beam: int, spread: float) -> None:
    parents, first, children = _step(rows, width, spread)
    best = top_beam(parents, first, children, beam)
    assert best.indices.tolist() == full_sort(parents, first, children, beam).tolist()
    total = rows * width
    print(f"\n{rows} × {width}, beam {beam}: {best.num_skipped} of {total} skipped")
    if total > 100 * beam:
        assert best.num_skipped > total * 0.9


def test_all_equal_keeps_the_first() -> None:
    best = top_beam(np.zeros(100, np.float32), np.arange(101) * 100, np.zeros(10_000, np.float32), 7)
    assert best.indices.tolist() == list(range(7))
    assert best.num_skipped == 0


def test_one_row_with_all_the_best_is_found() -> None:
    parents = np.full(64, -100, np.float32)
    parents[17] = 0
    children = -np.random.default_rng(1).random(64 * 256, dtype=np.float32)
    first = np.arange(65) * 256
    best = top_beam(parents, first, children, 200)
    assert best.indices.tolist() == full_sort(parents, first, children, 200).tolist()
    assert set(best.indices // 256) == {17}


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("place", [0, -1])
def test_scores_that_are_not_numbers_are_an_error(size: int, place: int) -> None:
    children = np.zeros(size, np.float32)
    children[place] = np.nan
    with pytest.raises(ModelError, match="not numbers"):
        top_beam(np.zeros(1, np.float32), np.array([0, size]), children, 2)


# ---- moving ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 40), st.sampled_from([1, 3, 64]), st.sampled_from([0, 1, 2]))
@settings(deadline=None)
def test_reorder_in_place_is_a_gather_for_rising_parents(
    data: st.DataObject, count: int, scratch_rows: int, dim: int
) -> None:
    capacity = data.draw(st.integers(count, 50))
    parents = np.array(sorted(data.draw(st.lists(st.integers(0, capacity - 1), min_size=count, max_size=count))))
    shape = [2, 3, 4]
    shape[dim] = capacity
    buffer = torch.arange(np.prod(shape)).reshape(shape)
    before = buffer.clone()
    reorder_in_place(buffer, parents, dim, scratch_rows)
    wanted = before.index_select(dim, torch.from_numpy(parents))
    assert torch.equal(buffer.narrow(dim, 0, count), wanted)
    assert torch.equal(buffer.narrow(dim, count, capacity - count), before.narrow(dim, count, capacity - count))
    slow = np.arange(capacity)
    reorder_one_by_one(slow, parents.tolist())
    assert slow[:count].tolist() == parents.tolist()


def test_reorder_in_place_is_wrong_without_the_sort() -> None:
    """Why survivors are sorted by flat index: without it, rows are overwritten before they are read."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        parents = rng.permutation(np.sort(rng.integers(0, 32, 32)))
        slots = np.arange(32)
        reorder_one_by_one(slots, parents.tolist())
        wrong += slots.tolist() != parents.tolist()
    assert wrong > 0.9 * 300
    with pytest.raises(AssertionError, match="never fall"):
        reorder_in_place(torch.zeros(3, 1), np.array([2, 1, 0]))
