"""Drafts for one request from a pool of earlier answers, from its own prompt and from what it has written so far.

Knows nothing of models. Invariant: never proposes a private answer of another owner; two drafters of one owner share
what the pool shares and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.core.ranking import IntArray
from rcllm.drafts.draft import DraftTree, Growing, occurrences
from rcllm.drafts.draft_tree import END, Continuations, joined, merge, windows
from rcllm.drafts.suffix_index import LONGEST, match_lengths
from rcllm.drafts.suffix_pool import SuffixPool

_MAX_PRIVATE = 8192  # tokens of the owner's private answers that are looked through at each step


@dataclass(frozen=True, slots=True)
class DraftOptions:
    branch: int = 12  # tokens
    rows: int = 64  # places looked at per source
    growth: float = 1.5  # a match one token longer counts so much more …
    longest: int = 8  # … up to this length
    own: float = 8.0  # a place in the prompt or in the running answer counts so much more than one of the pool
    lead: int = 4  # last tokens of the prompt that are learned with the answer, so that its first words are drafted
    doubt: float = 2.0  # evidence for anything else, at each token: 2 leaves the trees' weights calibrated


class PoolDrafter:
    """A `Drafter`. Learns the running answer into the pool while it is written."""

    def __init__(
        self,
        pool: SuffixPool,
        prompt: Sequence[int],
        owner: str | None = None,
        *,
        private: bool = False,
        options: DraftOptions | None = None,
    ) -> None:
        """prompt: its last tokens are learned with the answer, so they must be the template's, not a user's."""
        self.options = options or DraftOptions()
        self._pool = pool
        self._seen = Growing()
        self._own = _joined_texts(pool.private_texts(owner))
        self._running = pool.begin(owner, private=private)
        pool.extend(self._running, prompt[max(0, len(prompt) - self.options.lead) :])

    def draft(self, token_ids: Sequence[int], max_nodes: int) -> DraftTree:
        """Longest matches in the pool and in the text itself, merged. Empty where nothing matches."""
        seen = self._seen.extended(token_ids)
        parts = [self._from_index(seen), self._from_overlay(seen), self._from_text(seen)]
        if len(self._own):
            parts.append(self._from_text(np.concatenate([self._own, seen[-LONGEST:]])))
        return merge(joined(parts), max_nodes, self.options.doubt)

    def observe(self, token_ids: Sequence[int]) -> None:
        self._pool.extend(self._running, token_ids)

    def finish(self) -> None:
        self._pool.end(self._running)

    def _from_index(self, seen: IntArray) -> Continuations:
        index, options = self._pool.index, self.options
        found = index.find(seen[-LONGEST:], options.rows)
        evidence = self._evidence(found.lengths) * index.weights_at(found.places)
        return Continuations(windows(index.text, found.places, options.branch), evidence)

    def _from_overlay(self, seen: IntArray) -> Continuations:
        branch = self.options.branch
        found = self._pool.find_recent(seen[-LONGEST:].tolist(), branch, self.options.rows, but=self._running)
        rows = [row.window + [END] * (branch - len(row.window)) for row in found]
        lengths = np.array([row.length for row in found], np.int32)
        return Continuations(np.array(rows, np.int32).reshape(-1, branch), self._evidence(lengths))

    def _from_text(self, text: IntArray) -> Continuations:
        """Places in `text` that follow its own last two tokens, the newest ones."""
        places = occurrences(text, 2)[-self.options.rows :]
        lengths = match_lengths(text, places, text[-LONGEST:])
        return Continuations(windows(text, places, self.options.branch), self.options.own * self._evidence(lengths))

    def _evidence(self, lengths: IntArray) -> npt.NDArray[np.float64]:
        return self.options.growth ** np.minimum(lengths, self.options.longest).astype(np.float64)


def _joined_texts(texts: Sequence[IntArray]) -> IntArray:
    """One after the other, the last `_MAX_PRIVATE` tokens, an END after each."""
    parts = [part for text in texts for part in (text, np.full(1, END, np.int32))]
    return np.concatenate([np.empty(0, np.int32), *parts])[-_MAX_PRIVATE:]
