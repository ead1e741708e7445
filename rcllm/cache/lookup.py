"""Which tier has which block: asked once for all keys of a batch, before anything is planned. Never imports torch.

Knows nothing of prompts. Invariant: looking up reads no KV and holds no lock that a pass needs; what it says is a hint,
since blocks come and go meanwhile.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Found


@dataclass(frozen=True, slots=True)
class Lookup(Container[ContentKey]):
    """What was found of the keys of a batch: `key in lookup` tells whether any tier has it."""

    found: Mapping[ContentKey, Found] = field(default_factory=dict)
    erasures: int = 0  # how many owners had been erased by then

    def __contains__(self, key: object) -> bool:
        return key in self.found
