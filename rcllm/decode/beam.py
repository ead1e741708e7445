"""Wide constrained beam search: from computed prompts to the best semantic IDs of a catalogue, a fixed number of steps.

Knows nothing of requests, servers or how prompts came about. Invariant: only children of the catalogue's trie that
lead to an allowed item are ever scored, so that no result is invalid; results equal a full sort (score, then flat
index), and do not depend on what else is in the batch.
Source: xGR (arXiv 2512.11529), xAttention and xBeam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.codes.trie import Children
from rcllm.core.ranking import IntArray, ItemId
from rcllm.core.receipts import BeamRule, BeamStep
from rcllm.decode.beam_kv import StepBuffer, beam_group
from rcllm.decode.top_beam import top_beam
from rcllm.errors import ModelError
from rcllm.metrics import Stage
from rcllm.model.attend.segments import Segment
from rcllm.model.decoder import Aside, Decoder, Keep, Pass, Passed

FloatArray = npt.NDArray[np.float32]
_LOGIT_ROWS = 256  # rows whose logits over the whole vocabulary are held at once


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


@dataclass(frozen=True, slots=True)
class Found:
    """The leaves that one request ended with, best first; equal scores in the order of the trie."""

    leaves: IntArray
    scores: FloatArray
    steps: tuple[BeamStep, ...]
    bytes_read: int  # of KV, by the attention of the steps
    bytes_naive: int  # the same where every beam reads the prompt for itself
    error: ModelError | None = None  # what kept this request from being searched to the end


# ---- deciding, in numpy ----------------------------------------------------------------------------------------------


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


def items_of(
    code_index: CodeIndex, allowed: Allowed | None, found: Found, n: int
) -> tuple[tuple[ItemId, ...], tuple[float, ...]]:
    """The first `n` items below the leaves, several below one in the catalogue's order, and their scores."""
    items: list[ItemId] = []
    scores: list[float] = []
    for leaf, score in zip(found.leaves.tolist(), found.scores.tolist(), strict=True):
        numbers = code_index.items_of(leaf)
        live: IntArray = numbers if allowed is None else numbers[allowed.items[numbers]]
        items += [code_index.item_ids[number] for number in live.tolist()]
        scores += [score] * len(live)
        if len(items) >= n:
            break
    return tuple(items[:n]), tuple(scores[:n])


# ---- computing -------------------------------------------------------------------------------------------------------


