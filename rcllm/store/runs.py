"""Runs of pages in one piece of memory: which are a block's, and which are free.

    |■■■■■■|···|■■|·······|■■■■|···|       a block's, or free; free runs beside each other are one

Knows nothing of what lies there. Never imports torch. Invariant: runs do not overlap, and together are all pages.
"""

from __future__ import annotations

from collections.abc import Container, Iterable


class Runs:
    """Of `num_pages` pages, named by their first. Not thread-safe."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._used: dict[int, int] = {}  # first page of each block → its pages
        self._free = {0: num_pages} if num_pages else {}  # first page of each free run → its pages

    def take(self, count: int) -> int | None:
        """The first page of a run of `count`, in the shortest free run that fits it; None where none does."""
        fitting = [(length, first) for first, length in self._free.items() if length >= count]
        if not fitting:
            return None
        length, first = min(fitting)
        del self._free[first]
        if length > count:
            self._free[first + count] = length - count
        self._used[first] = count
        return first

    def free(self, first: int) -> None:
        """Takes back a run."""
        length = self._used.pop(first)
        after = first + length
        if after in self._free:
            length += self._free.pop(after)
        before = next((start for start, pages in self._free.items() if start + pages == first), None)
        if before is not None:
            first, length = before, length + self._free.pop(before)
        self._free[first] = length

    def packed(self, movable: Container[int]) -> list[tuple[int, int]]:
        """Moves those runs, in their order, to where the run before them ends; returns from where and to where."""
        moves, end = list[tuple[int, int]](), 0
        for first, length in sorted(self._used.items()):
            if first in movable and end < first:
                moves.append((first, end))
                self._used[end] = self._used.pop(first)
                first = end
            end = first + length
        self._free, end = {}, 0
        for first, length in [*sorted(self._used.items()), (self.num_pages, 0)]:
            if end < first:
                self._free[end] = first - end
            end = first + length
        return moves

    def check(self, firsts: Iterable[int]) -> None:
        """Asserts the invariant, and that exactly these runs are taken."""
        there = set(firsts)
        runs = sorted([*self._used.items(), *self._free.items()])
        numbers = f"used {sorted(self._used.items())}, free {sorted(self._free.items())}, blocks at {sorted(there)}"
        assert there == set(self._used), numbers
        assert all(a + n == b for (a, n), (b, _) in zip(runs, [*runs[1:], (self.num_pages, 0)], strict=True)), numbers
        assert not {first + n for first, n in self._free.items()} & self._free.keys(), f"free runs touch: {numbers}"
