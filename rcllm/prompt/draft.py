"""A prompt under construction: keeps positions, exact contexts, who sees whom, and what was done to its texts.

Knows nothing of templates or tokenizers: it is given token ids. Invariant: a block starts where what it sees ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from blake3 import blake3

from rcllm.core.ranking import Block, BoolArray, ContentKey, Prompt, RankOptions, RankRequest, Read, TokenIds, whose
from rcllm.core.receipts import BlockKind
from rcllm.prompt.keys import content_key, owner_digest, token_bytes

_NAMED = 3  # of those that a note is about


class Notes:
    """What was cut, replaced or left out in one prompt: a note per kind, with how many it befell and the first few."""

    def __init__(self) -> None:
        self._befell: dict[tuple[str, str], list[str]] = {}

    def add(self, of: str, what: str, name: str) -> None:
        """«of» is what is counted (candidates, events), `what` befell the one called `name`."""
        self._befell.setdefault((of, what), []).append(name)

    def told(self, totals: Mapping[str, int]) -> tuple[str, ...]:
        """«2 of 20 candidates cut to 96 tokens: a, b»."""
        return tuple(
            f"{len(names):,} of {totals[of]:,} {of} {what}: {listed(list(dict.fromkeys(names)))}"
            for (of, what), names in self._befell.items()
        )


def listed(names: Sequence[str], most: int = _NAMED) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Draft:
    """Blocks are added in order; `prompt` is what they come to."""

    def __init__(self, namespace: bytes, request: RankRequest, options: RankOptions) -> None:
        """`namespace`: what the keys of all blocks begin with."""
        self.namespace, self.request, self.options = namespace, request, options
        self.user = whose(request.user_id, request.tenant)
        self.whose = b"" if self.user is None else owner_digest(self.user)  # in the keys of what is the user's alone
        self.blocks: list[Block] = []
        self.reads: list[Read] = []
        self.notes = Notes()
        self.label_ids: tuple[TokenIds, ...] = ()
        self.end = 0  # one past the highest position so far
        self._base = 0  # where the next block starts
        self._slot: int | None = None
        self._slot_base: int | None = None  # where isolated slots start
        self._isolated = False
        self._branches: list[tuple[int, int]] = []  # (block, parent)
        self._context = blake3()  # of all tokens so far, while they form one chain
        self._chained = True

    def add(
        self,
        kind: BlockKind,
        ids: TokenIds,
        owner: str | None = None,
        *,
        key: ContentKey | None = None,
        private: bool = False,
    ) -> int:
        """Appends a block after the last one, and returns its index."""
        chain_key = self._chain_key(kind, ids) if self._chained else None
        self._chained = chain_key is not None
        key = chain_key if kind is BlockKind.INSTRUCTION else key
        self.blocks.append(Block(kind, ids, self._base, owner, key, chain_key, self._slot, private))
        self._base += len(ids)
        self.end = max(self.end, self._base)
        return len(self.blocks) - 1

    def add_branch(self, ids: TokenIds, parent: int) -> int:
        """A block that continues `parent`, beside other branches that do not see it."""
        self._base = self.blocks[parent].base + len(self.blocks[parent])
        index = self.add(BlockKind.LABEL, ids)
        self._branches.append((index, parent))
        return index

    def isolate_slots(self) -> None:
        """From here on, candidates do not see each other and start at one position."""
        self._isolated, self._slot_base = True, self._base

    def open_slot(self, slot: int) -> None:
        self._slot = slot
        if self._slot_base is not None:
            self._base = self._slot_base

    def close_slots(self) -> None:
        self._slot, self._slot_base, self._base = None, None, self.end

    def prompt(self, num_candidates: int, notes: Sequence[str] = ()) -> Prompt:
        """`notes`: for the receipt, after those of the draft."""
        request = self.request
        told = self.notes.told({"candidates": num_candidates, "events": len(request.history)})
        return Prompt(
            request.request_id,
            tuple(self.blocks),
            self._sees(),
            tuple(self.reads),
            num_candidates,
            self.label_ids,
            self.options,
            self.user,
            (*told, *notes),
        )

    def _chain_key(self, kind: BlockKind, ids: TokenIds) -> ContentKey | None:
        """Names the KV of a block after exactly what precedes it; a user's history belongs to that user alone.

        None: the chain ends before it.
        """
        is_shared = kind is BlockKind.INSTRUCTION
        if not is_shared and (kind is not BlockKind.HISTORY or self.user is None):
            return None
        tokens = token_bytes(ids)
        key = content_key(self.namespace, self._context.digest(), tokens, b"" if is_shared else self.whose)
        self._context.update(tokens)
        return key

    def _sees(self) -> BoolArray:
        count = len(self.blocks)
        sees = np.tri(count, k=-1, dtype=bool)
        if self._isolated:
            slots = np.array([-1 if block.slot is None else block.slot for block in self.blocks])
            apart = (slots[:, None] != slots[None, :]) & (slots[:, None] >= 0) & (slots[None, :] >= 0)
            sees &= ~apart
        first = self._branches[0][0] if self._branches else count
        for index, parent in self._branches:
            sees[index, first:] = False
            sees[index, : parent + 1] = sees[parent, : parent + 1]
            sees[index, parent] = True
        return sees
