"""Content keys: what names the KV of a block.

Knows nothing of prompts or caches. Invariant: a key covers everything that the KV's values depend on, and nothing
else: model, adapter, tokenizer, template and dtypes (the namespace), the tokens before the block when it was computed
(the context), whose it is where it must not be shared, and its own tokens. Ids of items never stand in for content.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from blake3 import blake3

from rcllm.core.ranking import ContentKey, TokenIds


@dataclass(frozen=True, slots=True)
class Context:
    """A canonical context: what stood before a block when its KV was computed. Several: the KV is their mean."""

    variants: tuple[TokenIds, ...]  # each the tokens before; () is nothing at all

    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self._digest())

    def _digest(self) -> bytes:
        digests = [blake3(token_bytes(tokens)).digest() for tokens in self.variants]
        return digests[0] if len(digests) == 1 else blake3(b"mean" + b"".join(digests)).digest()


def content_key(namespace: bytes, context: bytes, tokens: bytes, whose: bytes = b"") -> ContentKey:
    """`context`: digest of the tokens before the block; `tokens`: as `token_bytes` gives them.

    `whose`: digest of the user, for what must not be shared.
    """
    return ContentKey(blake3(namespace + context + whose + b"\0" + tokens).digest())


def owner_digest(owner: str) -> bytes:
    """So that no name of a user can stand for another's name and first tokens, nor for nobody's."""
    return blake3(owner.encode("utf-8", "surrogatepass")).digest()


def token_bytes(token_ids: TokenIds) -> bytes:
    """How token ids are hashed: little-endian 32-bit."""
    return struct.pack(f"<{len(token_ids)}i", *token_ids)
