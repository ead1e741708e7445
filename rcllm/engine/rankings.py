"""Which tokens of a block the question attends to, found once per block: the evidence of policy `static`.

The canonical prompt is [first canonical context, block, question], all cached but the question; the ranks are by its
attention, a mean over all layers. Knows nothing of requests. Invariant: what is derived from a user's or an item's
block goes when its owner is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rcllm.cache.held import Held
from rcllm.core.ranking import Block, ContentKey, Piece, Plan, Prompt, RankOptions, TokenIds
from rcllm.core.receipts import BlockKind
from rcllm.engine.materialise import Materialiser
from rcllm.model.decoder import Decoder
from rcllm.reuse.missing import Missing
from rcllm.reuse.plan import Planned
from rcllm.reuse.probe import blocks_pass
from rcllm.reuse.select import FloatArray, Signals, relative_ranks

_MAX_RANKINGS = 100_000  # about 100 MB at 90 tokens a block


@dataclass(frozen=True, slots=True)
class _Ranking:
    relative: FloatArray  # [tokens of the block]
    owner: str | None


class Rankings:
    """Ranks of the `_MAX_RANKINGS` blocks that were used last."""

    def __init__(self, decoder: Decoder, materialiser: Materialiser, pass_tokens: int) -> None:
        self._decoder, self._materialiser, self._pass_tokens = decoder, materialiser, pass_tokens
        self._known: dict[tuple[ContentKey, TokenIds], _Ranking] = {}

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, blocks: Sequence[Missing], question: TokenIds, held: Held) -> int:
        """Ranks the tokens of those blocks that are not ranked yet, whose KV is held; returns how many there were."""
        names = {(block.key, question): block for block in blocks}
        self._known |= {name: self._known.pop(name) for name in names if name in self._known}  # now the latest
        todo = [block for name, block in names.items() if name not in self._known]
        size = max(self._pass_tokens // len(question), 1)
        for start in range(0, len(todo), size):
            self._learn(todo[start : start + size], question, held)
        while len(self._known) > max(_MAX_RANKINGS, len(names)):
            del self._known[next(iter(self._known))]
        return len(todo)

    def _learn(self, blocks: Sequence[Missing], question: TokenIds, held: Held) -> None:
        for context in {block.context.digest: block.context for block in blocks}.values():
            self._materialiser.fetch_context(context, None, held)
        prompts = [self._prompt(block, question) for block in blocks]
        for block, planned, seen in zip(blocks, prompts, blocks_pass(self._decoder, prompts, held.blocks), strict=True):
            first = planned.prompt.num_tokens - len(question) - len(block.token_ids)
            received = seen.signals.attention[first : first + len(block.token_ids)]
            self._known[block.key, question] = _Ranking(relative_ranks(received), block.owner)

    def _prompt(self, block: Missing, question: TokenIds) -> Planned:
        """The canonical prompt, all of it cached but the question."""
        before = block.context.variants[0]
        parts: list[tuple[BlockKind, TokenIds, ContentKey | None]] = [
            (BlockKind.INSTRUCTION, before, self._materialiser.key(before)),
            (BlockKind.ITEM, block.token_ids, block.key),
            (BlockKind.QUESTION, question, None),
        ]
        blocks, pieces, base = list[Block](), list[Piece](), 0
        for index, (kind, ids, key) in enumerate(part for part in parts if part[1]):
            blocks.append(Block(kind, ids, base, key=key))
            pieces.append(Piece(index, 0, len(ids), key, "canonical prompt"))
            base += len(ids)
        sees = np.tri(len(blocks), k=-1, dtype=bool)
        prompt = Prompt("ranking", tuple(blocks), sees, (), 0, (), RankOptions())
        return Planned(prompt, Plan(tuple(pieces), ()))

    def signals(self, planned: Planned, question: TokenIds) -> Signals:
        """The ranks of a prompt's reused tokens in the place of attention; 0 for KV that is no block of its own."""
        attention, end = np.zeros(planned.prompt.num_tokens), 0
        for piece in planned.plan.pieces:
            start, end = end, end + len(piece)
            if piece.key is not None and (known := self._known.get((piece.key, question))):
                attention[start:end] = known.relative[piece.start : piece.stop]
        return replace(Signals.zeros(len(attention)), attention=attention)

    def forget(self, owner: str) -> None:
        """Drops what was derived from a user's or an item's blocks."""
        self._known = {key: ranking for key, ranking in self._known.items() if ranking.owner != owner}