class BeamSearch:
    """Searches several requests of one catalogue's shape together, a level at a time.

    begin → next_pass → take → next_pass → … → found → reset. Not thread-safe: its buffer is its own.
    """

    def __init__(self, decoder: Decoder, tokens: CodeTokens, num_rows: int) -> None:
        """`num_rows`: beams of a batch, all requests together, that the buffer is made for; more make it grow."""
        self._decoder = decoder
        self._ids = [ids.astype(np.int64) for ids in tokens.ids]  # of each level's codes
        self._columns = [torch.from_numpy(ids).to(decoder.device) for ids in self._ids]
        self._buffer = self._new_buffer(num_rows)
        self._runs: list[_Run] = []
        self._level = 0  # the next to be read

    @property
    def num_levels(self) -> int:
        return len(self._columns)

    def _new_buffer(self, num_rows: int) -> StepBuffer:
        """Of L levels, L - 1 are fed to the model, and the last of these is attended to by its own row alone."""
        decoder = self._decoder
        return StepBuffer(decoder.spec, num_rows, max(1, self.num_levels - 2), decoder.dtype, decoder.device)

    @torch.inference_mode()
    def begin(self, tasks: Sequence[BeamTask], stage: Stage) -> None:
        """Chooses the first codes, from what their prompts ended in."""
        num_rows = sum(task.beam for task in tasks)
        if not self._buffer.fits(num_rows):
            self._buffer = self._new_buffer(num_rows)
        self._buffer.clear()
        self._runs, self._level = [_Run(task) for task in tasks], 0
        self._extend(torch.stack([task.prompt.hidden for task in tasks]), stage)

    @property
    def ended(self) -> bool:
        """Whether every level was read, or no beam is left."""
        return self._level == self.num_levels or not any(len(run.beams) for run in self._runs)

    @torch.inference_mode()
    def next_pass(self) -> Pass:
        """The pass over the codes that were just chosen; moves what is kept of the beams."""
        device, buffer, level = self._decoder.device, self._buffer, self._level - 1
        alive = [run for run in self._runs if len(run.beams)]
        buffer.reorder(_over_batch(self._runs))
        codes = [run.task.code_index.trie.code[level][run.beams.nodes] for run in alive]
        places = [np.full(len(run.beams), run.task.prompt.end + level) for run in alive]
        for run in alive:
            run.read(buffer.num_bytes_per_row)
        num_rows = sum(len(run.beams) for run in alive)
        return Pass(
            torch.from_numpy(self._ids[level][np.concatenate(codes)]).to(device),
            torch.from_numpy(np.concatenate(places)).to(device),
            [beam_group(run.task.prompt.segments, len(run.beams)) for run in alive],
            torch.arange(num_rows, device=device),
            (Keep(0, num_rows, 0),) if level + 2 < self.num_levels else (),
            (Aside(0, num_rows, buffer),) if buffer.num_steps else (),
        )

    @torch.inference_mode()
    def take(self, passed: Passed, stage: Stage) -> None:
        """Goes on to the next level with what the pass gave."""
        if passed.kept:
            self._buffer.append(passed.kept[0])
        self._extend(passed.hidden, stage)

    def found(self) -> list[Found]:
        """The best leaves of each task, once the search has ended."""
        return [run.found() for run in self._runs]

    def reset(self) -> None:
        """Lets go of the tasks and their prompts."""
        self._runs = []

    def _extend(self, hidden: torch.Tensor, stage: Stage) -> None:
        """One level down; hidden [rows, d] of the beams of all runs in order. Waits for the device once."""
        with stage("gather"):  # on an accelerator, while the pass still runs
            children = [run.children(self._level) for run in self._runs]
        with stage("readout"):
            logits, lse = self._read(hidden)
        with stage("sort"):
            start = 0
            for run, some in zip(self._runs, children, strict=True):
                rows = slice(start, start + len(run.beams))
                start = rows.stop
                run.extend(some, logits[rows], None if lse is None else lse[rows])
        self._level += 1

    def _read(self, hidden: torch.Tensor) -> tuple[FloatArray, FloatArray | None]:
        """Logits [rows, codes] of the level's codes and, where a task asks for it, logsumexp over all [rows]."""
        decoder = self._decoder
        wanted = decoder.logits(hidden, self._columns[self._level])
        if all(run.task.rule == "renormalise" for run in self._runs):
            return wanted.cpu().numpy(), None
        lse = torch.cat([torch.logsumexp(decoder.logits(some), dim=-1) for some in hidden.split(_LOGIT_ROWS)])
        both = torch.cat([wanted, lse[:, None]], dim=1).cpu().numpy()
        return both[:, :-1], both[:, -1]


class _Run:
    """One request on its way down the trie."""

    def __init__(self, task: BeamTask) -> None:
        self.task = task
        self.beams = Beams.root()
        self.num_parents = 1  # beams before the last step
        self._steps: list[BeamStep] = []
        self._error: ModelError | None = None
        self._bytes_read = self._bytes_naive = 0

    def children(self, level: int) -> Children:
        """Needs no scores, so that it runs while the device computes them."""
        allowed = self.task.allowed
        alive = None if allowed is None else allowed.nodes[level + 1]
        return self.task.code_index.trie.children(level, self.beams.nodes, alive)

    def extend(self, children: Children, logits: FloatArray, lse: FloatArray | None) -> None:
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

    def read(self, bytes_per_beam: int) -> None:
        """Counts what one pass reads."""
        prompt, own = self.task.prompt.num_bytes, bytes_per_beam * len(self.beams)
        self._bytes_read += prompt + own
        self._bytes_naive += prompt * len(self.beams) + own

    def found(self) -> Found:
        done = len(self._steps) == self.task.code_index.num_levels
        order = np.argsort(-self.beams.scores, kind="stable") if done else np.zeros(0, np.int64)
        leaves, scores = self.beams.nodes[order], self.beams.scores[order]
        return Found(leaves, scores, tuple(self._steps), self._bytes_read, self._bytes_naive, self._error)


def _over_batch(runs: Sequence[_Run]) -> IntArray:
    """Parents of all beams, as rows of the buffer; never falls, since neither beams nor requests change their order."""
    starts = np.cumsum([0, *(run.num_parents for run in runs)])
    return np.concatenate([run.beams.parents + start for run, start in zip(runs, starts[:-1], strict=True)])
