"""A block comes back as it was, or not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcllm.store.codec import decode, encode
from rcllm.store.sealed import CorruptBlockError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def kv(dtype: torch.dtype, size: int = 5) -> torch.Tensor:
    return torch.randn(2, 2, 3, size, 4, generator=torch.Generator().manual_seed(size)).mul(40).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7])
def test_what_comes_back_is_what_was_written(dtype: torch.dtype, size: int) -> None:
    wanted = kv(dtype, size)
    for data in (encode(wanted), memoryview(bytes(encode(wanted)))):  # writable, and as a file maps it
        found = decode(data)
        assert found.dtype == dtype
        assert torch.equal(found, wanted)


def test_a_view_of_a_larger_block_is_written_alone() -> None:
    whole = kv(torch.float32, 9)
    assert torch.equal(decode(encode(whole[:, :, :, 2:5])), whole[:, :, :, 2:5])


@given(place=st.integers(0, 48 + 2 * 2 * 3 * 5 * 4 * 2 - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(place: int, bit: int) -> None:
    data = bytearray(encode(kv(torch.float16)))
    data[place] ^= 1 << bit
    with pytest.raises(CorruptBlockError):
        decode(memoryview(data))


@given(length=st.integers(0, 527))
def test_a_torn_block_is_refused(length: int) -> None:
    with pytest.raises(CorruptBlockError):
        decode(encode(kv(torch.float16))[:length])
