"""Position-aware token embeddings, their random-hyperplane signatures, and the clusters that these make.

e(t, b), the embedding of token t in position bucket b, is the model's own embedding row of t at unit length, turned by
b as RoPE would: its i-th pair of dimensions by b · 10000^(-2i/d). So the cosine of two embeddings falls with the
distance of words and with that of places, and equal (t, b) have cosine 1. Sources: RcLLM (arXiv 2605.07443, §III-B,
its M2), which states neither family nor sizes. Rotated embeddings under LSH are those of SemShareKV (arXiv 2509.24832).
Knows nothing of KV. Never imports torch. Invariant: a result does not depend on what else is in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Rows = Callable[[Ints], Floats]  # token ids [n] -> their rows of the embedding matrix [n, d], fp32

_BASE = 10_000.0  # of the angles, as in RoFormer
_MAX_BUCKETS = 1 << 20  # a word's code is its token id times this, plus its bucket
_CHUNK = 20_000  # embeddings in memory at once


@dataclass(frozen=True, slots=True)
class Words:
    """Tokens at places: what is embedded, compared and clustered."""

    token_ids: Ints  # [n]
    buckets: Ints  # [n], position // bucket width

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: Ints | slice) -> Words:
        return Words(self.token_ids[index], self.buckets[index])

    @property
    def codes(self) -> Ints:
        """One number per word; equal for equal words, and ordered by token, then bucket."""
        return self.token_ids * _MAX_BUCKETS + self.buckets

    @classmethod
    def of_codes(cls, codes: Ints) -> Words:
        return cls(codes // _MAX_BUCKETS, codes % _MAX_BUCKETS)


def embed(rows: Rows, words: Words) -> Floats:
    """[n, d], unit length: each word's token embedding, turned at its position bucket."""
    points = rows(words.token_ids)
    low, high = np.split(points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12), 2, axis=1)
    frequencies = _BASE ** (-np.arange(low.shape[1]) / low.shape[1])
    buckets, place = np.unique(words.buckets, return_inverse=True)  # few
    angles = buckets[:, None] * frequencies  # in fp64, as for positions
    cos, sin = np.cos(angles).astype(np.float32)[place], np.sin(angles).astype(np.float32)[place]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=1)


@dataclass(frozen=True, slots=True)
class Lsh:
    """Several tables of random hyperplanes; which side of each a point lies on is a bit of its signature.

    Two points at angle φ agree in a table of b bits with probability (1 - φ/π)^b (Charikar, STOC 2002).
    """

    planes: Floats  # [d, tables, bits]

    @classmethod
    def of(cls, width: int, tables: int, bits: int, seed: int) -> Lsh:
        return cls(np.random.default_rng(seed).standard_normal((width, tables, bits)).astype(np.float32))

    @property
    def num_tables(self) -> int:
        return int(self.planes.shape[1])

    def signatures(self, rows: Rows, words: Words) -> Ints:
        """[tables, n]; embeds a chunk at a time."""
        chunks = [self._signatures(embed(rows, words[at : at + _CHUNK])) for at in range(0, len(words), _CHUNK)]
        return np.concatenate(chunks, axis=1) if chunks else np.empty((self.num_tables, 0), np.int64)

    def _signatures(self, points: Floats) -> Ints:
        width, tables, bits = self.planes.shape
        sides = (points @ self.planes.reshape(width, -1)).reshape(-1, tables, bits) > 0
        return np.asarray(sides @ (1 << np.arange(bits, dtype=np.int64))).T


@dataclass(frozen=True, slots=True)
class Canonical:
    """The words that stand for all."""

    words: Words  # ordered by code
    covered: Ints  # [n], how many tokens of the text each stands for


def choose(rows: Rows, words: Words, counts: Ints, lsh: Lsh, threshold: float, most: int) -> Canonical:
    """Clusters distinct `words`, seen `counts` times each, and picks at most `most` that stand for most tokens.

    Table after table, the words that nothing stands for yet are put into LSH buckets. The member nearest to a bucket's
    centroid (weighted by counts) is canonical. It stands for those of its bucket within the cosine `threshold`. What no
    table covers stands for itself. A look-up finds a word's prototype again, because they share that table's bucket.
    """
    left, canonical, covered = np.arange(len(words)), [], []
    signatures = lsh.signatures(rows, words)
    for table in range(lsh.num_tables):
        left = left[np.argsort(signatures[table, left], kind="stable")]
        uncovered = []
        for start, stop in _whole_buckets(signatures[table, left]):
            part = left[start:stop]
            first, group = _groups(signatures[table, part])
            points = embed(rows, words[part])
            centroids = np.add.reduceat(points * counts[part, None].astype(np.float32), first, axis=0)
            centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
            nearness = np.einsum("nd,nd->n", points, centroids[group])
            middle = np.lexsort((-nearness, group))[first]  # nearest of each group; groups are in order
            close = np.einsum("nd,nd->n", points, points[middle][group]) >= threshold
            close[middle] = True
            canonical.append(part[middle])
            covered.append(np.bincount(group, weights=counts[part] * close).astype(np.int64))
            uncovered.append(part[~close])
        left = np.concatenate(uncovered) if uncovered else left
    chosen, weight = np.concatenate([*canonical, left]), np.concatenate([*covered, counts[left]])
    codes = words.codes[chosen]
    best = np.lexsort((codes, -weight))[:most]
    best = best[np.argsort(codes[best])]
    return Canonical(words[chosen[best]], weight[best])


def _groups(ordered: Ints) -> tuple[Ints, Ints]:
    """Where each run of equal values starts, and the number of each value's run."""
    starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    return np.flatnonzero(starts), np.cumsum(starts) - 1


def _whole_buckets(ordered: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of about _CHUNK values that cut no run of equal values."""
    start = 0
    while start < len(ordered):
        stop = min(start + _CHUNK, len(ordered))
        stop = int(np.searchsorted(ordered, ordered[stop - 1], side="right"))
        yield start, stop
        start = stop
