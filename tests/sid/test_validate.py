"""NDCG@10 while a decoder is trained, against a slow twin that scores every item by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import ItemId
from rcllm.sid.held_out import Case
from rcllm.sid.train import CodeTrainer, best_of
from rcllm.sid.validate import TopOfList
from tests.sid.toys import HELD_OUT, IDS, NUM_ITEMS, QUICK, SIZES, TRAIN, toy_codes, toy_index

CASES = [Case((0, 1, 2), 3), Case((5,), 6), Case((11, 0), 1)]


def _order(trainer: CodeTrainer, case: Case) -> list[int]:
    """All items that the user has not seen by the log-probability of their codes, one sequence for each."""
    sequences = trainer.sequences
    prompt = sequences.prompt(case.history)
    scores = {}
    for item in set(range(NUM_ITEMS)) - set(case.history):
        codes = sequences.tokens[item][1:]
        tokens = torch.from_numpy(np.concatenate([prompt, codes])).long()[None]
        with torch.no_grad():
            trainer.network.eval()
            log_probs = torch.log_softmax(trainer.network.logits(trainer.network(tokens))[0], dim=-1)
        scores[item] = sum(float(log_probs[len(prompt) - 1 + at, code]) for at, code in enumerate(codes))
    return sorted(scores, key=lambda item: -scores[item])


def test_with_beams_for_all_prefixes_the_order_is_that_of_all_items(tmp_path: Path) -> None:
    trainer = CodeTrainer(toy_index(), TRAIN, HELD_OUT, QUICK, tmp_path)
    trainer.run(max_steps=9)
    top = TopOfList(toy_index(), trainer.sequences, CASES, 6)
    expected = [_order(trainer, case) for case in CASES]
    assert top.best(trainer.network, beam=100) == [items[:10] for items in expected]
    gains = [1 / np.log2(2 + items.index(c.target)) for items, c in zip(expected, CASES, strict=True)]
    assert top.ndcg(trainer.network, beam=100) == pytest.approx(np.mean(gains))


def test_items_that_share_codes_stand_one_after_the_other(tmp_path: Path) -> None:
    codes = np.concatenate([toy_codes(), toy_codes()[:1]])
    shared = CodeIndex.build(codes, (*IDS, ItemId("twin of 0")), SIZES)
    trainer = CodeTrainer(toy_index(), TRAIN, HELD_OUT, QUICK, tmp_path)
    found = TopOfList(shared, trainer.sequences, [Case((5,), 6)], 6).best(trainer.network, beam=100)[0]
    if 0 in found[:-1]:
        assert found[found.index(0) + 1] == NUM_ITEMS


def test_nobody_to_ask_gives_zero(tmp_path: Path) -> None:
    trainer = CodeTrainer(toy_index(), TRAIN, HELD_OUT, QUICK, tmp_path)
    assert TopOfList(toy_index(), trainer.sequences, [], 6).ndcg(trainer.network) == 0.0


def test_what_is_kept_is_the_best_by_ndcg(tmp_path: Path) -> None:
    trainer = CodeTrainer(toy_index(), TRAIN, HELD_OUT, QUICK, tmp_path)
    curve = trainer.run()
    assert best_of(curve).validation_ndcg10 == max(point.validation_ndcg10 for point in curve) > 0.9
