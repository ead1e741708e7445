"""Which tier has which block: asked once for all keys of a batch, before anything is planned. Never imports torch.

Knows nothing of prompts. Invariant: looking up reads no KV and holds no lock that a pass needs; what it says is a hint,
since blocks come and go meanwhile.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source


@dataclass(frozen=True, slots=True)
class Located:
    """Where a block is, and what it takes to have it on the device."""

    tier: Source
    num_bytes: int
    ms: float  # estimated until it is there; 0 for what is


@dataclass(frozen=True, slots=True)
class Lookup(Container[ContentKey]):
    """What was found of the keys of a batch: `key in lookup` tells whether it is worth reading from where it is."""

    found: Mapping[ContentKey, Located] = field(default_factory=dict)
    erasures: int = 0  # how many owners had been erased by then
    dear: frozenset[ContentKey] = frozenset()  # found, but computed sooner than read, by the estimates

    def __contains__(self, key: object) -> bool:
        return key in self.found and key not in self.dear

    def is_near(self, key: ContentKey) -> bool:
        """Whether this machine has it, or a store that does not go with another machine."""
        return key in self.found and self.found[key].tier != "peer"

    @property
    def worth_reading(self) -> Mapping[ContentKey, Located]:
        """What is read from where it is."""
        return (
            {key: located for key, located in self.found.items() if key not in self.dear} if self.dear else self.found
        )

    def against(self, compute_ms: Mapping[ContentKey, float]) -> Lookup:
        """The same, with what is computed sooner than read set apart."""
        dear = {key for key, ms in compute_ms.items() if key in self.found and self.found[key].ms > ms}
        return replace(self, dear=frozenset(dear)) if dear else self
