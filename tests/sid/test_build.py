"""Vectors of texts and of who touched what, joined; what is embedded; whose histories are used."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import split_of
from rcllm.errors import ConfigError, DataError
from rcllm.sid.build import BuildConfig, build_codes, code_index_of, item_texts, join_vectors, split_histories
from rcllm.sid.quantise import CodeConfig

CONFIG = BuildConfig(CodeConfig(levels=2, size=4), text_dimensions=3, collaborative_dimensions=2)


def _embeddings(count: int = 12, dimensions: int = 6) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, dimensions)).astype(np.float32)


def test_texts_of_items_in_any_language_and_of_none() -> None:
    items = [
        Item(ItemId("1"), {"title": "自転車", "sid": "<a_1>", "brand": "crème"}),
        Item(ItemId("2"), {}),
        Item(ItemId("3"), {"sid": "<a_2>"}, {"price": "3"}),
    ]
    assert item_texts(items) == ["自転車. crème", "", ""]
    assert item_texts(items, ["brand"]) == ["crème", "", ""]
    assert item_texts(items, ["sid"]) == ["<a_1>", "", "<a_2>"]


def test_histories_of_one_split_by_time_without_items_that_have_no_number() -> None:
    rows = [
        Interaction(UserId(f"u{user}"), ItemId(name), float(-at))
        for user in range(40)
        for at, name in enumerate(("a", "gone", "b"))
    ]
    found = {split: split_histories(rows, {ItemId("a"): 0, ItemId("b"): 1}, split) for split in ("train", "test")}
    for split, histories in found.items():
        assert len(histories) == sum(split_of(UserId(f"u{user}")) == split for user in range(40))
        assert set(map(tuple, histories)) == {(1, 0)}


def test_the_collaborative_part_has_the_length_that_was_asked_for() -> None:
    training = [[0, 1, 2], [2, 1, 0], [3, 4], [5, 6, 7]]
    joined = join_vectors(
        _embeddings(), training, replace(CONFIG, collaborative_dimensions=8, collaborative_weight=2.5)
    )
    assert joined.shape == (12, 11)
    assert np.linalg.norm(joined[:, :3], axis=1) == pytest.approx(np.ones(12), abs=1e-5)
    assert np.linalg.norm(joined[:8, 3:], axis=1) == pytest.approx(np.full(8, 2.5), abs=1e-5)
    assert not joined[8:, 3:].any()  # nobody touched these
    alone = join_vectors(_embeddings(), training, replace(CONFIG, collaborative_weight=0.0))
    assert np.array_equal(alone, join_vectors(_embeddings(), [], CONFIG))
    assert np.array_equal(alone, joined[:, :3])


def test_principal_components_keep_what_differs_most() -> None:
    rng = np.random.default_rng(2)
    spread = rng.standard_normal((50, 4)) * np.array([0.1, 9.0, 0.2, 4.0])
    kept = join_vectors(spread.astype(np.float32), [], replace(CONFIG, text_dimensions=2))
    centred = spread - spread.mean(axis=0)
    cosine = np.abs(np.corrcoef(kept[:, 0], centred[:, 1] / np.linalg.norm(centred[:, [1, 3]], axis=1))[0, 1])
    assert cosine > 0.99
    whole = join_vectors(_embeddings(), [], replace(CONFIG, text_dimensions=0))
    assert whole.shape == (12, 6)


def test_items_with_one_text_get_codes_of_their_own() -> None:
    codes = build_codes(np.ones((10, 6), np.float32), [], CONFIG)
    assert len(np.unique(codes.codes, axis=0)) == 10
    assert codes.collisions == codes.twins == 9
    assert codes.moved > 0


def test_one_item() -> None:
    codes = build_codes(_embeddings(1), [[0]], CONFIG)
    assert codes.codes.tolist() == [[0, 0]]
    assert math.isnan(codes.likeness.random)
    assert codes.items_per_first_code == 1.0
    index = code_index_of(codes, [ItemId("the only one")])
    assert (index.num_items, tuple(index.sizes)) == (1, (4, 4))


def test_the_same_seed_gives_the_same_codes_and_another_one_others() -> None:
    def codes(seed: int) -> list[list[int]]:
        config = replace(CONFIG, codes=replace(CONFIG.codes, seed=seed))
        return build_codes(_embeddings(), [[0, 1], [2, 3, 4]], config).codes.tolist()

    assert codes(0) == codes(0)
    assert len({str(codes(seed)) for seed in range(4)}) > 1


def test_levels_are_told_as_they_are_done() -> None:
    told: list[int] = []
    build_codes(_embeddings(), [], CONFIG, told.append)
    assert told == [1, 2]


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, text_dimensions=-1),
        replace(CONFIG, collaborative_weight=-0.5),
        replace(CONFIG, window=0),
        replace(CONFIG, collaborative_dimensions=0),
        replace(CONFIG, codes=CodeConfig(levels=2, size=3)),
    ],
)
def test_settings_that_cannot_be(config: BuildConfig) -> None:
    with pytest.raises(ConfigError):
        build_codes(_embeddings(), [[0, 1]], config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_numbers(value: float) -> None:
    broken = _embeddings()
    broken[3, 2] = value
    with pytest.raises(DataError, match="not finite"):
        build_codes(broken, [], CONFIG)
