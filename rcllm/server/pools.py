"""Pools of earlier answers by the names that clients give them, to draft from.

Knows nothing of how drafts are verified. Invariant: a pool belongs to one tenant; the texts of a user leave every pool
when the user is erased; there are at most `_MOST` pools, of which the ones that were not used longest go first.
"""

from __future__ import annotations

from collections import OrderedDict

from rcllm.core.decoding import GenerateRequest
from rcllm.core.ranking import TokenIds, UserId, whose
from rcllm.core.texts import TextRequest
from rcllm.drafts.draft import Drafter
from rcllm.drafts.pool_drafter import PoolDrafter
from rcllm.drafts.suffix_pool import SuffixPool
from rcllm.engine.engine import Engine

_MOST = 64


class DraftPoolsByName:
    """Called between passes alone, by the thread that computes, or inside `Engine.alone`."""

    def __init__(self, engine: Engine) -> None:
        self._fingerprint = f"{engine.model_id} {engine.prompter.tokenizer.fingerprint.hex()[:12]}"
        self._pools: OrderedDict[tuple[str, str], SuffixPool] = OrderedDict()  # by tenant and name

    def drafter_of(self, request: GenerateRequest, prompt: TokenIds) -> Drafter | None:
        """For `Generator`: none where the request names no pool."""
        if not isinstance(request, TextRequest) or not request.pool:
            return None
        # the prompt's last tokens would be learned with the answer; they may be a user's own words
        return PoolDrafter(self._pool((request.tenant, request.pool)), (), whose(request.user_id, request.tenant))

    def _pool(self, name: tuple[str, str]) -> SuffixPool:
        if name not in self._pools:
            self._pools[name] = SuffixPool.create(self._fingerprint)
        self._pools.move_to_end(name)
        while len(self._pools) > _MOST:
            self._pools.popitem(last=False)
        return self._pools[name]

    def erase(self, user_id: UserId) -> None:
        for pool in self._pools.values():
            pool.erase([user_id])
