"""Pareto fronts of points that should be small in both coordinates. Pure; knows nothing of what the points are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
Point = tuple[float, float]


def fronts(points: Mapping[T, Point]) -> list[list[T]]:
    """The names on the Pareto front, by their first coordinate, then those on the front of the rest, and so on."""
    left, found = dict(points), list[list[T]]()
    while left:
        front = [name for name, point in left.items() if not any(_dominates(other, point) for other in left.values())]
        found.append(sorted(front, key=lambda name: points[name]))
        left = {name: point for name, point in left.items() if name not in front}
    return found


def _dominates(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other
