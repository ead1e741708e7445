"""Attention that tokens receive, against an explicit map; close, 1e-6 (fp32)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.core.ranking import Reduction
from rcllm.reuse.probe import attention_received


def attention_map(sees: np.ndarray, block: np.ndarray, q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    """[tokens, tokens], a mean over heads; one pair at a time."""
    count, heads = len(block), q.shape[1]
    found = np.zeros((count, count))
    for head in range(heads):
        keys = k[:, head // (heads // k.shape[1])]
        for i in range(count):
            seen = [j for j in range(count) if (j <= i if block[i] == block[j] else sees[block[i], block[j]])]
            scores = torch.tensor([float(q[i, head] @ keys[j]) / math.sqrt(q.shape[2]) for j in seen])
            found[i, seen] += torch.softmax(scores.double(), 0).numpy() / heads
    return found


@pytest.mark.parametrize("reduction", ["question", "mean", "sum"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 2), (2, 2)])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_a_token_receives_is_the_column_of_the_map(
    reduction: Reduction, heads: int, kv_heads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 5, size=6)
    sizes[0] += 1
    block = np.repeat(np.arange(6, dtype=np.int32), sizes)
    sees = np.tril(rng.random((6, 6)) < 0.6, k=-1)
    q = torch.from_numpy(rng.standard_normal((len(block), heads, 8), dtype=np.float32))
    k = torch.from_numpy(rng.standard_normal((len(block), kv_heads, 8), dtype=np.float32))
    asked = np.flatnonzero(np.isin(block, rng.integers(0, 6, 2)) | (block == 0)).astype(np.int32)
    if reduction != "question":
        asked = np.arange(len(block), dtype=np.int32)
    got = attention_received(sees, block, q[asked], asked, k, reduction)
    full = attention_map(sees, block, q, k)
    if reduction == "mean":
        np.fill_diagonal(full, 0)
    seen = full[asked] > 0
    total = full[asked].sum(0)
    wanted = total if reduction == "sum" else total / np.maximum(seen.sum(0), 1)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_whole_rows_of_attention_sum_to_one() -> None:
    q, k = torch.randn(5, 2, 8), torch.randn(5, 1, 8)
    rows = np.arange(5, dtype=np.int32)
    received = attention_received(np.zeros((1, 1), bool), np.zeros(5, np.int32), q, rows, k, "sum")
    assert received.sum() == pytest.approx(5.0)
