"""Packs prompts into one training pass, so that whatever the same tokens see under the same mask is computed once.

A user's prompts for several targets share the instruction and the beginning of the history. Under the `blocks` mask
an item sees the instruction alone, so that all users share all items, at any place.
Never imports torch. Invariant: a row sees exactly what the engine's full recompute under that mask would let it see.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rcllm.core.ranking import Block, BoolArray, IntArray, Mask, Prompt, TokenIds
from rcllm.core.receipts import BlockKind
from rcllm.errors import ConfigError
from rcllm.prompt.keys import Context

_CANONICAL_PER_UNIT = 8  # isolated blocks attended in one call: fewer calls against more masked pairs


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that are attended to in one call."""

    start: int  # first row of the pass
    stop: int
    keys: IntArray  # [keys]: rows of the pass that they may see
    shift: IntArray  # [keys]: positions by which each key is turned on from its own
    mask: BoolArray  # [stop - start, keys]


@dataclass(frozen=True, slots=True)
class Packed:
    """One training pass: tokens, positions, who sees whom, and where scores are read."""

    token_ids: IntArray  # [rows]
    positions: IntArray  # [rows]
    units: tuple[Unit, ...]
    read_rows: tuple[IntArray, ...]  # per prompt, the row of each of its reads

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Node:
    """A block that is computed once, however many prompts read it."""

    start: int  # its first row
    size: int
    base: int  # position of its first token where it is computed
    seen: tuple[tuple[int, int], ...]  # (node, shift) it sees besides itself


def pack(prompts: Sequence[Prompt], mask: Mask, contexts: Mapping[BlockKind, Context]) -> Packed:
    """`contexts`: the canonical contexts that blocks are computed in under the `blocks` mask.

    Raises ConfigError for contexts that are a mean over several, which have no tokens of their own to train on.
    """
    packing = _Packing(contexts if mask == "blocks" else {})
    read_rows = []
    for prompt in prompts:
        nodes = packing.add(prompt)
        rows = [packing.nodes[nodes[read.block]].start + read.offset for read in prompt.reads]
        read_rows.append(np.array(rows, dtype=np.int32))
    return Packed(
        np.array(packing.token_ids, dtype=np.int32),
        np.array(packing.positions, dtype=np.int32),
        tuple(packing.units),
        tuple(read_rows),
    )


class _Packing:
    def __init__(self, contexts: Mapping[BlockKind, Context]) -> None:
        if any(len(context.variants) > 1 for context in contexts.values()):
            raise ConfigError("tuning under the mask `blocks` needs one canonical context: use context = 'instruction'")
        self._contexts = contexts
        self._known: dict[Hashable, int] = {}
        self.nodes: list[_Node] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.units: list[Unit] = []

    def add(self, prompt: Prompt) -> list[int]:
        """The node of each block. Isolated blocks come first, then the rest, each as units of consecutive rows."""
        node_of: dict[int, int] = {}
        alone = {i: block for i, block in enumerate(prompt.blocks) if block.key and block.kind in self._contexts}
        new: list[int] = []
        for i, block in alone.items():
            node_of[i], is_new = self._canonical(block)
            new += [node_of[i]] if is_new else []
        for first in range(0, len(new), _CANONICAL_PER_UNIT):
            self._attend(new[first : first + _CANONICAL_PER_UNIT])
        new = []
        for i, block in enumerate(prompt.blocks):
            if i not in alone:
                seen = [j for j in np.flatnonzero(prompt.sees[i]).tolist() if len(prompt.blocks[j])]
                places = tuple((node_of[j], prompt.blocks[j].base - self.nodes[node_of[j]].base) for j in seen)
                node_of[i], is_new = self._node(block.token_ids, block.base, places)
                new += [node_of[i]] if is_new else []
        self._attend(new)
        return [node_of[i] for i in range(len(prompt.blocks))]

    def _canonical(self, block: Block) -> tuple[int, bool]:
        (context,) = self._contexts[block.kind].variants
        before, is_new = self._node(context, 0, ()) if context else (-1, False)
        if is_new:
            self._attend([before])
        return self._node(block.token_ids, len(context), ((before, 0),) if context else ())

    def _node(self, ids: TokenIds, base: int, seen: tuple[tuple[int, int], ...]) -> tuple[int, bool]:
        """The node of these tokens, and whether it is new."""
        identity = (ids, base, seen)
        if identity in self._known:
            return self._known[identity], False
        self.nodes.append(_Node(len(self.token_ids), len(ids), base, seen))
        self.token_ids.extend(ids)
        self.positions.extend(range(base, base + len(ids)))
        self._known[identity] = len(self.nodes) - 1
        return len(self.nodes) - 1, True

    def _attend(self, new: Sequence[int]) -> None:
        """One unit: the rows of `new` nodes, which were added one after another, over all that any of them sees."""
        if not new:
            return
        places = list(dict.fromkeys([p for n in new for p in self.nodes[n].seen] + [(n, 0) for n in new]))
        column = dict(zip(places, _starts(self.nodes[node].size for node, _ in places), strict=True))
        start = self.nodes[new[0]].start
        stop = self.nodes[new[-1]].start + self.nodes[new[-1]].size
        sizes = [self.nodes[node].size for node, _ in places]
        mask = np.zeros((stop - start, sum(sizes)), dtype=np.bool_)
        for index in new:
            node = self.nodes[index]
            rows = slice(node.start - start, node.start - start + node.size)
            for place in node.seen:
                mask[rows, column[place] : column[place] + self.nodes[place[0]].size] = True
            own = column[index, 0]
            mask[rows, own : own + node.size] = np.tri(node.size, dtype=np.bool_)
        keys = np.concatenate(
            [np.arange(self.nodes[n].start, self.nodes[n].start + self.nodes[n].size) for n, _ in places]
        )
        shift = np.repeat([by for _, by in places], sizes)
        self.units.append(Unit(start, stop, keys.astype(np.int32), shift.astype(np.int32), mask))


def _starts(sizes: Iterable[int]) -> list[int]:
    ends = np.cumsum(list(sizes))
    return [0, *ends[:-1].tolist()]
