"""How much one ranking computes, reads and copies at each reuse level, by counting tokens as `reuse/plan.py` does.

Knows nothing of nodes or times. Counts are those of a prompt of average shape: fresh tokens of a level are taken to lie
evenly over what they are chosen from. Invariant: fresh and reused tokens add up to the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rcllm.core.requests import Level
from rcllm.model.spec import ModelSpec
from rcllm.sim.cost import PassShape


@dataclass(frozen=True, slots=True)
class Tokens:
    """A ranking prompt, in tokens."""

    instruction: int
    history: int
    items: Sequence[int]  # of each candidate
    fresh: int  # labels, delimiters, question: never cached

    @property
    def total(self) -> int:
        return self.instruction + self.history + sum(self.items) + self.fresh


@dataclass(frozen=True, slots=True)
class Reuse:
    """What the system that is simulated does with cached KV. The defaults are rcllm's; `rcllm_paper()` is RcLLM's."""

    level: Level
    semantic_history: bool = False  # histories from token prototypes, on every node; else each user's own KV
    structure_share: float = 0.0  # of a history from prototypes: ids, times, delimiters, which are always fresh
    fresh_instruction: bool = False  # computed in every request
    window: int = 0  # reused tokens before the question, fresh on top of what `corrected` chooses
    inline_misses: bool = False  # missing items are computed in the pass alone; else as blocks, and kept

    @classmethod
    def rcllm_paper(
        cls, items: float = 0.3, history: float = 0.3, structure_share: float = 0.0, window: int = 0
    ) -> Reuse:
        """As RcLLM describes itself (§III): instructions always computed, and misses in the pass."""
        return cls(
            Level("corrected", items, history),
            semantic_history=True,
            structure_share=structure_share,
            fresh_instruction=True,
            window=window,
            inline_misses=True,
        )

    def saved_tokens(self, tokens: int) -> int:
        """How many tokens fewer are computed where an item of that length is there, and not missing."""
        match self.level.name:
            case "full" | "exact":
                return 0
            case "corrected" | "tail":
                return round(tokens * (1 - self.level.budget)) if self.inline_misses else tokens
            case "linked":
                return max(0, tokens - int(self.level.budget)) if self.inline_misses else tokens
        return tokens

    @property
    def reads_items(self) -> bool:
        return self.level.name not in ("full", "exact")


@dataclass(frozen=True, slots=True)
class There:
    """What of a prompt has its KV on the node when its pass begins."""

    hit_tokens: int  # of items
    missing: Sequence[int]  # tokens of each item that has to be computed
    history: bool  # the user's own KV


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of a pass."""

    shape: PassShape
    max_rows: int  # most rows in one layer
    num_fresh: int  # tokens whose last layer is computed in the request
    num_built: int  # tokens of missing blocks, computed before it


def demand(tokens: Tokens, there: There, reuse: Reuse, spec: ModelSpec, kv_bytes_per_token: int) -> Demand:
    """The work of one request, its missing blocks among it."""
    total, level = tokens.total, reuse.level
    if level.name == "full":
        return _prefill(tokens, 0, 0)
    if level.name == "exact":
        return _prefill(tokens, tokens.instruction + tokens.history * there.history, kv_bytes_per_token)
    missing = sum(there.missing)
    reusable = there.hit_tokens + (0 if reuse.inline_misses else missing)
    inline = there.missing if reuse.inline_misses else ()
    fresh = tokens.fresh + sum(inline) + _fresh_items(level, reusable, tokens.items, inline)
    fresh += tokens.instruction * reuse.fresh_instruction
    fresh += _fresh_history(tokens.history, there, reuse)
    if level.name == "corrected":
        fresh += reuse.window
    fresh = min(fresh, total)
    built = 0 if reuse.inline_misses else missing
    layers = spec.num_layers
    check = 1 / layers if level.name == "corrected" else 0.0  # of the layers, those that run for all tokens
    rows = total * check + fresh * (1 - check) + built
    pairs = total * total / 2 * check + fresh * total * (1 - check) * 0.5 + tokens.fresh * total * 0.5 * (1 - check)
    pairs += sum(size * (size / 2 + tokens.instruction) for size in there.missing) * (not reuse.inline_misses)
    reused = (total - fresh) * kv_bytes_per_token
    copied = there.hit_tokens + tokens.history * (there.history or reuse.semantic_history)
    shape = PassShape(rows, pairs, reused * (1 - check), copied * kv_bytes_per_token)
    return Demand(shape, total if check else max(fresh, built), fresh, built)


def _prefill(tokens: Tokens, prefix: int, kv_bytes_per_token: int) -> Demand:
    """Everything after the cached prefix is fresh; the prefix is on the device."""
    total = tokens.total
    fresh = total - prefix
    pairs = (total * (total + 1) - prefix * (prefix + 1)) / 2
    return Demand(PassShape(fresh, pairs, prefix * kv_bytes_per_token, 0.0), fresh, fresh, 0)


def _fresh_items(level: Level, reusable: int, items: Sequence[int], inline: Sequence[int]) -> int:
    """Tokens of reused items that the level computes all the same; `inline`: items that are not reused."""
    match level.name:
        case "corrected":
            return round(reusable * level.budget)
        case "tail":
            return math.ceil(reusable * level.budget)
        case "linked":
            return sum(min(int(level.budget), size) for size in items) - sum(min(int(level.budget), s) for s in inline)
    return 0


def _fresh_history(history: int, there: There, reuse: Reuse) -> int:
    if reuse.semantic_history:
        structure = round(history * reuse.structure_share)
        return structure + round((history - structure) * reuse.level.history_budget)
    if not there.history:
        return history
    return round(history * reuse.level.history_budget)
