"""How the scheduler sees a request: what it needs, and since when it waits. No tensors, no prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from rcllm.core.ranking import ContentKey


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request wants to be served, apart from what it asks."""

    deadline_ms: float | None = None  # until the pass of its prompt ends: a ranking, a first token; None: as configured
    prior: tuple[float, ...] = ()  # of each candidate, higher is better; empty: the better the earlier it was named


DEFAULT_TERMS = Terms()
NO_LIMIT = 1 << 30  # of requests and rows


@dataclass(frozen=True, slots=True)
class Work:
    """One request that waits for its prompt to be computed, and may run on for several passes after that."""

    number: int  # names it; later ones are larger
    kind: str  # rank, recommend, generate: which limits hold for it
    rows: int  # most rows that its prompt has in one layer
    phase: Hashable = None  # prompts that go through the layers together agree in it
    keys: Mapping[ContentKey, int] = field(default_factory=dict)  # KV blocks that its prompt reads, and their bytes
    step_rows: int = 0  # rows of each later pass; 0: it ends with the pass of its prompt
    own_bytes: int = 0  # of KV that it keeps while it runs
    tenant: str = ""
    arrival_s: float = 0.0
    deadline_s: float | None = None  # of its first token
    ms: float = 0.0  # that its prompt takes, by estimate; 0: unknown

    @property
    def goes_on(self) -> bool:
        """Whether it runs on after the pass of its prompt."""
        return self.step_rows > 0


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Of the prompts that are computed in one pass; one that exceeds them is computed alone."""

    rows: int
    kv_bytes: int
    other_rows: int = NO_LIMIT  # of what goes on, beside work of a single pass and between two such passes


@dataclass(frozen=True, slots=True)
class KindLimits:
    """Of the requests of one kind that run at a time; one that exceeds them runs alone."""

    requests: int = NO_LIMIT
    step_rows: int = NO_LIMIT
    own_bytes: int = 1 << 60
    share: float = 1.0  # of the rows of prompts, where other kinds wait as well
    idle: bool = False  # enters alone, and only where nothing of another kind waits or runs


NO_LIMITS = KindLimits()


@dataclass(frozen=True, slots=True)
class Turn:
    """What the next pass holds."""

    enter: tuple[int, ...] = ()  # whose prompts are computed
    step: tuple[int, ...] = ()  # who takes a step besides
    expired: tuple[int, ...] = ()  # who left the queue unanswered, for its deadline can no longer be kept
    yields: bool = False  # whether work of a single pass may enter between the layers of this pass
    kv_bytes: int = 0  # of KV that its prompts read

    def __bool__(self) -> bool:
        return bool(self.enter or self.step)


@dataclass(frozen=True, slots=True)
class Queue:
    """What new work would find before it, were it added now. Work that only fills idle time does not count."""

    num_waiting: int = 0
    num_own: int = 0  # of its own tenant
    num_tenants: int = 1  # that would have work waiting, its own among them
    ahead_ms: float = 0.0  # of prompts that are computed before it, by estimate
    ahead_rows: int = 0  # of all prompts that wait
