"""What a pass will take: milliseconds from what it asks of the device, by rates that are learned from passes that ran.

Knows nothing of models or prompts, is given no clock, and never imports torch. Admission, the degradation ladder and
routing ask the same object. Invariant: an estimate is a sum over parts, so that a pass costs what its requests cost,
and no part costs less than nothing; a request that asks for more is never estimated cheaper.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

FloatArray = npt.NDArray[np.float64]

MARGIN = 1.25  # what an estimate is taken times where being late matters: a tenth more or less is its usual error
_WINDOW = 64  # passes that rates are fitted to
_EAGER = 16  # passes after each of which rates are fitted
_REFIT = 8  # passes between two later fits: one takes a third of a millisecond
_TRUST = 0.2  # weight of the first values beside the passes, each of which weighs 1
_RECENT = 9  # passes whose median tells how loaded the machine is now
_ERRORS = 64  # passes that the reported error is the median of
_SHORTEST_MS = 1e-3


@dataclass(frozen=True, slots=True)
class Demand:
    """What a pass, or one request's part of it, asks of the device. Parts of one pass add up."""

    passes: float = 0.0  # what every pass costs, however little it holds
    rows: float = 0.0  # that go through all layers
    missing: float = 0.0  # tokens of blocks that are computed first
    kv_bytes: float = 0.0  # of cached KV that attention reads
    pairs: float = 0.0  # of a row and a token that it attends to

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.passes + other.passes,
            self.rows + other.rows,
            self.missing + other.missing,
            self.kv_bytes + other.kv_bytes,
            self.pairs + other.pairs,
        )

    def array(self) -> FloatArray:
        """[rates], in the order of `Rates`."""
        return np.array((self.passes, self.rows, self.missing, self.kv_bytes, self.pairs))


@dataclass(frozen=True, slots=True)
class Rates:
    """Milliseconds for one of each that a `Demand` counts."""

    passes: float
    rows: float
    missing: float
    kv_bytes: float
    pairs: float

    @classmethod
    def first(cls, row_flops: float, pair_flops: float) -> Rates:
        """What is assumed before a pass has run: two cores of 2026, in fp32. Later values owe nothing to it.

        50 GFLOP/s for few rows, 100 for the many of missing blocks, 25 for attention; 10 GB/s of memory; 2 ms a pass.
        """
        return cls(2.0, row_flops / 50e6, row_flops / 100e6, 1 / 10e6, pair_flops / 25e6)

    def array(self) -> FloatArray:
        return np.array([getattr(self, field.name) for field in fields(self)])


@dataclass(frozen=True, slots=True)
class CostStats:
    """How well passes were estimated before they ran, and by which rates."""

    num_passes: int
    median_error: float  # of the last passes, |estimate / time - 1|; NaN before the first
    load: float  # how many times as long as by the rates passes take lately
    rates: Rates


class CostModel:
    """Estimates for one device. One thread observes; any may estimate.

    Rates are fitted to the last 64 passes by least squares of the *relative* error, none below zero (Lawson and Hanson,
    1974), so that short passes count as much as long ones and one that a busy machine held up counts once. A weak pull
    holds rates that the passes say nothing about to the first values, scaled as the others turned out.
    """

    def __init__(self, first: Rates) -> None:
        self._first = first.array()
        self._rates, self._load = self._first, 1.0
        self._scaled = self._first
        self._demands: deque[FloatArray] = deque(maxlen=_WINDOW)
        self._ms: deque[float] = deque(maxlen=_WINDOW)
        self._errors: deque[float] = deque(maxlen=_ERRORS)
        self.num_passes = 0  # that it has learned from

    def ms(self, demand: Demand) -> float:
        """The estimated time of a pass, or of what a request adds to one."""
        return float(self._scaled @ demand.array())

    def each_ms(self, demands: FloatArray) -> list[float]:
        """The same of many parts; [parts, rates]."""
        found: list[float] = (demands @ self._scaled).tolist()
        return found

    def observe(self, demand: Demand, ms: float) -> None:
        """A pass ran."""
        ms = max(ms, _SHORTEST_MS)
        self._errors.append(abs(self.ms(demand) / ms - 1.0))
        self._demands.append(demand.array())
        self._ms.append(ms)
        self.num_passes += 1
        if self.num_passes <= _EAGER or self.num_passes % _REFIT == 0:
            self._fit()
        self._weigh()

    def _fit(self) -> None:
        demands, ms = np.array(self._demands), np.array(self._ms)
        scale = float(np.median(ms / np.maximum(demands @ self._first, _SHORTEST_MS)))
        unit = self._first * scale  # the solution is in these units, so that the pull is towards 1
        relative = demands * unit / ms[:, None]
        pull = np.eye(len(unit)) * _TRUST**0.5
        found, _ = nnls(np.vstack((relative, pull)), np.concatenate((np.ones(len(ms)), np.diag(pull))))
        self._rates = found * unit

    def _weigh(self) -> None:
        """How much longer than by the rates the last passes took, since others compute on the machine, too."""
        demands = np.array([self._demands[i] for i in range(-min(_RECENT, len(self._demands)), 0)])
        estimates = (demands @ self._rates).tolist()
        recent = [ms / max(each, _SHORTEST_MS) for ms, each in zip(list(self._ms)[-_RECENT:], estimates, strict=True)]
        self._load = statistics.median(recent)
        self._scaled = self._rates * self._load

    def stats(self) -> CostStats:
        """A snapshot, for people."""
        error = statistics.median(self._errors) if self._errors else float("nan")
        return CostStats(self.num_passes, error, self._load, Rates(*self._rates.tolist()))
