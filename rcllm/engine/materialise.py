"""Computes the canonical KV of missing blocks: all misses of a batch together, in passes of bounded size.

Knows prompts' contexts and the decoder, not requests. Invariant: a block is published once, whole, under a key that
names exactly the context it was computed in. Where a context has several variants, the KV is the mean over them
(expected KV).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rcllm.cache.held import Held
from rcllm.core.ranking import ContentKey, TokenIds
from rcllm.model.decoder import Between, Decoder
from rcllm.prompt.keys import Context, content_key, owner_digest, token_bytes
from rcllm.reuse.assemble import assemble_blocks
from rcllm.reuse.missing import NOTHING, Missing, by_context, chunks, recompute_flops


class Materialiser:
    """Computes blocks with one decoder; at most about `pass_tokens` fresh tokens a pass (one block may exceed it)."""

    def __init__(self, decoder: Decoder, namespace: bytes, pass_tokens: int) -> None:
        self._decoder, self._namespace, self._pass_tokens = decoder, namespace, pass_tokens

    def compute(self, missing: Sequence[Missing], held: Held, between: Between | None = None) -> int:
        """Publishes every block of `missing`; returns how many tokens went through the layers for it."""
        tokens = 0
        for blocks in by_context(missing):
            context, owner = blocks[0].context, blocks[0].context_owner
            tokens += self.fetch_context(context, owner, held, between)
            for chunk in chunks(blocks, self._pass_tokens):
                tokens += self._chunk(context, owner, chunk, held, between)
        return tokens

    def fetch_context(self, context: Context, owner: str | None, held: Held, between: Between | None = None) -> int:
        """Makes sure that the KV of the context's own tokens is held; returns how many were computed for that.

        `owner`: the user, where any of them are that user's.
        """
        variants = [variant for variant in context.variants if variant]
        keys = {self.key(variant, owner): variant for variant in variants}
        absent = [Missing(key, keys[key], NOTHING, owner) for key in held.fetch(keys)]
        return self.compute(absent, held, between) if absent else 0

    def _chunk(
        self, context: Context, owner: str | None, chunk: Sequence[Missing], held: Held, between: Between | None
    ) -> int:
        token_ids = [missing.token_ids for missing in chunk]
        total: list[torch.Tensor] = []
        for variant in context.variants:
            kv = held.blocks[self.key(variant, owner)] if variant else None
            work = assemble_blocks(token_ids, kv, len(variant), self._decoder.device)
            kept = self._decoder.forward(work, between=between).kept
            total = [a + b for a, b in zip(total, kept, strict=True)] if total else kept
        for missing, kv in zip(chunk, total, strict=True):
            if len(context.variants) > 1:
                kv = kv / len(context.variants)
            lengths = [len(variant) for variant in context.variants]
            cost = recompute_flops(self._decoder.spec, len(missing.token_ids), lengths)
            held.publish(missing.key, kv, cost, missing.owner)
        return len(context.variants) * sum(map(len, token_ids))

    def key(self, variant: TokenIds, owner: str | None = None) -> ContentKey:
        """Names the KV of a context's own tokens; `owner`: the user, where any of them are that user's."""
        whose = b"" if owner is None else owner_digest(owner)
        return content_key(self._namespace, NOTHING.digest, token_bytes(variant), whose)
