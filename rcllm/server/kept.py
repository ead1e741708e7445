"""What is kept in memory between requests: answers whose receipts may be asked for, and the events of users.

Knows nothing of HTTP. Invariant: both are bounded; an answer is found by whom it was given to alone; of a user who is
erased nothing is left, and no answer stays that was asked for before. A digest alone says who was erased.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from rcllm.core.ranking import Event, UserId, whose
from rcllm.reuse.missing import user_owner
from rcllm.server.backend import Asked, Request, Response
from rcllm.store.erasures import Erasures
from rcllm.store.owners import one_name


@dataclass(frozen=True, slots=True)
class Answered:
    """A request with what it was answered."""

    asked: Asked
    response: Response


class Answers:
    """The latest `size` answers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[tuple[str, str], Answered] = OrderedDict()
        self._erasures = Erasures()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def erasures(self) -> int:
        """How many there were: a mark of this moment."""
        return self._erasures.since

    def was_erased(self, request: Request, since: int) -> bool:
        """Whether the user of a request was erased after a mark."""
        return self._erasures.hit(_digest(_user_of(request)), since)

    def add(self, caller: str, asked: Asked, response: Response) -> None:
        """`caller`: by whose key it was asked."""
        if not self._size:
            return
        name = caller, asked.request.request_id
        self._kept[name] = Answered(asked, response)
        self._kept.move_to_end(name)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def find(self, caller: str, request_id: str) -> Answered | None:
        return self._kept.get((caller, request_id))

    def erase(self, user_id: UserId) -> int:
        """Of one user, as `whose` names them; returns how many there were."""
        self._erasures.add([_digest(user_id) or ""])
        gone = [name for name, kept in self._kept.items() if _user_of(kept.asked.request) == user_id]
        for name in gone:
            del self._kept[name]
        return len(gone)


def _user_of(request: Request) -> UserId | None:
    return whose(request.user_id, request.tenant)


def _digest(user_id: UserId | None) -> str | None:
    return one_name(user_owner(user_id))


class Histories:
    """The events of users who were told of; of at most `users`, the ones used last, and `events` of each."""

    def __init__(self, users: int, events: int) -> None:
        self._users, self._events = users, events
        self._kept: OrderedDict[UserId, tuple[Event, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, user_id: UserId, events: Sequence[Event]) -> int:
        """Returns how many are kept of the user now."""
        if not self._users:
            return 0
        kept = (*self._kept.get(user_id, ()), *events)[-self._events :]
        self._kept[user_id] = kept
        self._kept.move_to_end(user_id)
        while len(self._kept) > self._users:
            self._kept.popitem(last=False)
        return len(kept)

    def of(self, user_id: UserId | None) -> tuple[Event, ...]:
        """Oldest first; nothing for a user who is not known."""
        if user_id is None or user_id not in self._kept:
            return ()
        self._kept.move_to_end(user_id)
        return self._kept[user_id]

    def erase(self, user_id: UserId) -> int:
        """Returns how many events there were."""
        return len(self._kept.pop(user_id, ()))
