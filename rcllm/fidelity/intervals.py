"""Bootstrap intervals of means over requests.

Knows nothing of what the numbers are. Invariant: rows are resampled whole, so columns stay paired: the interval of a
column of differences is the paired interval. A value that is not defined (NaN) takes part in no mean, and the interval
says how many values did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 2000
_CELLS = 1 << 22  # of the count matrix at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over requests and where it lies with 95 % confidence."""

    mean: float  # NaN where no value is defined
    low: float  # NaN for fewer than two defined values: there is nothing to tell a spread from
    high: float
    count: int  # defined values

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: npt.ArrayLike, *, seed: int, confidence: float = 0.95) -> list[Interval]:
    """One interval per column of `values` [requests, columns].

    BCa: percentiles of resampled means, corrected for bias and skewness (Efron 1987, "Better Bootstrap Confidence
    Intervals", eq. 6.6 and 6.8). The interval of equal values is their value.
    """
    table = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(table)
    counts, filled = defined.sum(axis=0), np.where(defined, table, 0.0)
    means = np.divide(filled.sum(axis=0), counts, out=np.full(table.shape[1], math.nan), where=counts > 0)
    resampled = np.concatenate([_means(weights, filled, defined) for weights in _weights(len(table), seed)])
    return [
        Interval(float(mean), *_limits(column[known], means_of, float(mean), confidence), int(known.sum()))
        for column, known, means_of, mean in zip(table.T, defined.T, resampled.T, means, strict=True)
    ]


def _weights(num_rows: int, seed: int) -> Iterator[FloatArray]:
    """[resamples, rows]: how often each row was drawn."""
    rng = np.random.default_rng(seed)
    most = max(1, _CELLS // max(1, num_rows))
    for start in range(0, RESAMPLES, most):
        size = min(most, RESAMPLES - start)
        drawn = rng.integers(0, num_rows, (size, num_rows)) + np.arange(size)[:, None] * num_rows
        yield np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows).astype(np.float64)


def _means(weights: FloatArray, filled: FloatArray, defined: npt.NDArray[np.bool_]) -> FloatArray:
    """[resamples, columns]; NaN where a resample drew no defined value."""
    totals, counts = weights @ filled, weights @ defined.astype(np.float64)
    return np.divide(totals, counts, out=np.full_like(totals, math.nan), where=counts > 0)


def _limits(values: FloatArray, resampled: FloatArray, mean: float, confidence: float) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    centred = values - mean
    spread = float((centred**2).sum())
    if spread <= len(values) * (1e-12 * max(1.0, abs(mean))) ** 2:
        return mean, mean
    resampled = resampled[~np.isnan(resampled)]
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    below = (np.mean(resampled < mean) + np.mean(resampled <= mean)) / 2
    bias = float(ndtri(np.clip(below, 1 / (2 * len(resampled)), 1 - 1 / (2 * len(resampled)))))
    quantiles = ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    shifted = bias + (bias + quantiles) / (1 - acceleration * (bias + quantiles))
    low, high = np.quantile(resampled, ndtr(shifted))
    return float(low), float(high)
