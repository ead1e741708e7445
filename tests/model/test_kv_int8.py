"""KV in int8: what is lost by it, and its layout. Exact against the slow twin; the loss is bounded per group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rcllm.model.attend.native import kernels
from rcllm.model.kv_int8 import GROUP, kept, kept_bytes, num_values, quantise, widen
from rcllm.model.spec import kv_row_bytes
from tests.reference import kv_int8 as reference

CPU = torch.device("cpu")
HEAD_DIMS = (16, 20, 32, 40, 64, 80, 96, 128, 256)
finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
rows = st.sampled_from(HEAD_DIMS).flatmap(lambda size: arrays(np.float32, (2, size), elements=finite))


def random_kv(head_dim: int = 64, length: int = 7, seed: int = 0) -> torch.Tensor:
    """[3 layers, 2, 2 heads, length, head_dim], whose rows differ in size by some orders, with an outlier channel."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(3, 2, 2, length, head_dim, generator=generator)
    kv *= torch.randn(3, 2, 2, length, 1, generator=generator).exp()
    kv[..., 5] *= 20
    return kv


@given(values=rows)
def test_a_value_moves_by_half_a_step_of_its_group_at_most(values: np.ndarray) -> None:
    kv = torch.from_numpy(values)
    error = (kv - widen(quantise(kv))).abs()
    for start in range(0, kv.shape[1], GROUP):
        largest = kv[:, start : start + GROUP].abs().amax(1, keepdim=True)
        step = largest / 127 * (1 + 2**-8)  # the scale is itself rounded, to bf16
        assert (error[:, start : start + GROUP] <= step / 2 * (1 + 1e-6) + 1e-35).all()


@given(values=rows)
def test_levels_and_scales_are_those_of_the_slow_twin(values: np.ndarray) -> None:
    block = quantise(torch.from_numpy(values))
    assert np.array_equal(block.numpy(), np.stack([reference.quantise(row) for row in values.tolist()]))
    assert torch.equal(widen(block).double(), reference.widen(block))


@given(values=rows)
def test_the_largest_values_of_groups_keep_their_sign_and_order_of_size(values: np.ndarray) -> None:
    """The largest of a group is level ±127, or 126 where the scale was rounded up."""
    levels = quantise(torch.from_numpy(values))[:, : values.shape[1]].numpy().astype(int)
    for start in range(0, values.shape[1], GROUP):
        for row, its_levels in zip(values[:, start : start + GROUP], levels[:, start : start + GROUP], strict=True):
            at = np.abs(row).argmax()
            if abs(row[at]) > 1e-30:
                assert 126 <= its_levels[at] * np.sign(row[at]) <= 127


def test_ties_are_rounded_to_even() -> None:
    kv = torch.zeros(1, GROUP)
    kv[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantise(kv)[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_zeros_stay_zeros() -> None:
    kv = torch.zeros(2, 2, 1, 3, 64)
    kv[0, 0, 0, 1] = 1.0
    assert torch.equal(widen(quantise(kv)) == 0, kv == 0)
    assert not quantise(torch.zeros(4, 32)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    """Its group is NaN, and so is whatever attends to it; the other groups are as they were."""
    kv = torch.ones(1, 64)
    kv[0, 20] = bad
    wide = widen(quantise(kv))
    assert wide[0, 16:32].isnan().all()
    assert torch.equal(wide[0, :16], widen(quantise(torch.ones(1, 16)))[0])
    assert wide[0, 32:].isfinite().all()


@pytest.mark.parametrize("size", [1e-35, 1e-8, 1e8, 3e38])
def test_no_size_of_values_overflows(size: float) -> None:
    kv = torch.linspace(-1, 1, 64)[None] * size
    assert ((widen(quantise(kv)) - kv).abs() <= size / 250).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_block_is_one_tensor_whose_tokens_are_sliced_as_others(head_dim: int) -> None:
    kv = random_kv(head_dim)
    block = quantise(kv)
    assert block.dtype == torch.int8
    assert block.is_contiguous()
    assert block.shape == (3, 2, 2, 7, kv_row_bytes(head_dim, 1))
    assert num_values(block) == num_values(kv) == head_dim
    wide = widen(block)
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        some = block[:, :, :, start:stop]
        assert torch.equal(widen(some), wide[:, :, :, start:stop])
        assert torch.equal(quantise(kv[:, :, :, start:stop]), some)
        assert torch.equal(widen(block[1, :, :, start:stop]), wide[1, :, :, start:stop])


def test_a_row_depends_on_itself_alone() -> None:
    kv = random_kv()
    one = torch.cat([quantise(kv[:, :, :, i : i + 1]) for i in range(7)], dim=3)
    assert torch.equal(quantise(kv), one)
    assert torch.equal(quantise(kv.half()), quantise(kv.half().float()))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_block_is_over_three_and_a_half_times_smaller_than_in_fp32(head_dim: int) -> None:
    kv = random_kv(head_dim)
    assert kv.nbytes / quantise(kv).nbytes > 3.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_what_is_kept_is_a_contiguous_copy_of_the_size_that_was_told(dtype: torch.dtype) -> None:
    whole = random_kv(length=12)
    kv = whole[:, :, :, 3:8]  # a view of a pass's buffer
    found = kept(kv, dtype, CPU)
    assert (found.dtype, found.nbytes) == (dtype, kept_bytes(kv, dtype))
    assert found.is_contiguous()
    again = kept(found, dtype, CPU)  # as it comes back from a store
    assert again.data_ptr() != found.data_ptr()
    assert again.nbytes == kept_bytes(found, dtype)
    assert torch.equal(again, found)
    before = found.clone()
    whole.zero_()
    assert torch.equal(found, before)


def test_a_block_without_tokens() -> None:
    empty = torch.empty(3, 2, 2, 0, 64)
    assert quantise(empty).shape == (3, 2, 2, 0, 72)
    assert widen(quantise(empty)).shape == empty.shape
    assert kept_bytes(empty, torch.int8) == 0


def test_floats_are_widened_to_themselves() -> None:
    kv = random_kv().half()
    assert widen(kv) is kv


def test_both_sides_have_groups_of_one_size() -> None:
    compiled = kernels()
    if compiled is None:
        pytest.skip("no C++ compiler on this machine")
    assert compiled.int8_group == GROUP
