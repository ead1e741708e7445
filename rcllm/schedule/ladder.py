"""The degradation ladder: how a request is answered that would miss its deadline as it was asked.

    as asked → a cheaper level that is calibrated → fewer candidates at the cheapest → last known scores → refused

Pure decisions over estimates; never imports torch. Invariants: the first rung that is in time is taken, so that a
looser deadline never yields a cheaper one; a level stands on the ladder only where an admission named it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from rcllm.schedule.cost import MARGIN

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rung(Generic[T]):
    """One way of answering a request."""

    way: T  # what its owner makes of it
    fixed_ms: float  # that its prompt takes beside its candidates
    candidate_ms: tuple[float, ...]  # each of them, in the order asked

    @property
    def ms(self) -> float:
        return self.fixed_ms + sum(self.candidate_ms)


@dataclass(frozen=True, slots=True)
class Taken(Generic[T]):
    """The rung that was taken."""

    way: T
    keep: tuple[int, ...] | None = None  # the candidates that are ranked, in the order asked; None: all


def choose(rungs: Iterable[Rung[T]], budget_ms: float, prior: Sequence[float], min_candidates: int) -> Taken[T] | None:
    """The first way that is in time: of `rungs`, which come from the one asked for to the cheapest level and are asked
    for one by one, else of the cheapest with fewer candidates. None: no way of computing it is.

    `prior`: of each candidate, higher is better; empty: the better the earlier it was named.
    """
    cheapest: Rung[T] | None = None
    for rung in rungs:
        if MARGIN * rung.ms <= budget_ms:
            return Taken(rung.way)
        if cheapest is None or rung.ms < cheapest.ms:
            cheapest = rung
    if cheapest is None:
        return None
    ranked = by_prior(prior, len(cheapest.candidate_ms))
    costs = list(accumulate((cheapest.candidate_ms[i] for i in ranked), initial=cheapest.fixed_ms))
    kept = max((number for number, ms in enumerate(costs) if MARGIN * ms <= budget_ms), default=0)
    if kept < max(1, min(min_candidates, len(ranked))):
        return None
    return Taken(cheapest.way, tuple(sorted(ranked[:kept])))


def budget_ms(deadline_ms: float, elapsed_ms: float, wait_ms: float) -> float:
    """What the pass of a request may take that arrived `elapsed_ms` ago and waits so long, by estimate."""
    return deadline_ms - elapsed_ms - MARGIN * wait_ms


def by_prior(prior: Sequence[float], num_candidates: int) -> list[int]:
    """Candidates, the highest prior first; ties, and all where there is no prior, in the order asked."""
    if not prior:
        return list(range(num_candidates))
    return sorted(range(num_candidates), key=lambda i: -prior[i])


class Probe:
    """Lets one of many requests through that estimates alone would refuse, so that an estimate that became too high is
    tested. Nothing else would correct it: who is refused runs no pass."""

    def __init__(self, every: int = 32) -> None:
        self._every, self._refused = every, 0

    def passes(self, is_idle: Callable[[], bool], num_passes: int) -> bool:
        """Whether the request that is about to be refused is computed all the same; on an idle engine alone.

        `num_passes`: that the estimates were learned from; the first request of all is always computed.
        """
        self._refused += 1
        if (num_passes and self._refused < self._every) or not is_idle():
            return False
        self._refused = 0
        return True
