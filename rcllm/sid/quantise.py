"""Residual k-means: vectors become sequences of codes, coarse to fine, no two items alike.

Level 0 clusters the vectors; each further level clusters what the level before left (the residual). Items that would
share all of their codes are told apart in the last level. Under every prefix, codes are dealt out so that the sum of
squared distances is least: an assignment problem. A prefix with more items than codes sends the items that are farthest
out to another prefix. Knows nothing of items or texts. Invariant: the result depends on vectors, settings and seed
alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from rcllm.core.ranking import IntArray
from rcllm.errors import DataError
from rcllm.sid.alike import Likeness, likeness
from rcllm.sid.config import CodeConfig

FloatArray = npt.NDArray[np.float32]
_ROWS = 65_536  # vectors compared with all centroids at a time
_SAMPLE = (
    256  # vectors per centroid that k-means learns from, at most: more change the centroids little (as FAISS has it)
)
_LARGEST = 256  # codes per level that are chosen without being asked for
_SHARED_BY = 4  # items per first-level code, at least, where the catalogue allows it


def enough_levels(num_items: int, size: int) -> int:
    """The fewest levels, from 2 to 6, that leave three of four code sequences free: few levels are learnt best."""
    return next((levels for levels in range(2, 6) if size**levels >= 4 * num_items), 6)


def fitting_size(num_items: int, levels: int) -> int:
    """The smallest power of two, up to 256, that leaves three of four code sequences free.

    With two levels that is about twice the square root of the number of items, with three about 1.6 times its cube
    root. So many items share a first-level code, and what a model learns of the code helps all of them. Where a code
    would have less than four items, because the catalogue is small, a third of the sequences left free is enough.
    """
    size = next((2**bits for bits in range(1, 8) if 2 ** (bits * levels) >= 4 * num_items), _LARGEST)
    while size > 2 and num_items < _SHARED_BY * size and 2 * (size // 2) ** levels >= 3 * num_items:
        size //= 2
    return size


def fitting(num_items: int, levels: int | None, size: int | None, seed: int = 0) -> CodeConfig:
    """The shape for a catalogue; None: chosen by `enough_levels` and `fitting_size`. Raises ConfigError."""
    levels = enough_levels(num_items, size or _LARGEST) if levels is None else levels
    config = CodeConfig(levels, fitting_size(num_items, levels) if size is None else size, seed=seed)
    config.check(num_items)
    return config


@dataclass(frozen=True, slots=True)
class LevelStats:
    used: int  # codes that some item has
    entropy_bits: float  # of the codes' distribution over items; log2(size) when they are used equally
    error: float  # share of the vectors' variance that the codes up to this level leave unexplained


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of items, in the order of the vectors."""

    codes: IntArray  # [items, levels]
    sizes: tuple[int, ...]  # codes per level
    collisions: int  # items that shared all codes with an earlier one before they were told apart
    moved: int  # items whose codes are not the nearest ones, so that all differ
    levels: tuple[LevelStats, ...]
    likeness: Likeness  # of items that share their first code
    twins: int  # items whose vector an earlier item has, too: nothing but the last level can tell them apart

    @property
    def items_per_first_code(self) -> float:
        """The mean over the first-level codes that some item has; 1 where no two items share one."""
        return len(self.codes) / self.levels[0].used


def quantise(vectors: FloatArray, config: CodeConfig, on_level: Callable[[int], None] | None = None) -> Codes:
    """[items, d] -> codes. `on_level`: told the number of levels that are done. Raises ConfigError, DataError."""
    config.check(len(vectors))
    if not np.isfinite(vectors).all():
        raise DataError("embeddings hold values that are not finite; compute them anew")
    rng = np.random.default_rng(config.seed)
    centred = vectors - vectors.mean(axis=0)
    variance = max(float((centred**2).sum()), 1e-30)
    residual, codes, centroids, errors = centred.copy(), [], [], []
    for level in range(config.levels):
        few = len(residual) <= _SAMPLE * config.size
        drawn = residual if few else residual[rng.permutation(len(residual))[: _SAMPLE * config.size]]
        centres = kmeans(drawn, config.size, config.iterations, rng)
        nearest = _nearest(residual, centres)[0]
        residual -= centres[nearest]
        codes.append(nearest)
        centroids.append(centres)
        errors.append(float((residual**2).sum()) / variance)
        if on_level:
            on_level(level + 1)
    table = np.stack(codes, axis=1).astype(np.int32)
    collisions = len(table) - len(np.unique(table, axis=0))
    unique = tell_apart(table, centred, centroids)
    return Codes(
        unique,
        (config.size,) * config.levels,
        collisions,
        int((unique != table).any(axis=1).sum()),
        tuple(_level_stats(column, error) for column, error in zip(unique.T, errors, strict=True)),
        likeness(centred, unique[:, 0]),
        len(vectors) - len({hash(row.tobytes()) for row in vectors}),
    )


