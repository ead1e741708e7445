"""What a beam search is asked for, and the seam between computing its passes and choosing its beams.

    Choosing (of a model's codes, shared by searches) ── begin ─▶ Choice (the beams of one search, a level at a time)

Knows nothing of how beams are chosen or passes computed. Invariant: whoever chooses, a request keeps at each level what
a full sort of its valid extensions has first (score, then flat index); how many those are is known without scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import IntArray
from rcllm.core.receipts import BeamRule, BeamStep
from rcllm.errors import ModelError
from rcllm.model.attend.segments import Segment

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BeamPrompt:
    """A prompt that was computed, as all beams of its request see it."""

    segments: tuple[Segment, ...]  # `block` is the number of the segment
    end: int  # position of the next token
    hidden: torch.Tensor  # [d], of the last token, after the final norm

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class BeamTask:
    """What to search for after one prompt."""

    prompt: BeamPrompt
    code_index: CodeIndex
    allowed: Allowed | None  # None: every item of the catalogue
    beam: int
    rule: BeamRule


def most_rows(code_index: CodeIndex, beam: int) -> int:
    """Of a pass of one search: beams stand at different nodes, and leaves are never fed to the model."""
    return max(1, min(beam, code_index.trie.num_nodes[-2]))


@dataclass(frozen=True, slots=True)
class Leaves:
    """What one request ended with, best first; equal scores in the order of the trie."""

    nodes: IntArray
    scores: FloatArray  # log-probability of each code sequence
    steps: tuple[BeamStep, ...]
    error: ModelError | None = None  # what kept this request from being searched to the end

    @classmethod
    def of(cls, nodes: IntArray, scores: FloatArray, steps: Sequence[BeamStep]) -> Leaves:
        """Of a search that came to its end; nodes and scores in the order of the trie."""
        order = np.argsort(-scores, kind="stable")
        return cls(nodes[order], scores[order], tuple(steps))

    @classmethod
    def none(cls, steps: Sequence[BeamStep], error: ModelError | None = None) -> Leaves:
        return cls(np.zeros(0, np.int32), np.zeros(0, np.float32), tuple(steps), error)


class Rows(NamedTuple):
    """The beams of all requests that were chosen last, in the order of their parents."""

    parents: IntArray | torch.Tensor  # [rows], among the rows before; never falls
    token_ids: torch.Tensor  # [rows], int64, on the model's device


class Choice(Protocol):
    """The beams of one search, of all its requests in their order."""

    @property
    def num_rows(self) -> Sequence[int]:
        """Per request, the beams that it has now; at first one, the prompt's."""

    def expand(self) -> None:
        """Finds their children, for which no score is needed: beside the pass that gives the scores."""

    def choose(self, logits: torch.Tensor, lse: torch.Tensor | None) -> None:
        """One level down, to the best of what `expand` found.

        logits [rows, codes] of the level's codes, fp32; lse [rows], over the whole vocabulary, for rows under the rule
        `mask`; None where there are none.
        """

    @property
    def rows(self) -> Rows: ...

    def found(self) -> list[Leaves]:
        """Per request; waits for the device."""


class Choosing(Protocol):
    """Chooses for all searches that use one model's tokens on one device; they share what is kept of catalogues."""

    @property
    def columns(self) -> Sequence[torch.Tensor]:
        """Per level, the token of each code, int64, on the device."""

    @property
    def device_bytes(self) -> int:
        """Of catalogues and filters that are kept on the device now. May be asked by any thread."""

    def begin(self, tasks: Sequence[BeamTask]) -> Choice:
        """Of one epoch of one catalogue."""
