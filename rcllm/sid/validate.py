"""How good a decoder is at the top, while it is trained: NDCG@10 of validation users' last items, by beam search.

A loss says how likely the one right item is, and nothing of what stands before it. Knows nothing of engines: it asks
the network that is trained, all users at once. Invariant: nothing comes out that is no item or that the user has seen;
with as many beams as there are prefixes the order is that of all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.codes.index import CodeIndex
from rcllm.sid.collaborative import FloatArray
from rcllm.sid.held_out import TOP, Case, gain
from rcllm.sid.network import CodeNetwork
from rcllm.sid.sequences import Sequences

BEAM = 2 * TOP  # what the user has seen may stand among the best
_ROWS = 512  # sequences of one pass


@dataclass(frozen=True, slots=True)
class _Beam:
    """A user's prefix of codes, and its log-probability."""

    case: int
    codes: tuple[int, ...]
    score: float


class TopOfList:
    """Ranks the catalogue for held-out users."""

    def __init__(self, code_index: CodeIndex, sequences: Sequences, cases: Sequence[Case], max_items: int) -> None:
        self._sequences, self._cases = sequences, cases
        self._prompts = [sequences.prompt(case.history[-max_items:]) for case in cases]
        self._next: dict[tuple[int, ...], list[int]] = {}  # prefix → codes that lead on to an item
        self._items: dict[tuple[int, ...], list[int]] = {}
        for item, row in enumerate(code_index.codes.tolist()):
            self._items.setdefault(tuple(row), []).append(item)
        for codes in self._items:
            for level, code in enumerate(codes):
                self._next.setdefault(codes[:level], []).append(code)
        self._next = {prefix: sorted(set(codes)) for prefix, codes in self._next.items()}

    def ndcg(self, network: CodeNetwork, beam: int = BEAM) -> float:
        """Mean NDCG@10; 0 where there is nobody to ask."""
        found = self.best(network, beam)
        gains = [gain(items, case.target) for case, items in zip(self._cases, found, strict=True)]
        return float(np.mean(gains)) if gains else 0.0

    @torch.no_grad()
    def best(self, network: CodeNetwork, beam: int = BEAM) -> list[list[int]]:
        """For each case the first TOP items, best first."""
        network.eval()
        beams = [_Beam(case, (), 0.0) for case in range(len(self._cases))]
        for level in range(self._sequences.vocabulary.num_levels):
            beams = self._wider(network, beams, level, beam)
        network.train()
        found: list[list[int]] = [[] for _ in self._cases]
        for each in beams:  # of each case, best first
            seen = self._cases[each.case].history
            found[each.case] += [item for item in self._items[each.codes] if item not in seen]
        return [items[:TOP] for items in found]

    def _wider(self, network: CodeNetwork, beams: Sequence[_Beam], level: int, beam: int) -> list[_Beam]:
        """The best `beam` continuations of each case; ties go to the first."""
        grown: list[list[_Beam]] = [[] for _ in self._cases]
        for start in range(0, len(beams), _ROWS):
            some = beams[start : start + _ROWS]
            for each, row in zip(some, self._log_probs(network, some, level), strict=True):
                grown[each.case] += [
                    _Beam(each.case, (*each.codes, code), each.score + float(row[code]))
                    for code in self._next[each.codes]
                ]
        return [each for some in grown for each in sorted(some, key=lambda one: -one.score)[:beam]]

    def _log_probs(self, network: CodeNetwork, beams: Sequence[_Beam], level: int) -> FloatArray:
        """[beams, codes of the level]"""
        ids = self._sequences.vocabulary.code_tokens.ids
        rows = [
            np.append(self._prompts[each.case], [ids[at][code] for at, code in enumerate(each.codes)]).astype(np.int32)
            for each in beams
        ]
        tokens = torch.from_numpy(self._sequences.pad(rows)).long()
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = network.logits(network(tokens)[torch.arange(len(rows)), last])
        among: FloatArray = torch.log_softmax(logits, dim=-1)[:, torch.from_numpy(ids[level]).long()].numpy()
        return among
