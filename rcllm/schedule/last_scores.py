"""What candidates last scored for a user: the last rung before a request is refused.

Knows nothing of how scores come about. Never imports torch. Invariants: no more users and candidates are kept than it
was made for, those that were asked for last; nothing is left of a user who was forgotten. Threads may share it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rcllm.core.ranking import ItemId, UserId

MAX_CANDIDATES = 512  # that are kept of one user


@dataclass(frozen=True, slots=True)
class Known:
    """What was known of a user's candidates."""

    scores: Mapping[ItemId, float]  # of those of the request that have one
    oldest_s: float  # when the oldest of them was computed


class LastScores:
    """`max_users`: 0 keeps nothing. `kind` names how scores were made: those of one kind can be compared."""

    def __init__(self, max_users: int) -> None:
        self._max_users = max_users
        self._lock = threading.Lock()
        self._users: OrderedDict[tuple[UserId, str, str], OrderedDict[ItemId, tuple[float, float]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    def keep(
        self,
        user_id: UserId,
        tenant: str,
        kind: str,
        candidates: Sequence[ItemId],
        scores: Sequence[float],
        now_s: float,
    ) -> None:
        """Replaces what is known of these candidates."""
        if not self._max_users:
            return
        with self._lock:
            known = self._users.setdefault((user_id, tenant, kind), OrderedDict())
            self._users.move_to_end((user_id, tenant, kind))
            for item_id, score in zip(candidates, scores, strict=True):
                known[item_id] = (score, now_s)
                known.move_to_end(item_id)
            while len(known) > MAX_CANDIDATES:
                known.popitem(last=False)
            while len(self._users) > self._max_users:
                self._users.popitem(last=False)

    def known(self, user_id: UserId, tenant: str, kind: str, candidates: Sequence[ItemId]) -> Known:
        """What there is for these candidates."""
        with self._lock:
            kept = self._users.get((user_id, tenant, kind)) or OrderedDict()
            found = {item_id: kept[item_id] for item_id in candidates if item_id in kept}
        return Known({i: score for i, (score, _) in found.items()}, min((s for _, s in found.values()), default=0.0))

    def forget_user(self, user_id: UserId, tenant: str = "") -> int:
        """Removes all that is known of a tenant's user; returns how many scores that were."""
        with self._lock:
            keys = [key for key in self._users if key[:2] == (user_id, tenant)]
            return sum(len(self._users.pop(key)) for key in keys)

    def forget_item(self, item_id: ItemId) -> int:
        """Removes an item whose text changed or that is gone; returns for how many users it was known."""
        with self._lock:
            return sum(known.pop(item_id, None) is not None for known in self._users.values())
