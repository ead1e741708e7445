"""What the rows of a pass tell: of all sequences at once, on the CPU by looking again, elsewhere in one copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.core.decoding import Speculation
from rcllm.core.ranking import IntArray
from rcllm.decode.judge import LookedUp, Tabled, chances_at_once, judge
from rcllm.decode.sample import Draw
from rcllm.decode.told import Asked, Told, told
from rcllm.decode.verify import Judged
from rcllm.drafts.draft import EMPTY, DraftTree

Judge = Callable[[torch.Tensor, DraftTree, Speculation], Judged]
RELAXED = Speculation("relaxed", 3, 0.05)


def random_logits(rows: int, seed: int, vocab: int = 12) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def by_look(logits: torch.Tensor, tree: DraftTree, rule: Speculation) -> Judged:
    targets = logits.argmax(dim=-1).tolist()
    return judge(tree, targets, LookedUp(logits, tree, targets), rule)


def at_once(logits: torch.Tensor, tree: DraftTree, rule: Speculation) -> Judged:
    targets = logits.argmax(dim=-1)
    table = chances_at_once(logits, targets, tree.parents.astype(np.int64), tree.token_ids.astype(np.int64))
    return judge(tree, targets.tolist(), Tabled(table.numpy()), rule)


def random_tree(rng: np.random.Generator, nodes: int, vocab: int) -> DraftTree:
    parents: IntArray = np.array([rng.integers(0, node + 1) for node in range(nodes)], np.int32)
    return DraftTree(rng.integers(0, vocab, nodes).astype(np.int32), parents, np.ones(nodes, np.float32))


@pytest.mark.parametrize("judged", [by_look, at_once])
def test_ranks_and_probabilities_of_drafted_tokens(judged: Judge) -> None:
    logits = random_logits(4, 8)
    order = np.argsort(-logits.numpy(), axis=1)
    parents = np.array([0, 0, 1, 2], np.int32)
    tokens = np.array([order[0, 0], order[0, 2], order[1, 1], order[2, 4]], np.int32)
    tree = DraftTree(tokens, parents, np.ones(4, np.float32))
    found = judged(logits, tree, Speculation("relaxed", 3, 0.0))
    assert found.ranks.tolist() == [0, 2, 1, 3]
    chances = torch.softmax(logits, dim=-1).numpy()
    for node in (1, 2):
        assert found.probabilities[node] == pytest.approx(chances[parents[node], tokens[node]], rel=1e-5)
        assert found.most_probable[node] == pytest.approx(chances[parents[node]].max(), rel=1e-5)
    assert np.isnan(found.probabilities[[0, 3]]).all()  # their rank alone decides
    ratio = float(chances[0, order[0, 2]] / chances[0, order[0, 0]])
    for p, rank in ((ratio * 0.99, 2), (ratio * 1.01, 3)):  # too improbable, whatever the rest of the vocabulary
        assert judged(logits, tree, Speculation("relaxed", 3, p)).ranks[1] == rank


@pytest.mark.parametrize("judged", [by_look, at_once])
def test_of_equally_likely_tokens_one_is_the_first(judged: Judge) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    tree = DraftTree(np.array([1, 2], np.int32), np.zeros(2, np.int32), np.ones(2, np.float32))
    assert sorted(judged(logits, tree, Speculation("relaxed", 2, 0.0)).ranks.tolist()) == [0, 1]


class Head:
    """A decoder's head alone: the hidden states are the logits."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def batch(seed: int) -> tuple[torch.Tensor, list[Asked]]:
    """Greedy, drawn, strict and relaxed sequences, with trees and without."""
    rng = np.random.default_rng(seed)
    asked = []
    for number in range(8):
        tree = random_tree(rng, int(rng.integers(1, 9)), 30) if number % 4 else EMPTY
        draws = [Draw(0.8, (1.0, 0.6)[row % 2], float(rng.random())) for row in range(len(tree) + 1)]
        asked.append(Asked(tree, Speculation("strict"), draws) if number % 3 == 1 else Asked(tree, RELAXED))
    return random_logits(sum(each.num_rows for each in asked), seed, 30), asked


def asked_of(hidden: torch.Tensor, asked: Sequence[Asked]) -> list[Told | None]:
    head: Any = Head()
    return told(head, hidden, asked)


def assert_equal(some: Told | None, other: Told | None) -> None:
    assert (some is None) is (other is None)
    if some is None or other is None:
        return
    assert some.targets == other.targets
    assert (some.judged is None) is (other.judged is None)
    if some.judged is not None and other.judged is not None:
        for field in dataclasses.fields(Judged):
            np.testing.assert_allclose(getattr(some.judged, field.name), getattr(other.judged, field.name), rtol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_one_copy_tells_what_looking_tells(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, asked = batch(seed)
    if seed % 2:
        hidden[seed] = np.nan
    looked = asked_of(hidden, asked)
    for module in ("told", "sample"):
        monkeypatch.setattr(f"rcllm.decode.{module}.is_near", lambda device: False)
    for some, other in zip(looked, asked_of(hidden, asked), strict=True):
        assert_equal(some, other)
    assert [each is None for each in looked].count(True) == seed % 2


def test_a_sequence_is_told_the_same_alone() -> None:
    hidden, asked = batch(3)
    ends = np.cumsum([each.num_rows for each in asked])
    for end, each, among in zip(ends, asked, asked_of(hidden, asked), strict=True):
        [alone] = asked_of(hidden[end - each.num_rows : end], [each])
        assert_equal(alone, among)


def test_the_host_waits_for_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta`, from which nothing can be read, all is launched before the copy that fails."""
    hidden, asked = batch(5)
    with pytest.raises(NotImplementedError, match="meta") as raised:
        asked_of(hidden.to("meta"), asked)
    assert ".cpu()" in str(raised.traceback[-2 if "torch" in str(raised.traceback[-1].path) else -1].statement)
    copies = list[torch.Tensor]()
    cpu = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    asked_of(hidden, asked)
    assert len(copies) == 1
