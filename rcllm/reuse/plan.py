"""Decides for one request which tokens are fresh and which are read from which KV block. Never imports torch.

The exactness ladder (design, section 5): from `full`, where nothing is reused, over `exact`, where only a cached
prefix is, to `blocks`, where every block that has a canonical KV is. `corrected` is planned like `blocks`; `select.py`
spends its budgets. Invariant: pieces tile every block of the prompt in order.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from rcllm.core.ranking import BoolArray, Borrowed, ContentKey, Level, Piece, Plan, Prompt
from rcllm.core.receipts import BlockKind

NOTHING_BORROWED: Mapping[int, Borrowed] = MappingProxyType({})


class _Use(NamedTuple):
    """What is done with one block before budgets are spent: the KV block it is read from, or None for fresh."""

    key: ContentKey | None
    why: str
    exact: bool = True  # whether the reused KV is what a full prefill would give
    there: BoolArray | None = None  # [tokens], which of the block's tokens the KV block has; None: all


_NOTHING_REUSED = _Use(None, "level full reuses nothing")
_ALWAYS_FRESH = _Use(None, "always fresh")
_OWN = _Use(None, "this user's own")
_NO_PREFIX = _Use(None, "not a cached prefix, and level exact reuses nothing else")
_CORRECTED, _NOT_THERE = "corrected by the level's budget", "not in the semantic pool"
_UNSPENT = range(0)


def plan(
    prompt: Prompt,
    level: Level,
    found: Container[ContentKey],
    borrowed: Mapping[int, Borrowed] = NOTHING_BORROWED,
) -> Plan:
    """`found`: the chain keys that some tier has; canonical blocks are planned as reused, and computed where missing.

    `borrowed`: by the index of a block, what of it is read from the semantic pool at levels that reuse more than a
    prefix. A user's own chain is not read there, cached or not, so that the cache cannot change an answer.
    """
    uses = _uses(prompt, level, found, borrowed if level.name not in ("full", "exact") else NOTHING_BORROWED)
    spent, pieces = _spend(prompt, uses, level), list[Piece]()
    for i, (block, use) in enumerate(zip(prompt.blocks, uses, strict=True)):
        size = len(block.token_ids)
        if i in spent or use.there is not None:
            pieces += _cut(i, size, use, spent.get(i, _UNSPENT))
        elif size:
            pieces.append(Piece(i, 0, size, use.key, use.why))
    return Plan(tuple(pieces), _publishable(prompt, uses) if level.name != "full" else ())


def _uses(prompt: Prompt, level: Level, found: Container[ContentKey], borrowed: Mapping[int, Borrowed]) -> list[_Use]:
    if level.name == "full":
        return [_NOTHING_REUSED] * len(prompt.blocks)
    uses: list[_Use] = []
    in_prefix, is_exact = True, level.name == "exact"  # so far, every block is cached under its chain key
    for index, block in enumerate(prompt.blocks):
        if block.kind is BlockKind.INSTRUCTION:
            uses.append(_Use(block.key, "the same for all requests"))
            continue
        # a block with a canonical KV is read from that, whatever is cached, so that the cache cannot change an answer
        by_chain = is_exact or (block.key is None and index not in borrowed)
        in_prefix = in_prefix and by_chain and block.chain_key is not None and block.chain_key in found
        if in_prefix:
            uses.append(_Use(block.chain_key, "cached prefix of this user"))
        elif index in borrowed:
            reused = borrowed[index].matches.reused
            uses.append(_Use(borrowed[index].key, "from the semantic pool", exact=False, there=reused))
        elif block.key is None:
            uses.append(_OWN if block.kind is BlockKind.HISTORY else _ALWAYS_FRESH)
        elif is_exact:
            uses.append(_NO_PREFIX)
        else:
            uses.append(_Use(block.key, "position-free block", exact=False))
    return uses


def _spend(prompt: Prompt, uses: list[_Use], level: Level) -> dict[int, range]:
    """By block, which tokens of an inexact reuse the level's budget makes fresh."""
    if level.name not in ("linked", "tail"):
        return {}
    sizes = [0 if use.key is None or use.exact else len(block) for use, block in zip(uses, prompt.blocks, strict=True)]
    if level.name == "linked":
        return {i: range(min(int(level.budget), size)) for i, size in enumerate(sizes)}
    spent: dict[int, range] = {}
    for run in _runs(prompt):
        left = math.ceil(level.budget * sum(sizes[i] for i in run))
        for i in reversed(run):
            take = min(left, sizes[i])
            spent[i] = range(sizes[i] - take, sizes[i])
            left -= take
    return spent


def _runs(prompt: Prompt) -> list[list[int]]:
    """The blocks that share a tail: all of them, or each isolated candidate's, beside what no candidate owns.

    One run over isolated candidates would compute some of them afresh and not the others, whose scores are compared.
    """
    if not prompt.isolated:
        return [list(range(len(prompt.blocks)))]
    runs: dict[int | None, list[int]] = {}
    for i, block in enumerate(prompt.blocks):
        runs.setdefault(block.slot, []).append(i)
    return list(runs.values())


def _cut(index: int, size: int, use: _Use, fresh: range) -> list[Piece]:
    """The pieces of a block, of whose reused tokens `fresh` are spent."""
    if use.there is not None:
        return _cut_where_it_is_there(index, use, use.there, fresh)
    parts = (
        (0, fresh.start, use.key, use.why),
        (fresh.start, fresh.stop, None, _CORRECTED),
        (fresh.stop, size, use.key, use.why),
    )
    return [Piece(index, *part) for part in parts if part[0] < part[1]]


def _cut_where_it_is_there(index: int, use: _Use, there: BoolArray, fresh: range) -> list[Piece]:
    reasons = (None, _CORRECTED, _NOT_THERE)
    which = np.zeros(len(there), dtype=np.int8)
    which[~there] = 2
    which[fresh.start : fresh.stop] = 1
    cuts = (np.flatnonzero(np.diff(which)) + 1).tolist()
    return [
        Piece(index, start, stop, None if (why := reasons[which[start]]) else use.key, why or use.why)
        for start, stop in pairwise([0, *cuts, len(there)])
    ]


def _publishable(prompt: Prompt, uses: list[_Use]) -> tuple[int, ...]:
    """Fresh blocks with a chain key whose whole past is exact: what they get is what any full prefill would give."""
    publish: list[int] = []
    for i, (block, use) in enumerate(zip(prompt.blocks, uses, strict=True)):
        if block.chain_key is None or not use.exact:
            break
        if use.key is None:
            publish.append(i)
    return tuple(publish)


_BLOCKS = Level("blocks")


@dataclass(frozen=True, slots=True)
class Planned:
    """A prompt with its plan."""

    prompt: Prompt
    plan: Plan  # what it reuses; under `corrected`, until the choice is made, what it would without corrections
    level: Level = _BLOCKS  # as resolved
    # by block, what the plan reads from the semantic pool
    borrowed: Mapping[int, Borrowed] = field(default_factory=lambda: NOTHING_BORROWED)