def kmeans(vectors: FloatArray, count: int, iterations: int, rng: np.random.Generator) -> FloatArray:
    """[count, d]: Lloyd's algorithm from a k-means++ start; an empty cluster takes the vector that fits worst."""
    centres = _plus_plus(vectors, count, rng)
    before, shape = np.full(len(vectors), count), (len(vectors), count)
    for _ in range(iterations):
        nearest, distance = _nearest(vectors, centres)
        if (nearest == before).all():
            break
        before = nearest
        sizes = np.bincount(nearest, minlength=count)
        members = sparse.csr_array((np.ones(len(nearest), np.float32), nearest, np.arange(len(nearest) + 1)), shape)
        sums = members.T @ vectors
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
        empty = np.flatnonzero(sizes == 0)
        worst = np.argsort(-distance, kind="stable")[: len(empty)]
        centres[empty[: len(worst)]] = vectors[worst]
    return centres


def _plus_plus(vectors: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Arthur & Vassilvitskii 2007: each further start is drawn by its squared distance to the ones before."""
    chosen = [int(rng.integers(len(vectors)))]
    distance = ((vectors - vectors[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(count - 1):
        reach = np.cumsum(distance, dtype=np.float64)
        at = int(np.searchsorted(reach, rng.random() * reach[-1], side="right")) if reach[-1] > 0 else 0
        chosen.append(min(at, len(vectors) - 1))
        distance = np.minimum(distance, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1))
    return vectors[chosen].copy()


def _nearest(vectors: FloatArray, centres: FloatArray) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """The nearest centre of each vector (of equal ones the first), and the squared distance to it."""
    found, distance = [], []
    for start in range(0, len(vectors), _ROWS):
        table = _distances(vectors[start : start + _ROWS], centres)
        found.append(table.argmin(axis=1))
        distance.append(table.min(axis=1))
    return np.concatenate(found), np.concatenate(distance)


def tell_apart(codes: IntArray, vectors: FloatArray, centroids: list[FloatArray]) -> IntArray:
    """[items, levels] without repetition, as near to the vectors as the module's rule finds."""
    codes, last = codes.copy(), len(centroids) - 1
    for level in range(last):  # coarse to fine: then a prefix that is too full always has a sibling with room
        _relieve(codes, vectors, centroids, level)
    for items in _by_prefix(codes, last).values():
        if len(items) > len(np.unique(codes[items, last])):
            distance = _distances(_residual(vectors, codes, centroids, items, last), centroids[last])
            codes[items, last] = linear_sum_assignment(distance)[1]
    return codes


def _relieve(codes: IntArray, vectors: FloatArray, centroids: list[FloatArray], level: int) -> None:
    """Where more items share their codes up to `level` than the levels below tell apart, the farthest out move."""
    size, levels = len(centroids[0]), len(centroids)
    room = size ** (levels - level - 1)
    groups = _by_prefix(codes, level + 1)
    counts = {prefix: len(items) for prefix, items in groups.items()}
    for prefix, items in groups.items():
        if len(items) <= room:
            continue
        distance = _distances(_residual(vectors, codes, centroids, items, level), centroids[level])
        for at in np.argsort(-distance[:, prefix[-1]], kind="stable")[: len(items) - room]:
            order = (int(code) for code in np.argsort(distance[at], kind="stable"))
            code = next(code for code in order if counts.get((*prefix[:-1], code), 0) < room)
            counts[(*prefix[:-1], code)] = counts.get((*prefix[:-1], code), 0) + 1
            item = items[at : at + 1]
            codes[item, level] = code
            for below in range(level + 1, levels):
                rest = _residual(vectors, codes, centroids, item, below)
                codes[item, below] = _nearest(rest, centroids[below])[0]


def _by_prefix(codes: IntArray, length: int) -> dict[tuple[int, ...], npt.NDArray[np.int64]]:
    """Item numbers under each prefix of `length` codes, in the order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for item, row in enumerate(codes[:, :length].tolist()):
        groups[tuple(row)].append(item)
    return {prefix: np.array(items) for prefix, items in groups.items()}


def _residual(
    vectors: FloatArray, codes: IntArray, centroids: list[FloatArray], items: npt.NDArray[np.int64], level: int
) -> FloatArray:
    rest = vectors[items].copy()
    for above in range(level):
        rest -= centroids[above][codes[items, above]]
    return rest


def _distances(vectors: FloatArray, centres: FloatArray) -> FloatArray:
    """The squared distance of every vector to every centre, [vectors, centres]."""
    table = (centres**2).sum(axis=1) - 2 * vectors @ centres.T + (vectors**2).sum(axis=1)[:, None]
    return np.asarray(table, dtype=np.float32)


def _level_stats(codes: npt.NDArray[np.int32], error: float) -> LevelStats:
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return LevelStats(len(share), max(0.0, float(-(share * np.log2(share)).sum())), error)
