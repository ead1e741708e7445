"""Codes: all differ, near items share their beginnings, and the same settings give the same codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.errors import ConfigError, DataError
from rcllm.sid.config import CodeConfig
from rcllm.sid.quantise import enough_levels, kmeans, quantise, tell_apart


def _vectors(count: int, seed: int = 0, dimensions: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimensions)).astype(np.float32)


def test_clusters_become_first_codes() -> None:
    centres = _vectors(4, 1) * 50
    kind = np.arange(60) % 4
    found = quantise((centres[kind] + _vectors(60)).astype(np.float32), CodeConfig(levels=3, size=4, seed=3))
    first = found.codes[:, 0]
    assert all(len(set(first[kind == k].tolist())) == 1 for k in range(4))
    assert len(set(first.tolist())) == 4
    assert found.levels[0].used == 4
    assert found.levels[0].entropy_bits == pytest.approx(2.0)
    errors = [level.error for level in found.levels]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.01


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(2, 5), st.data())
def test_no_two_items_are_alike(levels: int, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size**levels))
    distinct = data.draw(st.integers(1, count))
    vectors = _vectors(distinct, seed=data.draw(st.integers(0, 9)))[np.arange(count) % distinct]  # many are equal
    found = quantise(vectors, CodeConfig(levels, size))
    assert found.codes.shape == (count, levels)
    assert len(np.unique(found.codes, axis=0)) == count
    assert found.codes.min() >= 0
    assert found.codes.max() < size
    assert found.moved >= found.collisions
    again = quantise(vectors, CodeConfig(levels, size))
    assert np.array_equal(found.codes, again.codes)
    assert found.levels == again.levels


def test_items_that_differ_keep_their_nearest_codes() -> None:
    codes = np.array([[0, 1], [1, 0], [0, 0]], np.int32)
    assert np.array_equal(tell_apart(codes, _vectors(3, dimensions=2), [_vectors(2, 1, 2), _vectors(2, 2, 2)]), codes)


def test_the_nearest_of_two_alike_stays() -> None:
    coarse, fine = np.zeros((2, 1), np.float32), np.array([[0.0], [1.0]], np.float32)
    vectors = np.array([[0.1], [0.4]], np.float32)
    assert tell_apart(np.zeros((2, 2), np.int32), vectors, [coarse, fine]).tolist() == [[0, 0], [0, 1]]


def test_a_prefix_that_is_too_full_sends_the_farthest_to_its_sibling() -> None:
    coarse, fine = np.array([[0.0], [10.0]], np.float32), np.array([[0.0], [1.0]], np.float32)
    vectors = np.array([[0.0], [1.0], [4.0]], np.float32)
    told = tell_apart(np.array([[0, 0], [0, 1], [0, 1]], np.int32), vectors, [coarse, fine])
    assert told.tolist() == [[0, 0], [0, 1], [1, 0]]


def test_an_empty_cluster_takes_the_vector_that_fits_worst() -> None:
    vectors = np.array([[0.0], [0.0], [0.0], [9.0]], np.float32)
    centres = kmeans(vectors, 3, 10, np.random.default_rng(0))
    assert {0.0, 9.0} <= {round(float(x), 3) for x in centres.ravel()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CodeConfig(levels=1), "levels must be at least 2, got 1"),
        (CodeConfig(levels=7), "levels must be at most 6, got 7"),
        (CodeConfig(size=1), "size must be at least 2, got 1"),
        (CodeConfig(levels=2, size=2), "tell 4 items apart, the catalogue has 5"),
    ],
)
def test_codes_that_cannot_be(config: CodeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantise(_vectors(5), config)


def test_few_levels_for_small_catalogues() -> None:
    assert [enough_levels(items, 256) for items in (1, 16_384, 16_385, 1_000_000, 10**9)] == [2, 2, 3, 3, 4]
    assert enough_levels(10**6, 2) == 6


def test_embeddings_must_be_finite() -> None:
    vectors = _vectors(5)
    vectors[2, 3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        quantise(vectors, CodeConfig(2, 4))
