"""Answers that are being decoded: their KV, their tokens so far, and the pass that takes all of them a step further.

Knows nothing of how tokens are chosen. Invariant: a sequence's buffer holds the KV of the whole prompt and of every
token of the answer but the last, at their positions; the last one is the root of the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from rcllm.core.decoding import FinishReason, Generated
from rcllm.core.receipts import Divergence, GenerateReceipt
from rcllm.decode.verify import Accepted, ancestors
from rcllm.drafts.draft import Drafter, DraftTree
from rcllm.engine.job import Entered
from rcllm.engine.jobs.ending import Ending
from rcllm.model.attend.segments import Group, Segment, copy_segments
from rcllm.model.decoder import Decoder, Keep, Pass
from rcllm.model.rope import Rope
from rcllm.model.upload import upload
from rcllm.schedule.draft_budget import Trust

# the one row of a sequence without drafts: it sees all of segment 0
_BLOCK, _OFFSET = np.ones(1, np.int32), np.zeros(1, np.int32)
_SEES = np.array([[False, False], [True, False]])


class SequenceKV:
    """The KV of one sequence, contiguous, in the decoder's `sequence_dtype`; keys are turned to their positions."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        """`capacity`: tokens of prompt and answer."""
        spec = decoder.spec
        shape = (spec.num_layers, 2, spec.num_kv_heads, capacity, spec.head_dim)
        self.kv = torch.empty(shape, dtype=decoder.sequence_dtype, device=decoder.device)
        self.length = 0

    def fill(self, segments: Sequence[Segment], rope: Rope) -> None:
        """Copies an opened prompt: one segment is quicker to read, again and again, than its many blocks."""
        self.length = sum(map(len, segments))
        copy_segments(segments, rope, self.kv[:, :, :, : self.length])

    @torch.inference_mode()
    def append(self, kept: torch.Tensor, rows: Sequence[int]) -> None:
        """Some rows of a pass, in order of position; kept [layers, 2, kv_heads, rows, D], keys turned."""
        first, stop = rows[0], self.length + len(rows)
        if rows[-1] - first == len(rows) - 1:  # they follow each other
            some = kept[:, :, :, first : first + len(rows)]
        else:
            some = kept.index_select(3, upload(np.array(rows), kept.device))
        self.kv[:, :, :, self.length : stop] = some
        self.length = stop

    @property
    def segment(self) -> Segment:
        return Segment(self.kv, 0, 0, self.length, 0)


@dataclass(slots=True)
class Counts:
    """What a sequence has cost so far."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    divergences: list[Divergence] = field(default_factory=list)


class Live:
    """One request that is being decoded."""

    def __init__(self, entered: Entered, kv: SequenceKV, ending: Ending, drafter: Drafter | None) -> None:
        """drafter: None where nothing is to be drafted."""
        self.number, self.request = entered.ticket.number, entered.ticket.request
        self._listener = entered.ticket.listener
        self.kv, self.ending, self.drafter = kv, ending, drafter
        self.prompt_len = entered.end
        self.context = list(entered.planned.prompt.token_ids)
        self.answer = list[int]()
        self.finish_reason: FinishReason | None = None
        self.counts, self.trust = Counts(), Trust()
        self._shared = entered.shared

    @property
    def root_position(self) -> int:
        return self.prompt_len + len(self.answer) - 1

    @property
    def max_depth(self) -> int:
        """Of a draft: the pass gives one token more."""
        return self.ending.max_tokens - len(self.answer) - 1

    def would_take(self, accepted: Accepted) -> tuple[int, ...]:
        """Of what a pass decided, the tokens up to the one that ends the answer."""
        answer = list(self.answer)
        for number, token in enumerate(accepted.token_ids, 1):
            answer.append(token)
            if self.ending.reason(answer) is not None:
                return accepted.token_ids[:number]
        return accepted.token_ids

    def take(self, accepted: Accepted) -> tuple[int, ...]:
        """Adds what a pass, or the prompt's, decided, up to the token that ends the answer; returns what was added."""
        taken = self.would_take(accepted)
        self.answer.extend(taken)
        self.finish_reason = self.ending.reason(self.answer)
        self.context.extend(taken)
        self.counts.accepted += min(len(taken), len(accepted.rows))
        self.counts.divergences += [each for each in accepted.divergences if each.position < len(self.answer)]
        if self._listener is not None:
            self._listener.tokens(taken)
        return taken

    def generated(self) -> Generated:
        """The answer, which is complete, without the times."""
        assert self.finish_reason is not None
        counts = self.counts
        receipt = GenerateReceipt(
            **self._shared,
            speculation=str(self.request.options.speculation),
            passes=counts.passes,
            drafted=counts.drafted,
            accepted=counts.accepted,
            accepted_length_mean=(len(self.answer) - 1) / counts.passes if counts.passes else 0.0,
            divergences=tuple(counts.divergences),
        )
        text = self.ending.text(self.answer)
        return Generated(self.request.request_id, text, tuple(self.answer), self.finish_reason, receipt)


def tree_group(segment: Segment, tree: DraftTree) -> Group:
    """The root and the nodes of a tree: each sees the segment, and what lies between the root and itself."""
    n = len(tree)
    if not n:
        return Group((segment,), _BLOCK, _OFFSET, _SEES)
    sees = np.zeros((n + 2, n + 2), dtype=np.bool_)
    sees[1:, 0] = True
    sees[1:, 1:] = ancestors(tree)
    return Group((segment,), np.arange(1, n + 2, dtype=np.int32), np.zeros(n + 1, np.int32), sees)


def next_pass(
    segments: Sequence[Segment], roots: Sequence[int], positions: Sequence[int], trees: Sequence[DraftTree]
) -> Pass:
    """One pass over the root of each sequence and its tree; every row's hidden state and KV is wanted.

    segments: what each sequence has so far; roots: the token that comes next, at `positions`.
    """
    tokens, places = list[int](), list[int]()
    for root, position, tree in zip(roots, positions, trees, strict=True):
        tokens.append(root)
        places.append(position)
        if len(tree):
            tokens += tree.token_ids.tolist()
            places += (tree.depths + position).tolist()
    device = segments[0].kv.device
    return Pass(
        upload(np.array(tokens), device),
        upload(np.array(places), device),
        [tree_group(*each) for each in zip(segments, trees, strict=True)],
        torch.arange(len(tokens), device=device),
        (Keep(0, len(tokens), 0),),
    )
