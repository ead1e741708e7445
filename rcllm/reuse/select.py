"""Decides which reused tokens of a prompt level `corrected` computes afresh. Never imports torch.

A policy gives every token a score from what is known of it (`Signals`); the budgets of items and of history are spent
on the highest, whatever the policy, so policies are compared at equal numbers of fresh tokens. Invariant: a choice only
ever turns tokens that are read from an inexact block into fresh ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from rcllm.core.ranking import BoolArray, IntArray, Level, Piece, Plan, Policy, Prompt, Selection
from rcllm.core.receipts import BlockKind
from rcllm.reuse.plan import Planned

FloatArray = npt.NDArray[np.float64]
Evidence = Literal["none", "check_layer", "blocks_pass", "rankings"]
_SMALLEST_DIVERGENCE = 0.01  # of the KV's own size; what is below is the rounding of 16-bit KV


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known of each token of a prompt; [tokens] each, 0 where it was not asked for."""

    attention: FloatArray  # received, as `Selection.reduction` says
    divergence: FloatArray  # |ΔK|₁ + |ΔV|₁ between fresh and cached, at the same position
    size: FloatArray  # |K|₁ + |V|₁ of the fresh ones, the scale of the divergence
    squared_k: FloatArray  # ‖ΔK‖²

    @classmethod
    def zeros(cls, num_tokens: int) -> Signals:
        return cls(*(np.zeros(num_tokens) for _ in range(4)))


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a prompt as columns; [tokens] each."""

    block: IntArray
    offset: IntArray
    item: BoolArray  # may be chosen, from the items' budget
    history: BoolArray  # may be chosen, from the history's budget
    token_ids: IntArray

    @classmethod
    def of(cls, prompt: Prompt, plan: Plan) -> Tokens:
        lengths = np.array([len(block) for block in prompt.blocks], dtype=np.int32)
        block = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        kind = {kind: np.zeros(len(block), dtype=np.bool_) for kind in (BlockKind.ITEM, BlockKind.HISTORY)}
        starts = np.cumsum(lengths) - lengths
        for piece in plan.pieces:
            if is_inexact(prompt, piece):
                first = starts[piece.block]
                kind[prompt.blocks[piece.block].kind][first + piece.start : first + piece.stop] = True
        offset = np.arange(len(block), dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
        token_ids = np.array([token for b in prompt.blocks for token in b.token_ids], dtype=np.int32)
        return cls(block, offset, kind[BlockKind.ITEM], kind[BlockKind.HISTORY], token_ids)

    def __len__(self) -> int:
        return len(self.block)


def is_inexact(prompt: Prompt, piece: Piece) -> bool:
    """Whether a piece is read from KV that a full prefill would not give: an item or event out of its context."""
    block = prompt.blocks[piece.block]
    inside = block.kind in (BlockKind.ITEM, BlockKind.HISTORY)
    return inside and piece.key is not None and piece.key != block.chain_key


# ---- policies -------------------------------------------------------------------------------------------------------


def _rcllm(tokens: Tokens, selection: Selection, signals: Signals) -> FloatArray:
    """S_i = (1 - λ)·A_i + λ·(|ΔK_i|₁ + |ΔV_i|₁) for history, A_i alone for items (RcLLM §III-D).

    Each term is divided by its mean over the history's tokens, so that λ weighs numbers of one size. That mean counts
    as at least 1 % of the KV's own size: where the text is the same, layer 0 differs by rounding alone.
    """
    history = tokens.history
    if not history.any():
        return signals.attention
    attention = signals.attention / max(float(signals.attention[history].mean()), np.finfo(np.float64).tiny)
    floor = _SMALLEST_DIVERGENCE * float(signals.size[history].mean())
    mean = max(float(signals.divergence[history].mean()), floor, np.finfo(np.float64).tiny)
    weight = selection.divergence
    return np.where(history, (1 - weight) * attention + weight * signals.divergence / mean, attention)


def _k_difference(tokens: Tokens, selection: Selection, signals: Signals) -> FloatArray:
    """‖K_new - K_cached‖² on the check layer (CacheBlend, EuroSys'25)."""
    return signals.squared_k


def _attention(tokens: Tokens, selection: Selection, signals: Signals) -> FloatArray:
    return signals.attention


def _first(tokens: Tokens, selection: Selection, signals: Signals) -> FloatArray:
    """The first k tokens of every block, k as the budget allows (EPIC's LegoLink, ICML'25)."""
    return -tokens.offset.astype(np.float64)


def _tail(tokens: Tokens, selection: Selection, signals: Signals) -> FloatArray:
    return np.arange(len(tokens), dtype=np.float64)


def _random(tokens: Tokens, selection: Selection, signals: Signals) -> FloatArray:
    """Seeded by the prompt's tokens: a request is answered the same each time."""
    seed = blake3(tokens.token_ids.astype("<i4").tobytes()).digest()
    return np.random.default_rng(np.frombuffer(seed, dtype=np.uint32)).random(len(tokens))


@dataclass(frozen=True, slots=True)
class Rule:
    """One selection policy."""

    score: Callable[[Tokens, Selection, Signals], FloatArray]  # [tokens]; the highest are chosen, ties by order
    evidence: Evidence  # which signals it needs, and so what runs before the choice
    why: str  # for the receipt


RULES: dict[Policy, Rule] = {
    "rcllm": Rule(_rcllm, "check_layer", "chosen by rcllm's score of attention and KV difference"),
    "k_difference": Rule(_k_difference, "check_layer", "chosen by its K difference"),
    "question": Rule(_attention, "check_layer", "chosen by the question's attention"),
    "two_pass": Rule(_attention, "blocks_pass", "chosen by the question's attention in a first pass"),
    "static": Rule(_attention, "rankings", "chosen by its rank in a canonical prompt"),
    "first": Rule(_first, "none", "among the first tokens of its block"),
    "tail": Rule(_tail, "none", "among the last reused tokens"),
    "random": Rule(_random, "none", "chosen at random"),
}


# ---- choice ---------------------------------------------------------------------------------------------------------


def choose(prompt: Prompt, plan: Plan, level: Level, signals: Signals | None = None) -> Plan:
    """The plan with the level's budgets spent, by the policy of the prompt's options.

    Of the N reused item tokens outside the window, ceil(r_item · N) become fresh, and of the history's likewise; the
    window is fresh on top of that. Candidates that do not see each other have a budget each, so that none is computed
    at the cost of another. `signals`: what the policy's evidence is; None for policies that need none.
    """
    selection = prompt.options.selection
    tokens, rule = Tokens.of(prompt, plan), RULES[selection.policy]
    scores = rule.score(tokens, selection, signals or Signals.zeros(len(tokens)))
    fresh = window(prompt, tokens, selection.window)
    chosen = np.zeros(len(tokens), dtype=np.bool_)
    budgets = [(mask, level.budget) for mask in _lists(prompt, tokens)] + [(tokens.history, level.history_budget)]
    for mask, share in budgets:
        candidates = np.flatnonzero(mask & ~fresh)
        best = np.argsort(-scores[candidates], kind="stable")[: math.ceil(share * len(candidates))]
        chosen[candidates[best]] = True
    return _cut(plan, tokens, {rule.why: chosen, "in the window before the question": fresh})


def _lists(prompt: Prompt, tokens: Tokens) -> list[BoolArray]:
    """The item tokens that share a budget; [tokens] each: those of all candidates, or of each isolated one."""
    if not prompt.isolated:
        return [tokens.item]
    items = [i for i, block in enumerate(prompt.blocks) if block.kind is BlockKind.ITEM]
    return [tokens.item & (tokens.block == i) for i in items]


def window(prompt: Prompt, tokens: Tokens, size: int) -> BoolArray:
    """[tokens]: the last `size` reused tokens before each question, of what that question sees."""
    inside = np.zeros(len(tokens), dtype=np.bool_)
    reused = tokens.item | tokens.history
    for index in questions(prompt) if size else ():
        inside[np.flatnonzero(reused & prompt.sees[index][tokens.block])[-size:]] = True
    return inside


def questions(prompt: Prompt) -> list[int]:
    """The blocks whose attention says what matters: the question, or each candidate's own."""
    return [i for i, block in enumerate(prompt.blocks) if block.kind is BlockKind.QUESTION]


def _cut(plan: Plan, tokens: Tokens, fresh: dict[str, BoolArray]) -> Plan:
    """The pieces of `plan`, cut where fresh tokens begin and end; `fresh`: why → [tokens]."""
    reasons = ["", *fresh]
    which = np.zeros(len(tokens), dtype=np.int8)
    for number, mask in enumerate(fresh.values(), 1):
        which[mask] = number
    pieces: list[Piece] = []
    start = 0
    for piece in plan.pieces:
        part = which[start : start + len(piece)]
        start += len(piece)
        cuts = np.flatnonzero(np.diff(part)) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(piece)], strict=True):
            some = replace(piece, start=piece.start + first, stop=piece.start + last)
            pieces.append(replace(some, key=None, why=reasons[part[first]]) if part[first] else some)
    return replace(plan, pieces=tuple(pieces))


