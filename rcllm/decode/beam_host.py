"""Chooses beams in numpy, with early termination: the quickest way where host and device share their memory.

Knows nothing of passes. Invariant: only children of the catalogue's trie that lead to an allowed item are ever scored;
what a request gets does not depend on the others.
Source: xGR (arXiv 2512.11529), xBeam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.codes.index import CodeTokens
from rcllm.codes.trie import Children, Places
from rcllm.core.ranking import IntArray
from rcllm.core.receipts import BeamStep
from rcllm.decode.beam_task import BeamTask, FloatArray, Leaves, Rows
from rcllm.decode.top_beam import top_beam
from rcllm.errors import ModelError


@dataclass(frozen=True, slots=True)
class Beams:
    """The prefixes of one request that are left, in the order of their parents."""

    nodes: IntArray  # [beams], of the trie's level
    scores: FloatArray  # [beams], log-probability of the prefix
    parents: IntArray  # [beams], among the beams before; never falls

    @classmethod
    def root(cls) -> Beams:
        return cls(np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32))

    @classmethod
    def none(cls) -> Beams:
        return cls(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.nodes)


def child_scores(children: Children, logits: FloatArray, lse: FloatArray | None) -> FloatArray:
    """Log-probability of each child's code after its beam; [children].

    logits [beams, codes]. lse [beams]: of the whole vocabulary (rule `mask`); None: of the valid children alone
    (`renormalise`).
    """
    given = logits[children.parents, children.codes]
    if lse is None and len(given):
        starts = children.first[:-1]
        assert (np.diff(children.first) > 0).all(), "a beam that is alive leads to an item"
        top = np.maximum.reduceat(given, starts)
        lse = top + np.log(np.add.reduceat(np.exp(given - top[children.parents]), starts))
    return given if lse is None else given - lse[children.parents]


def best_children(children: Children, beams: Beams, scores: FloatArray, beam: int) -> tuple[Beams, BeamStep]:
    """The `beam` best extensions, in the order of their parents, and what it took. `scores`: of `child_scores`."""
    if not len(children.nodes):
        return Beams.none(), BeamStep(len(beams), 0, 0, children.num_dead, 0)
    best = top_beam(beams.scores, children.first, scores, beam)
    kept = Beams(children.nodes[best.indices], best.scores, children.parents[best.indices].astype(np.int32))
    step = BeamStep(len(beams), len(children.nodes), len(kept), children.num_dead, best.num_skipped)
    return kept, step


class OnHost:
    """A `Choosing` for the CPU."""

    device_bytes = 0  # it reads the catalogue's own arrays

    def __init__(self, tokens: CodeTokens) -> None:
        self._ids = [ids.astype(np.int64) for ids in tokens.ids]
        self.columns = [torch.from_numpy(ids) for ids in self._ids]

    def begin(self, tasks: Sequence[BeamTask]) -> HostChoice:
        return HostChoice(tasks, self._ids)


class HostChoice:
    """A `Choice` in numpy."""

    def __init__(self, tasks: Sequence[BeamTask], ids: Sequence[Places]) -> None:
        self._runs, self._ids = [_Run(task) for task in tasks], ids
        self._level = 0  # of the beams
        self._children: list[Children] = []

    @property
    def num_rows(self) -> list[int]:
        return [len(run.beams) for run in self._runs]

    def expand(self) -> None:
        self._children = [run.children(self._level) for run in self._runs]

    def choose(self, logits: torch.Tensor, lse: torch.Tensor | None) -> None:
        given, sums, start = logits.numpy(), None if lse is None else lse.numpy(), 0
        for run, children in zip(self._runs, self._children, strict=True):
            rows = slice(start, start + len(run.beams))
            start = rows.stop
            run.extend(children, given[rows], None if sums is None else sums[rows])
        self._level += 1

    @property
    def rows(self) -> Rows:
        """Parents never fall: neither beams nor requests change their order."""
        starts = np.cumsum([0, *(run.num_parents for run in self._runs)])
        parents = [run.beams.parents + start for run, start in zip(self._runs, starts[:-1], strict=True)]
        level = self._level - 1
        codes = [run.task.code_index.trie.code[level][run.beams.nodes] for run in self._runs]
        return Rows(np.concatenate(parents), torch.from_numpy(self._ids[level][np.concatenate(codes)]))

    def found(self) -> list[Leaves]:
        return [run.found() for run in self._runs]


class _Run:
    """One request on its way down the trie."""

    def __init__(self, task: BeamTask) -> None:
        self.task = task
        self.beams = Beams.root()
        self.num_parents = 1  # beams before the last step
        self._steps: list[BeamStep] = []
        self._error: ModelError | None = None

    def children(self, level: int) -> Children:
        allowed = self.task.allowed
        alive = None if allowed is None else allowed.nodes[level + 1]
        return self.task.code_index.trie.children(level, self.beams.nodes, alive)

    def extend(self, children: Children, logits: FloatArray, lse: FloatArray | None) -> None:
        with np.errstate(invalid="ignore"):  # what is not a number is found where the best are chosen
            scores = child_scores(children, logits, lse if self.task.rule == "mask" else None)
        self.num_parents = len(self.beams)
        if not self.num_parents:
            return
        try:
            self.beams, step = best_children(children, self.beams, scores, self.task.beam)
        except ModelError as error:  # of this request alone
            self._error, self.beams = error, Beams.none()
        else:
            self._steps.append(step)

    def found(self) -> Leaves:
        if self._error is not None or len(self._steps) < self.task.code_index.num_levels:
            return Leaves.none(self._steps, self._error)
        return Leaves.of(self.beams.nodes, self.beams.scores, self._steps)
