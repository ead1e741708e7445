"""What travels between the HTTP side of a cluster and its replicas, and back.

Never imports ray or torch. Invariant: an envelope has the same name on every attempt, so that a replica that gets it
again does not compute it again; what aims it stays in the process that sends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rcllm.cluster.live import NodeReport
from rcllm.core.ranking import ContentKey, ItemId
from rcllm.errors import RcllmError
from rcllm.server.backend import About, Asked, Change

# ---- what a replica is asked ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Describe:
    """What it serves: answered by `Described`."""


@dataclass(frozen=True, slots=True)
class State:
    """What it holds and has done: answered by `server.backend.Stats`."""


@dataclass(frozen=True, slots=True)
class Make:
    """One change, which is not in the ledger yet: whether it can be made. Answered by `server.backend.Changed`."""

    change: Change


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Read the ledger as far as the envelope says: answered by `server.backend.Changed`, the acknowledgement."""


@dataclass(frozen=True, slots=True)
class Warm:
    """Compute what is placed there, or of these items what is: answered by `server.backend.Changed`."""

    item_ids: tuple[ItemId, ...] | None = None


@dataclass(frozen=True, slots=True)
class Has:
    """Which of these blocks it has: answered by their sizes in bytes, by key."""

    keys: tuple[ContentKey, ...]


@dataclass(frozen=True, slots=True)
class Get:
    """Those of these blocks that it has: answered by `SentBlock`s, by key."""

    keys: tuple[ContentKey, ...]


Ask = Asked | Describe | State | Make | CatchUp | Warm | Has | Get


@dataclass(frozen=True, slots=True)
class Described:
    """A replica as the HTTP side has to know it."""

    about: About
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class SentBlock:
    """A sealed block on its way. `data`: an array of bytes, which Ray hands on through its object store."""

    data: Any
    cost: float
    owner: str | None
    space: str


# ---- the way there and back -----------------------------------------------------------------------------------------


class Aim(Protocol):
    """Chooses the node for one envelope. Called in the thread that routes."""

    def choose(self, living: Mapping[int, Mapping[str, Any]]) -> Sequence[int]:
        """Nodes, the best first, of those that live; each with what it published."""

    def routed(self, node: int) -> None:
        """It was sent there."""


class Envelope:
    """One question to a replica."""

    __slots__ = ("aim", "ask", "hints", "name", "node", "version")

    def __init__(
        self,
        name: str,
        ask: Ask,
        version: int = 0,
        node: int | None = None,
        aim: Aim | None = None,
        hints: tuple[int, ...] = (),
    ) -> None:
        """`version`: of the ledger, which the answer must know. `node`: the only one that is meant; None: any.

        `hints`: other nodes that are likely to have what is missing where it is computed.
        """
        self.name, self.ask, self.version, self.node, self.aim, self.hints = name, ask, version, node, aim, hints

    def __reduce__(self) -> Any:
        """Without what aims it."""
        return Envelope, (self.name, self.ask, self.version, self.node, None, self.hints)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replica says to an envelope."""

    node: int
    value: Any = None
    error: RcllmError | None = None
    missed: bool = False  # the envelope was for another node, which is not there
    report: NodeReport | None = None  # how the node is now


class LostError(Exception):
    """The replica died, or could not be reached, before it answered. The question may be asked again."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
