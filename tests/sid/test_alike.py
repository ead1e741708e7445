"""How alike items are that share a code: by the formula, pair by pair."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rcllm.sid.alike import likeness
from rcllm.sid.quantise import CodeConfig, fitting, fitting_size, quantise


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_it_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    vectors, codes = rng.standard_normal((30, 5)).astype(np.float32), rng.integers(0, 7, 30)
    pairs = list(itertools.combinations(range(30), 2))
    together = [pair for pair in pairs if codes[pair[0]] == codes[pair[1]]]
    found = likeness(vectors, codes)
    assert found.random == pytest.approx(np.mean([_cosine(vectors[a], vectors[b]) for a, b in pairs]), abs=1e-6)
    assert found.shared == pytest.approx(np.mean([_cosine(vectors[a], vectors[b]) for a, b in together]), abs=1e-6)


def test_without_pairs_it_is_not_defined() -> None:
    vectors = np.eye(3, dtype=np.float32)
    assert math.isnan(likeness(vectors, np.arange(3)).shared)
    assert likeness(vectors, np.arange(3)).random == 0.0
    assert math.isnan(likeness(vectors[:1], np.zeros(1, int)).random)


def test_items_without_a_vector_are_like_nobody() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    assert likeness(vectors, np.zeros(3, int)).shared == pytest.approx(1 / 3)  # one pair of three


def test_codes_of_clusters_are_alike_and_those_of_noise_are_not() -> None:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((8, 16)) * 5
    clustered = quantise(
        (centres[np.arange(160) % 8] + rng.standard_normal((160, 16))).astype(np.float32), fitting(160, None, 8)
    )
    noise = quantise(rng.standard_normal((160, 256)).astype(np.float32), fitting(160, None, 8))
    assert clustered.likeness.shared > 0.8 > 0.2 > noise.likeness.shared
    assert abs(clustered.likeness.random) < 0.05
    assert clustered.items_per_first_code == 20.0


@pytest.mark.parametrize(
    ("num_items", "levels", "size"),
    [(1, 2, 2), (2, 2, 2), (5, 2, 4), (40, 2, 8), (200, 2, 32), (1000, 2, 64), (16_384, 2, 256), (16_385, 3, 64)],
)
def test_sizes_follow_the_catalogue(num_items: int, levels: int, size: int) -> None:
    assert fitting(num_items, None, None, seed=3) == CodeConfig(levels, size, seed=3)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_fitting_size_leaves_room_and_lets_items_share(levels: int) -> None:
    for num_items in [*range(1, 300), *(int(1.3**n) for n in range(22, 55))]:
        size = fitting_size(num_items, levels)
        if size == 256:
            continue
        assert size & (size - 1) == 0
        assert 2 * size**levels >= 3 * num_items or size == 2
        assert num_items >= 4 * size or size**levels < 8 * num_items * 2**levels, "no larger than it must be"


def test_what_is_asked_for_is_kept() -> None:
    assert fitting(200, None, 256) == CodeConfig(2, 256)
    assert fitting(200, 3, None) == CodeConfig(3, 16)
    assert fitting(200, 4, 5) == CodeConfig(4, 5)
