"""Corrects the bias that label letters have of their own: a model prefers some slot whatever stands in it.

Knows nothing of prompts: the prior of content-free ones comes from a function that it is given. Invariant: a correction
subtracts one number per slot, the same for all requests of a kind, so it never looks at a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rcllm.core.ranking import RankOptions, Scores


class LabelBias:
    """`content_free(num_candidates, options)` scores a prompt whose candidates all read the same."""

    def __init__(self, content_free: Callable[[int, RankOptions], Scores]) -> None:
        self._content_free = content_free
        self._priors: dict[tuple[int, RankOptions], Scores] = {}
        self._running: dict[tuple[int, RankOptions], RunningMean] = {}

    def correct(self, options: RankOptions, scores: Scores) -> Scores:
        """Scores without the bias that `options.bias` estimates; the scores themselves where it is "none"."""
        kind = (len(scores), replace(options, bias="none"))
        match options.bias:
            case "content_free":
                if kind not in self._priors:
                    self._priors[kind] = self._content_free(*kind)
                return scores - centre(self._priors[kind])
            case "running_mean":
                return scores - centre(self._running.setdefault(kind, RunningMean(len(scores))).then_add(scores))
            case _:
                return scores


class RunningMean:
    """The mean log-probability that each slot had in earlier requests: a label's bias, learnt online.

    Order-dependent by nature: a score depends on the requests before it, and the receipt says so.
    """

    def __init__(self, num_slots: int) -> None:
        self._count = 0
        self._total: Scores = np.zeros(num_slots)

    def then_add(self, log_probs: Scores) -> Scores:
        """The mean so far, uniform before the first request; then adds this request's log-probabilities."""
        mean = self._total / self._count if self._count else np.full(len(log_probs), -math.log(len(log_probs)))
        self._count, self._total = self._count + 1, self._total + log_probs
        return mean


def centre(prior: Scores) -> Scores:
    """A bias in log-probabilities relative to the uniform one, so that correcting keeps the scores' scale."""
    return prior + math.log(len(prior))
