"""Draft trees and who makes them: guesses of the next tokens, for one forward pass to verify.

Knows nothing of models or of how a tree is verified. A drafter belongs to one request. Invariant: a tree's parents
come before their children, and no node has two children with the same token. Nodes stand by falling weight, so that
the first n nodes are the best tree of n nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import IntArray

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DraftTree:
    """n guessed tokens. The root, numbered 0, is the last token already decided; node i is numbered i + 1."""

    token_ids: IntArray  # [n]
    parents: IntArray  # [n] number of the parent: 0 for a child of the root, and parents[i] ≤ i
    weights: Weights  # [n] estimated probability that the node is accepted; at most the parent's

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def depths(self) -> IntArray:
        """[n]; 1 for a child of the root."""
        depths = [0]
        for parent in self.parents.tolist():
            depths.append(depths[parent] + 1)
        return np.asarray(depths[1:], np.int32)

    def check(self) -> None:
        """Raises AssertionError where the invariant does not hold."""
        n = len(self.token_ids)
        assert self.parents.shape == self.weights.shape == (n,), (n, self.parents.shape, self.weights.shape)
        assert all(0 <= parent <= i for i, parent in enumerate(self.parents)), self.parents
        assert len(set(zip(self.parents.tolist(), self.token_ids.tolist(), strict=True))) == n, "a child stands twice"
        assert all(0 < weight <= 1 for weight in self.weights), self.weights
        assert (np.diff(self.weights) <= 0).all(), self.weights


EMPTY = DraftTree(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


class Drafter(Protocol):
    """Drafts for one request, from its first step to its last."""

    def draft(self, token_ids: Sequence[int], max_nodes: int) -> DraftTree:
        """token_ids: the whole prompt and the answer so far; from call to call it only grows. Changes nothing that
        other requests see. An empty tree means: decode this step plainly."""
        ...

    def observe(self, token_ids: Sequence[int]) -> None:
        """The tokens of the answer that a step decided (accepted drafts and the model's own). May feed other
        requests' drafts at once."""
        ...

    def finish(self) -> None:
        """The answer is complete. Neither method may be called after it."""
        ...


class NoDrafter:
    """Drafts nothing, so that decoding is plain: one token a pass."""

    def draft(self, token_ids: Sequence[int], max_nodes: int) -> DraftTree:
        return EMPTY

    def observe(self, token_ids: Sequence[int]) -> None:
        pass

    def finish(self) -> None:
        pass


class PromptLookup:
    """Copies what followed the last n-gram where it stood first in the prompt or the answer: one branch.

    Prompt lookup decoding as in Hugging Face's `prompt_lookup_num_tokens` (longest n-gram first, earliest match): the
    baseline that pools must beat.
    """

    def __init__(self, max_ngram: int = 2, branch: int = 10) -> None:
        self.max_ngram = max_ngram
        self.branch = branch  # tokens
        self._seen = Growing()

    def draft(self, token_ids: Sequence[int], max_nodes: int) -> DraftTree:
        seen = self._seen.extended(token_ids)
        length = min(self.branch, max_nodes)
        for n in range(min(self.max_ngram, len(seen) - 1), 0, -1):
            found = occurrences(seen, n)
            if len(found) and length:
                return chain(seen[found[0] : found[0] + length])
        return EMPTY

    def observe(self, token_ids: Sequence[int]) -> None:
        pass

    def finish(self) -> None:
        pass


class Growing:
    """A token sequence that only grows, kept as an array, so that each step converts only what is new."""

    def __init__(self) -> None:
        self._tokens = np.empty(0, np.int32)
        self._length = 0

    def extended(self, token_ids: Sequence[int]) -> IntArray:
        """token_ids as an array. They must begin with those of the call before."""
        assert len(token_ids) >= self._length, "a drafter belongs to one request"
        if len(token_ids) > len(self._tokens):
            grown = np.empty(max(256, 2 * len(token_ids)), np.int32)
            grown[: self._length] = self._tokens[: self._length]
            self._tokens = grown
        self._tokens[self._length : len(token_ids)] = token_ids[self._length :]
        self._length = len(token_ids)
        return self._tokens[: self._length]


def occurrences(tokens: IntArray, n: int) -> npt.NDArray[np.intp]:
    """Positions, rising, that follow an earlier occurrence of the last n tokens; each has at least one token."""
    window = len(tokens) - n  # the last occurrence is the n-gram itself
    if window <= 0:
        return np.empty(0, np.intp)
    same = tokens[n - 1 : len(tokens) - 1] == tokens[-1]
    for back in range(1, n):
        same &= tokens[n - 1 - back : len(tokens) - 1 - back] == tokens[-1 - back]
    return np.flatnonzero(same) + n


def chain(token_ids: IntArray) -> DraftTree:
    """A tree of one branch; each token is guessed to follow with even odds."""
    n = len(token_ids)
    return DraftTree(
        token_ids.astype(np.int32),
        np.arange(n, dtype=np.int32),
        np.float32(0.5) ** np.arange(1, n + 1, dtype=np.float32),
    )
