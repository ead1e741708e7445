"""Wide constrained beam search: from computed prompts to the best semantic IDs of a catalogue, a fixed number of steps.

Knows nothing of requests, servers or how prompts came about, nor of how beams are chosen (`beam_host`, `beam_device`).
Invariant: results equal a full sort (score, then flat index), and do not depend on what else is in the batch; between
`begin` and `found` nothing waits for a device that is not the CPU.
Source: xGR (arXiv 2512.11529), xAttention and xBeam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.core.ranking import IntArray, ItemId
from rcllm.core.receipts import BeamStep
from rcllm.decode.beam_device import OnDevice
from rcllm.decode.beam_host import OnHost
from rcllm.decode.beam_kv import StepBuffer, beam_group
from rcllm.decode.beam_task import BeamTask, Choice, Choosing, FloatArray, most_rows
from rcllm.errors import ModelError
from rcllm.metrics import Stage
from rcllm.model.decoder import Aside, Decoder, Keep, Pass, Passed
from rcllm.model.upload import is_near, upload

_LOGIT_ROWS = 256  # rows whose logits over the whole vocabulary are held at once


def choosing_of(tokens: CodeTokens, device: torch.device) -> Choosing:
    """In numpy, which ends early and skips padding, where scores need no copy to the host; else on the device."""
    return OnHost(tokens) if is_near(device) else OnDevice(tokens, device)


def step_bytes_per_row(decoder: Decoder, num_levels: int) -> int:
    """Of KV that a beam keeps beside the prompt."""
    return decoder.spec.kv_bytes_per_token(decoder.dtype.itemsize) * _num_steps(num_levels)


def _num_steps(num_levels: int) -> int:
    """Of L levels, L - 1 are fed to the model, and the last of these is attended to by its own row alone."""
    return max(1, num_levels - 2)


@dataclass(frozen=True, slots=True)
class Found:
    """The leaves that one request ended with, best first; equal scores in the order of the trie."""

    leaves: IntArray
    scores: FloatArray
    steps: tuple[BeamStep, ...]
    bytes_read: int  # of KV, by the attention of the steps
    bytes_naive: int  # the same where every beam reads the prompt for itself
    error: ModelError | None = None  # what kept this request from being searched to the end


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


@dataclass(slots=True)
class _Searched:
    """One request on its way down the trie, and the KV that its steps have read."""

    task: BeamTask
    bytes_read: int = 0
    bytes_naive: int = 0

    def read(self, num_rows: int, bytes_per_row: int) -> None:
        """Counts one pass over its beams."""
        prompt, own = self.task.prompt.num_bytes, bytes_per_row * num_rows
        self.bytes_read += prompt + own
        self.bytes_naive += prompt * num_rows + own


class BeamSearch:
    """Searches several requests over one epoch of a catalogue together, a level at a time.

    begin → next_pass → take → next_pass → … → found → reset. Not thread-safe: its buffer is its own.
    """

    def __init__(self, decoder: Decoder, choosing: Choosing, num_rows: int) -> None:
        """`num_rows`: beams of a batch, all requests together, that the buffer is made for; more make it grow."""
        self._decoder, self._choosing = decoder, choosing
        self._buffer = self._new_buffer(num_rows)
        self._searched: list[_Searched] = []
        self._choice: Choice | None = None  # None: nothing is searched
        self._level = 0  # the next to be read

    @property
    def num_levels(self) -> int:
        return len(self._choosing.columns)

    def _new_buffer(self, num_rows: int) -> StepBuffer:
        decoder = self._decoder
        return StepBuffer(decoder.spec, num_rows, _num_steps(self.num_levels), decoder.dtype, decoder.device)

    @torch.inference_mode()
    def begin(self, tasks: Sequence[BeamTask], stage: Stage) -> None:
        """Chooses the first codes, from what their prompts ended in."""
        num_rows = sum(most_rows(task.code_index, task.beam) for task in tasks)
        if not self._buffer.fits(num_rows):
            self._buffer = self._new_buffer(num_rows)
        self._buffer.clear()
        self._searched, self._level = [_Searched(task) for task in tasks], 0
        self._choice = self._choosing.begin(tasks)
        self._extend(torch.stack([task.prompt.hidden for task in tasks]), stage)

    @property
    def choice(self) -> Choice:
        assert self._choice is not None, "begin comes first"
        return self._choice

    @property
    def ended(self) -> bool:
        """Whether every level was read, or no beam is left."""
        return self._level == self.num_levels or not any(self.choice.num_rows)

    @torch.inference_mode()
    def next_pass(self) -> Pass:
        """The pass over the codes that were just chosen; moves what is kept of the beams."""
        device, buffer, level, rows = self._decoder.device, self._buffer, self._level - 1, self.choice.rows
        buffer.reorder(rows.parents)
        alive = [(each, count) for each, count in zip(self._searched, self.choice.num_rows, strict=True) if count]
        for each, count in alive:
            each.read(count, buffer.num_bytes_per_row)
        places = [np.full(count, each.task.prompt.end + level, np.int64) for each, count in alive]
        num_rows = len(rows.token_ids)
        return Pass(
            rows.token_ids,
            upload(np.concatenate(places), device),
            [beam_group(each.task.prompt.segments, count) for each, count in alive],
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

    @torch.inference_mode()
    def found(self) -> list[Found]:
        """The best leaves of each task, once the search has ended. Waits for the device."""
        return [
            Found(leaves.nodes, leaves.scores, leaves.steps, each.bytes_read, each.bytes_naive, leaves.error)
            for each, leaves in zip(self._searched, self.choice.found(), strict=True)
        ]

    def reset(self) -> None:
        """Lets go of the tasks and their prompts."""
        self._searched, self._choice = [], None

    def _extend(self, hidden: torch.Tensor, stage: Stage) -> None:
        """One level down; hidden [rows, d] of the beams of all requests in order."""
        with stage("gather"):  # on an accelerator, while the pass still runs
            self.choice.expand()
        with stage("readout"):
            logits, lse = self._read(hidden)
        with stage("sort"):
            self.choice.choose(logits, lse)
        self._level += 1

    def _read(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [rows, codes] of the level's codes and, for rows under the rule `mask`, logsumexp over all [rows].

        Those rows take both from one product over the whole vocabulary: one over the level's codes alone is of another
        precision where the model computes in bf16 or int8.
        """
        decoder, columns = self._decoder, self._choosing.columns[self._level]
        wanted = decoder.logits(hidden, columns)
        masked = np.repeat([each.task.rule == "mask" for each in self._searched], self.choice.num_rows)
        if not masked.any():
            return wanted, None
        sums = torch.zeros_like(wanted[:, 0])
        for rows in upload(np.flatnonzero(masked), decoder.device).split(_LOGIT_ROWS):
            logits = decoder.logits(hidden[rows])
            wanted[rows], sums[rows] = logits[:, columns], torch.logsumexp(logits, -1)
        return wanted, sums
