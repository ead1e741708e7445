"""Makes the parts of a graph equal in several weights at once, at the least loss of edges within parts.

METIS can do so, but its Python binding passes one weight per item; so it balances one, and this balances the others
after it: moves and swaps out of parts that are too heavy, then moves that win edges back. Knows nothing of bytes or
heat. Invariant: every step lowers the sum of squared excesses; what cannot be balanced is left as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rcllm.cluster.statistics import FloatArray, IntArray

_TRIED = 48  # moves, and items of a part, that are looked at
_PARTNERS = 16  # parts that are asked for a swap
_NOTHING = 1e-9  # less is no gain
_STEPS = 20  # moves and swaps for each item, at most: gains may become ever smaller
_PASSES = 3  # over all items, to win edges back


def balanced(parts: IntArray, weights: FloatArray, graph: Any, num_parts: int, limit: float) -> IntArray:
    """`parts` [items] changed so that no part exceeds `limit` times the mean of any of `weights` [kinds, items].

    `graph`: sparse csr [items, items], symmetric.
    """
    return _Balancing(parts, weights, graph, num_parts, limit).run()


class _Balancing:
    """The state of one run. Loads are shares of what a part may have: 1 is full, and what is over 1 is excess."""

    def __init__(self, parts: IntArray, weights: FloatArray, graph: Any, num_parts: int, limit: float) -> None:
        totals = np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
        self.parts = parts.astype(np.int64).copy()
        self.num_parts = num_parts
        self.shares = np.ascontiguousarray((weights / totals * num_parts / limit).T)  # [items, kinds]
        self.starts, self.near, self.edges = graph.indptr, graph.indices, graph.data.astype(np.float64)
        self.loads = np.zeros((num_parts, len(weights)))  # [parts, kinds]
        np.add.at(self.loads, self.parts, self.shares)

    def run(self) -> IntArray:
        stuck: set[int] = set()
        for _ in range(_STEPS * len(self.parts)):
            if (part := self._heaviest(stuck)) is None:
                break
            if self._move_out(part) or self._swap_out(part):
                stuck.clear()
            else:
                stuck.add(part)
        for _ in range(_PASSES):
            if not self._win_edges():
                break
        return self.parts

    def _heaviest(self, stuck: set[int]) -> int | None:
        worst = self.loads.max(axis=1)
        worst[list(stuck)] = 0.0
        part = int(worst.argmax())
        return part if worst[part] > 1.0 + _NOTHING else None

    def _edges_to(self, item: int) -> FloatArray:
        """[parts] weight of the edges from an item into each."""
        at = slice(self.starts[item], self.starts[item + 1])
        return np.bincount(self.parts[self.near[at]], self.edges[at], self.num_parts).astype(np.float64)

    def _move(self, item: int, part: int) -> None:
        self.loads[self.parts[item]] -= self.shares[item]
        self.loads[part] += self.shares[item]
        self.parts[item] = part

    def _members(self, part: int) -> IntArray:
        """The items of a part that are tried: those with the largest and the smallest share of what it has most of."""
        found = np.flatnonzero(self.parts == part)
        ordered = found[np.argsort(self.shares[found, self.loads[part].argmax()], kind="stable")]
        return ordered if len(ordered) <= 2 * _TRIED else np.concatenate([ordered[:_TRIED], ordered[-_TRIED:]])

    def _move_out(self, part: int) -> bool:
        """Moves an item to another part where that takes away excess; of good moves the one that loses least edges."""
        members = self._members(part)
        leaves = _excess(self.loads[part] - self.shares[members])[:, None]  # [members, 1]
        comes = _excess(self.loads[None] + self.shares[members][:, None])  # [members, parts]
        relief = _excess(self.loads[part]) + _excess(self.loads)[None] - leaves - comes
        relief[:, part] = -np.inf
        if relief.max() <= _NOTHING:
            return False
        good = np.argwhere(relief >= relief.max() / 2)
        good = good[np.argsort(-relief[good[:, 0], good[:, 1]], kind="stable")[:_TRIED]]
        edges = {place: self._edges_to(int(members[place])) for place in set(good[:, 0].tolist())}
        loss = [edges[place][part] - edges[place][target] for place, target in good.tolist()]
        place, target = good[int(np.argmin(loss))].tolist()
        self._move(int(members[place]), target)
        return True

    def _swap_out(self, part: int) -> bool:
        """Exchanges an item for one of another part, where that takes away most excess."""
        mine, best = self._members(part), (_NOTHING, -1, -1)
        kind = int(self.loads[part].argmax())
        for other in np.argsort(self.loads[:, kind], kind="stable")[:_PARTNERS].tolist():
            if other == part:
                continue
            theirs = self._members(other)
            change = self.shares[mine][:, None] - self.shares[theirs][None]  # [mine, theirs, kinds]
            before = _excess(self.loads[part]) + _excess(self.loads[other])
            relief = before - _excess(self.loads[part] - change) - _excess(self.loads[other] + change)
            if relief.size and relief.max() > best[0]:
                give, take = divmod(int(relief.argmax()), len(theirs))
                best = (float(relief.max()), int(mine[give]), int(theirs[take]))
        if best[1] < 0:
            return False
        other = int(self.parts[best[2]])
        self._move(best[1], other)
        self._move(best[2], part)
        return True

    def _win_edges(self) -> int:
        """Moves items to the part where most of their edges are, where there is room; returns how many."""
        moved = 0
        for item in range(len(self.parts)):
            edges = self._edges_to(item)
            part = int(self.parts[item])
            target = int(edges.argmax())
            if edges[target] > edges[part] and (self.loads[target] + self.shares[item] <= 1.0).all():
                self._move(item, target)
                moved += 1
        return moved


def _excess(loads: FloatArray) -> FloatArray:
    """[…, kinds] → […]: the sum over kinds of the square of what is over 1."""
    return np.asarray((np.maximum(loads - 1.0, 0.0) ** 2).sum(axis=-1))
