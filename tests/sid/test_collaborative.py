"""Vectors from who touched what."""

import numpy as np
import pytest

from rcllm.sid.collaborative import code_vectors, collaborative_vectors, cooccurrence


def test_pairs_count_by_their_distance() -> None:
    table = cooccurrence([[0, 1, 2], [1, 0], [3]], 4, window=2).toarray()
    assert table == pytest.approx(np.array([[0, 2, 0.5, 0], [2, 0, 1, 0], [0.5, 1, 0, 0], [0, 0, 0, 0]]))
    assert cooccurrence([[0, 1, 2]], 3, window=1).toarray()[0, 2] == 0.0
    assert cooccurrence([[1, 1]], 2, window=1).nnz == 0  # an item beside itself tells nothing
    assert cooccurrence([], 3, window=1).shape == (3, 3)


def test_items_of_one_circle_lie_close_and_lonely_ones_nowhere() -> None:
    rng = np.random.default_rng(0)
    histories = [list(rng.permutation(5) + 5 * (n % 3)) for n in range(60)]
    vectors = collaborative_vectors(histories, 16, dimensions=3, window=4)
    cosine = vectors @ vectors.T
    same = np.equal.outer(np.arange(15) // 5, np.arange(15) // 5)
    assert cosine[:15, :15][same].min() > 0.5 > 0.1 > cosine[:15, :15][~same].max()
    assert not vectors[15].any()
    assert np.array_equal(vectors, collaborative_vectors(histories, 16, dimensions=3, window=4))


def test_without_pairs_there_is_nothing_to_tell() -> None:
    assert not collaborative_vectors([[0], [1]], 5, dimensions=4).any()
    assert not collaborative_vectors([], 5, dimensions=4).any()


def test_code_vectors_add_up_to_the_means_of_items() -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    codes = np.stack([np.arange(60) % 3, np.arange(60) // 3 % 4], axis=1).astype(np.int32)
    coarse, fine = code_vectors(vectors, codes, (3, 5))
    centred = vectors - vectors.mean(axis=0)
    assert coarse[1] == pytest.approx(centred[codes[:, 0] == 1].mean(axis=0), abs=1e-5)
    assert fine[2] == pytest.approx((centred - coarse[codes[:, 0]])[codes[:, 1] == 2].mean(axis=0), abs=1e-5)
    assert not fine[4].any()  # which no item has
