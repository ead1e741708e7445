"""Histories become batches of token sequences: `<|begin|>`, then `<|next|>` and the codes of each item.

Knows nothing of networks, never imports torch. Invariant: the batches of an epoch depend on histories, settings, seed
and the number of the epoch alone; a sequence begins as the prompt of its first items does (template `sid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcllm.core.ranking import IntArray
from rcllm.sid.config import SequenceConfig
from rcllm.sid.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Sequences:
    """Makes sequences for one vocabulary and catalogue."""

    vocabulary: Vocabulary
    tokens: IntArray  # [items, levels + 1]: `<|next|>` and the codes of each item

    @classmethod
    def of(cls, vocabulary: Vocabulary, codes: IntArray) -> Sequences:
        """Sequences of items whose codes are `codes` [items, levels]."""
        ids = vocabulary.token_ids(codes)
        return cls(vocabulary, np.concatenate([np.full((len(ids), 1), vocabulary.next, np.int32), ids], axis=1))

    def prompt(self, items: Sequence[int]) -> IntArray:
        """The tokens that decoding continues with codes, [1 + items · (levels + 1) + 1]."""
        return np.append(self.sequence(items), np.int32(self.vocabulary.next))

    def sequence(self, items: Sequence[int]) -> IntArray:
        """The tokens of a history, [1 + items · (levels + 1)]."""
        return np.concatenate([[np.int32(self.vocabulary.begin)], self.tokens[list(items)].ravel()])

    def pad(self, sequences: Sequence[IntArray]) -> IntArray:
        """The sequences as rows of one array [batch, longest], filled up with padding."""
        out = np.full((len(sequences), max(map(len, sequences))), self.vocabulary.pad, dtype=np.int32)
        for row, sequence in zip(out, sequences, strict=True):
            row[: len(sequence)] = sequence
        return out

    def epoch(
        self, histories: Sequence[Sequence[int]], config: SequenceConfig, seed: int, epoch: int
    ) -> list[IntArray]:
        """Padded batches in random order, each of sequences of like length. `histories`: item numbers, oldest first."""
        rng = np.random.default_rng([seed, epoch])
        drawn = [part for history in histories for part in _parts(np.asarray(history), config, rng)]
        order = np.argsort([len(part) + rng.random() for part in drawn], kind="stable")
        batches: list[list[IntArray]] = [[]]
        for i in order:  # ascending, so that the newest is the longest
            sequence = self.sequence(drawn[i])
            if batches[-1] and len(sequence) * (len(batches[-1]) + 1) > config.batch_tokens:
                batches.append([])
            batches[-1].append(sequence)
        return [self.pad(batches[i]) for i in rng.permutation(len(batches)) if batches[i]]

    def last(self, histories: Sequence[Sequence[int]], config: SequenceConfig) -> list[IntArray]:
        """Padded batches of the histories' ends, of sequences of like length, for validation."""
        plain = SequenceConfig(config.max_items, config.batch_tokens, skip=0.0, shuffle=0.0)
        return self.epoch([history[-config.max_items - 1 :] for history in histories], plain, 0, 0)


def _parts(history: IntArray, config: SequenceConfig, rng: np.random.Generator) -> list[IntArray]:
    """Random stretches of one history, as many as cover it once on average."""
    longest = config.max_items + 1
    parts = []
    for _ in range(max(1, round(len(history) / longest))):
        start = int(rng.integers(0, max(1, len(history) - longest + 1)))
        part = history[start : start + longest]
        kept = part[rng.random(len(part)) >= config.skip]
        part = kept if len(kept) > 1 else part
        parts.append(part[rng.permutation(len(part))] if rng.random() < config.shuffle else part)
    return [part for part in parts if len(part) > 1]