def relative_ranks(attention: FloatArray) -> FloatArray:
    """Of the tokens of one block, 1 for the one with most attention, falling to 0: comparable between blocks."""
    ranks = np.empty(len(attention))
    ranks[np.argsort(-attention, kind="stable")] = np.arange(len(attention))
    return 1.0 - (ranks + 0.5) / max(len(attention), 1)


def evidence_of(planned: Planned) -> Evidence:
    """What runs before the choice of a planned prompt."""
    return RULES[planned.prompt.options.selection.policy].evidence if planned.level.name == "corrected" else "none"


def first_phase(planned: Planned) -> Evidence | int:
    """Prompts of one batch agree in this: the evidence, or the check layer where that is it."""
    evidence = evidence_of(planned)
    return planned.prompt.options.selection.check_layer if evidence == "check_layer" else evidence


def max_rows(planned: Planned) -> int:
    """The most rows that a planned prompt has in one layer, before the choice is made."""
    return planned.prompt.num_tokens if evidence_of(planned) != "none" else planned.plan.num_fresh


def choose_without_evidence(planned: Planned) -> Planned:
    """Spends the budgets of `corrected` where the policy needs no evidence; other plans stay as they are."""
    if planned.level.name != "corrected" or evidence_of(planned) != "none":
        return planned
    return replace(planned, plan=choose(planned.prompt, planned.plan, planned.level))
