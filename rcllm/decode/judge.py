"""What relaxed verification needs to know of the nodes of draft trees: their ranks, and how likely they are.

Knows nothing of what is accepted. Invariant: what is asked of logits one after the other and what is asked at once give
the same, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rcllm.codes.trie import Places
from rcllm.core.decoding import Speculation
from rcllm.decode.verify import Judged
from rcllm.drafts.draft import DraftTree
from rcllm.model.upload import upload

FloatArray = npt.NDArray[np.float32]


class Chances(Protocol):
    """How likely the nodes of one tree are, each after its parent."""

    @property
    def ratios(self) -> FloatArray:
        """[n], of each node's probability to that of the likeliest token."""

    def num_likelier(self, nodes: Places) -> Places:
        """Tokens that are likelier than each of these nodes."""

    def probabilities(self, nodes: Places) -> FloatArray:
        """[2, nodes]: of each of these nodes, and of the likeliest token in its place."""


def judge(tree: DraftTree, targets: Sequence[int], chances: Chances, rule: Speculation) -> Judged:
    """targets [n + 1]: the likeliest token after each row.

    Little is asked of tokens that cannot be accepted but as the likeliest: a token's probability is at most its ratio
    to that of the likeliest.
    """
    first = tree.token_ids == np.array(targets)[tree.parents]
    ranks = np.where(first, 0, rule.k).astype(np.int32)
    probabilities, most_probable = (np.full(len(tree), np.nan, np.float32) for _ in range(2))
    if len(likely := np.flatnonzero((chances.ratios > rule.p) & ~first)):
        ranks[likely] = np.clip(chances.num_likelier(likely), 1, rule.k)  # of equally likely tokens one is the first
    if len(open_nodes := np.flatnonzero((ranks > 0) & (ranks < rule.k))):
        probabilities[open_nodes], most_probable[open_nodes] = chances.probabilities(open_nodes)
    return Judged(ranks, probabilities, most_probable)


class LookedUp:
    """`Chances` from logits [n + 1, vocab] on the CPU: a pass over the vocabulary for what is asked alone."""

    def __init__(self, logits: torch.Tensor, tree: DraftTree, targets: Sequence[int]) -> None:
        self._logits, self._parents = logits, torch.from_numpy(tree.parents).long()
        self._own = logits[self._parents, torch.from_numpy(tree.token_ids).long()]
        self._most = logits[self._parents, torch.tensor(targets)[self._parents]]

    @property
    def ratios(self) -> FloatArray:
        ratios: FloatArray = torch.exp(self._own - self._most).numpy()
        return ratios

    def num_likelier(self, nodes: Places) -> Places:
        at = torch.from_numpy(nodes)
        counts: Places = (self._logits[self._parents[at]] > self._own[at, None]).sum(dim=1).numpy()
        return counts

    def probabilities(self, nodes: Places) -> FloatArray:
        at = torch.from_numpy(nodes)
        lse = torch.logsumexp(self._logits[self._parents[at]], dim=-1)
        both: FloatArray = torch.exp(torch.stack([self._own[at], self._most[at]]) - lse).numpy()
        return both


class Tabled:
    """`Chances` from the table of `chances_at_once`, on the host."""

    def __init__(self, table: FloatArray) -> None:
        self._table = table

    @property
    def ratios(self) -> FloatArray:
        ratios: FloatArray = self._table[0]
        return ratios

    def num_likelier(self, nodes: Places) -> Places:
        counts: Places = self._table[1, nodes].astype(np.int64)
        return counts

    def probabilities(self, nodes: Places) -> FloatArray:
        both: FloatArray = self._table[2:, nodes]
        return both


def chances_at_once(logits: torch.Tensor, targets: torch.Tensor, parents: Places, tokens: Places) -> torch.Tensor:
    """[4, nodes], fp32: ratio, tokens that are likelier, probabilities of the node and of the likeliest token.

    Of the nodes of all trees that are judged, without waiting for the device. logits [rows, vocab], targets [rows], on
    the device; parents, the row before each node, and tokens, on the host.
    """
    rows, own_ids = upload(np.stack([parents, tokens]).astype(np.int64), logits.device)
    after = logits[rows]  # [nodes, vocab]
    own, most = after.gather(1, own_ids[:, None]), after.gather(1, targets[rows][:, None])
    lse = torch.logsumexp(after, dim=-1, keepdim=True)
    num_likelier = (after > own).sum(-1, keepdim=True)
    return torch.cat([torch.exp(own - most), num_likelier, torch.exp(own - lse), torch.exp(most - lse)], dim=1).T
