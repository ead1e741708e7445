"""Slow, obvious item-kNN: users are sets, and everything is counted one by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import sqrt


def likeness(users: Sequence[Collection[int]], one: int, other: int, shrinkage: float) -> float:
    both = sum(one in user and other in user for user in users)
    a, b = (max(1, sum(item in user for user in users)) for item in (one, other))
    return both / sqrt(a * b) * (both / (both + shrinkage) if both else 0.0)


def scores(
    users: Sequence[Collection[int]], history: Sequence[int], candidates: Sequence[int], shrinkage: float = 0.0
) -> list[float]:
    return [sum(likeness(users, item, event, shrinkage) for event in history) for item in candidates]
