"""Which blocks are to be computed, in which context, and what that costs. Never imports torch.

Knows prompts' contexts, not requests. Invariant: a block's key names exactly the context in which it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rcllm.core.ranking import Block, ContentKey, Layout, TokenIds
from rcllm.core.receipts import BlockKind
from rcllm.model.spec import ModelSpec
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.keys import Context

NOTHING = Context(((),))


@dataclass(frozen=True, slots=True)
class Missing:
    """A block to compute."""

    key: ContentKey
    token_ids: TokenIds
    context: Context
    owner: str | None
    context_owner: str | None = None  # the user, where any of the context is that user's


def canonical(prompter: Prompter, block: Block, layout: Layout) -> Missing:
    """A block to compute in the canonical context of its kind."""
    assert block.key is not None
    context = NOTHING if block.kind is BlockKind.INSTRUCTION else prompter.contexts[layout][block.kind]
    owner = user_owner(block.owner) if block.private else item_owner(block.owner)
    return Missing(block.key, block.token_ids, context, owner)


def user_owner(user_id: str | None) -> str | None:
    """Owner names of users and items never collide."""
    return None if user_id is None else f"user:{user_id}"


def item_owner(item_id: str | None) -> str | None:
    return None if item_id is None else f"item:{item_id}"


def recompute_flops(spec: ModelSpec, size: int, contexts: Sequence[int]) -> float:
    """What it takes to compute a block of `size` tokens again, after contexts of these lengths whose KV is there."""
    pairs = sum(size * context + size * (size + 1) // 2 for context in contexts)
    return float(len(contexts) * size * spec.linear_flops_per_token + spec.attention_flops(pairs))


def chunks(blocks: Iterable[Missing], max_tokens: int) -> Iterator[list[Missing]]:
    """Runs of blocks that have at most `max_tokens` tokens together, or consist of one block."""
    chunk: list[Missing] = []
    for block in blocks:
        if chunk and sum(len(b.token_ids) for b in chunk) + len(block.token_ids) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(block)
    if chunk:
        yield chunk


def by_context(missing: Sequence[Missing]) -> list[list[Missing]]:
    """Those together whose contexts are one, and one user's or nobody's."""
    grouped: dict[tuple[bytes, str | None], list[Missing]] = {}
    for block in missing:
        grouped.setdefault((block.context.digest, block.context_owner), []).append(block)
    return list(grouped.values())
