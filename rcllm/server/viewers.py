"""Users of a published data set to try the page with: what they chose, and what they chose next among other items.

For `rcllm serve --demo` alone; nothing that a real user did passes here. Invariant: equal data sets give equal viewers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rcllm.core.ranking import Interaction, ItemId, UserId

_HISTORY, _CHOSEN, _OTHERS = 10, 4, 12
_NUM_VIEWERS = 40


@dataclass(frozen=True, slots=True)
class Viewer:
    name: str
    history: tuple[ItemId, ...]  # oldest first
    candidates: tuple[ItemId, ...]
    chosen: tuple[ItemId, ...]  # of the candidates, those that the viewer chose after the history


def viewers_of(interactions: Sequence[Interaction], seed: int = 0) -> tuple[Viewer, ...]:
    """Those with enough choices, drawn by the seed; each has candidates that were chosen next, among popular others."""
    draw, by_user = random.Random(seed), defaultdict[UserId, list[Interaction]](list)
    for each in interactions:
        by_user[each.user_id].append(each)
    fitting = sorted(user_id for user_id, events in by_user.items() if len(events) >= _HISTORY + _CHOSEN)
    drawn = sorted(draw.sample(fitting, min(_NUM_VIEWERS, len(fitting))))
    return tuple(_viewer(user_id, by_user[user_id], interactions, draw) for user_id in drawn)


def _viewer(
    user_id: UserId, events: Sequence[Interaction], interactions: Sequence[Interaction], draw: random.Random
) -> Viewer:
    """Others are drawn as often as they are chosen, so that popularity alone tells nothing."""
    ordered = [each.item_id for each in sorted(events, key=lambda each: each.timestamp)]
    ordered = list(dict.fromkeys(ordered))[-_HISTORY - _CHOSEN :]
    history, chosen, seen = ordered[:-_CHOSEN], ordered[-_CHOSEN:], {each.item_id for each in events}
    pool = (each.item_id for each in draw.choices(interactions, k=20 * _OTHERS))
    others = [item_id for item_id in dict.fromkeys(pool) if item_id not in seen][:_OTHERS]
    candidates = sorted([*chosen, *others], key=lambda item_id: draw.random())
    return Viewer(f"viewer {user_id}", tuple(history), tuple(candidates), tuple(chosen))
