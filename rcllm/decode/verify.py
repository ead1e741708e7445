"""Which path of a draft tree becomes part of the answer, after one forward pass over all of its nodes.

Knows nothing of models or of KV, and never imports torch. Rows: 0 is the root, the last token already decided; row
i + 1 is node i. Invariant: `accept` yields the tokens that decoding one at a time would yield, whatever the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.core.decoding import Speculation
from rcllm.core.ranking import BoolArray, IntArray
from rcllm.core.receipts import Divergence
from rcllm.drafts.draft import DraftTree

_PHRASE = 4  # tokens


@dataclass(frozen=True, slots=True)
class Judged:
    """What the model thinks of the nodes of a tree, each after its parent."""

    ranks: IntArray  # [n]; 0: the likeliest token, k of the rule: not to be accepted
    probabilities: npt.NDArray[np.float32]  # [n]; nan where they decide nothing
    most_probable: npt.NDArray[np.float32]  # [n], probability of the likeliest token; nan likewise


@dataclass(frozen=True, slots=True)
class Accepted:
    """What one pass decided: the tokens of a path from the root, and one more that the model gives at its end."""

    rows: tuple[int, ...]  # of the accepted nodes, in order; without the root's
    token_ids: tuple[int, ...]  # one more than rows
    divergences: tuple[Divergence, ...] = ()


def ancestors(tree: DraftTree) -> BoolArray:
    """[n + 1, n + 1]: which rows each row sees besides itself: those on its way to the root, and the root."""
    sees = np.zeros((len(tree) + 1,) * 2, dtype=np.bool_)
    for row, parent in enumerate(tree.parents.tolist(), 1):
        sees[row] = sees[parent]
        sees[row, parent] = True
    return sees


def subtree(tree: DraftTree, nodes: IntArray) -> DraftTree:
    """The tree of some nodes (their indices, rising), with whom their parents are."""
    parents = np.searchsorted(nodes + 1, tree.parents[nodes]) + 1
    below_root = tree.parents[nodes] == 0
    assert (below_root | np.isin(tree.parents[nodes], nodes + 1)).all(), "a node without its parent"
    return DraftTree(tree.token_ids[nodes], np.where(below_root, 0, parents).astype(np.int32), tree.weights[nodes])


def accept(tree: DraftTree, targets: Sequence[int]) -> Accepted:
    """Follows the children that equal the model's own choice; `targets` [n + 1]: that choice after each row.

    The choice may be the likeliest token or a draw. Either way the answer is the one of plain decoding, and a draw's
    distribution is the model's, since the draft decides only how many of the choices are used at once.
    """
    if not len(tree):
        return Accepted((), (targets[0],))
    child = {
        (parent, token): row
        for row, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True), 1)
    }
    rows, tokens = list[int](), [targets[0]]
    row = 0
    while (following := child.get((row, targets[row]))) is not None:
        row = following
        rows.append(row)
        tokens.append(targets[row])
    return Accepted(tuple(rows), tuple(tokens))


def accept_relaxed(
    tree: DraftTree, targets: Sequence[int], judged: Judged, rule: Speculation, answer: Sequence[int]
) -> Accepted:
    """The longest path of acceptable nodes; among equally long ones, that of the better ranks, from the root on.

    A node is acceptable after its parent as the likeliest token; or with a rank up to k and a probability above p,
    unless it ends a phrase that the answer has already: drafts from the answer itself would lead it in circles.
    targets [n + 1]: the likeliest token after each row; answer: the tokens decided so far, the root's the last.
    Source: DARE (arXiv 2408.05676), relaxed verification; the likeliest token is accepted whatever its probability,
    because it is what would be taken in place of a rejected draft. That phrases are not repeated is ours.
    """
    ranks, parents, tokens = judged.ranks.tolist(), tree.parents.tolist(), tree.token_ids.tolist()
    acceptable = (judged.ranks == 0) | ((judged.ranks < rule.k) & (judged.probabilities > rule.p))
    for node in _repeating(tree, np.flatnonzero(acceptable & (judged.ranks > 0)).tolist(), answer):
        acceptable[node] = False
    length = [0] * (len(tree) + 1)  # of the longest acceptable path below each row
    following: list[int | None] = [None] * (len(tree) + 1)
    for row in range(len(tree), 0, -1):  # children come after their parents
        parent = parents[row - 1]
        best = following[parent]
        if acceptable[row - 1] and (best is None or (length[row], -ranks[row - 1]) > (length[best], -ranks[best - 1])):
            following[parent], length[parent] = row, length[row] + 1
    rows, divergences = list[int](), list[Divergence]()
    at = following[0]
    while at is not None:
        node = at - 1
        if ranks[node]:
            chances = float(judged.probabilities[node]), float(judged.most_probable[node])
            place = len(answer) + len(rows)
            divergences.append(Divergence(place, tokens[node], targets[parents[node]], *chances))
        rows.append(at)
        at = following[at]
    last = rows[-1] if rows else 0
    return Accepted(tuple(rows), (*(tokens[row - 1] for row in rows), targets[last]), tuple(divergences))


def _repeating(tree: DraftTree, nodes: Sequence[int], answer: Sequence[int]) -> Iterator[int]:
    """Those of `nodes` that end a phrase which `answer` has already."""
    if not nodes:
        return
    said = {tuple(answer[start : start + _PHRASE]) for start in range(len(answer) - _PHRASE + 1)}
    parents, tokens = tree.parents.tolist(), tree.token_ids.tolist()
    for node in nodes:
        path, row = list[int](), node + 1
        while row and len(path) < _PHRASE:
            path.insert(0, tokens[row - 1])
            row = parents[row - 1]
        if tuple([*answer[-_PHRASE:], *path][-_PHRASE:]) in said:
            yield node
