"""Settings of codes and decoders: sizes that follow a catalogue, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rcllm.errors import ConfigError
from rcllm.sid.config import BuildConfig, CodeConfig, NetworkConfig, SequenceConfig, TrainConfig
from rcllm.sid.quantise import enough_levels, fitting, fitting_size


@pytest.mark.parametrize(
    ("num_items", "levels", "size"),
    [(2, 2, 2), (50, 2, 16), (200, 2, 32), (3_000, 2, 128), (16_384, 2, 256), (16_385, 3, 64), (50_000, 3, 64)],
)
def test_shapes_of_catalogues(num_items: int, levels: int, size: int) -> None:
    shape = fitting(num_items, None, None)
    assert (shape.levels, shape.size) == (levels, size)


@pytest.mark.parametrize("num_items", [1, 2, 3, 5, 17, 200, 999, 4_096, 16_384, 16_385, 250_000, 10**6, 10**8])
def test_every_catalogue_fits_and_shares_its_first_codes(num_items: int) -> None:
    shape = fitting(num_items, None, None)
    assert shape.size**shape.levels >= num_items
    assert 2 <= shape.levels <= 6
    assert 2 <= shape.size <= 256
    assert num_items < 8 or num_items / shape.size >= 2, "at least two items to a first-level code"


def test_levels_and_size_follow_each_other() -> None:
    assert fitting(3_000, 3, None).size < fitting(3_000, 2, None).size
    assert fitting(3_000, None, 16).levels > fitting(3_000, None, 128).levels
    assert enough_levels(10**6, 256) == 3
    assert fitting_size(10**6, 3) == 256


def test_a_shape_that_is_too_small_says_what_to_raise() -> None:
    with pytest.raises(ConfigError, match="2 levels of 16 codes tell 256 items apart, the catalogue has 257: raise"):
        fitting(257, 2, 16)
    assert fitting(256, 2, 16).size == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CodeConfig(levels=1), "levels must be at least 2, got 1"),
        (CodeConfig(levels=7), "levels must be at most 6, got 7"),
        (CodeConfig(size=1), "size must be at least 2, got 1"),
    ],
)
def test_codes_that_cannot_be(config: CodeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BuildConfig(collaborative_weight=-1.0), "collaborative_weight must be at least 0, got -1"),
        (BuildConfig(collaborative_weight=math.nan), "collaborative_weight must be a finite number"),
        (BuildConfig(window=0), "window must be at least 1, got 0"),
        (NetworkConfig(head_dim=48), "head_dim must be a multiple of 32, got 48"),
        (NetworkConfig(num_heads=4, num_kv_heads=3), "expected num_heads a multiple of num_kv_heads"),
        (NetworkConfig(dropout=1.0), "dropout must be below 1, got 1"),
        (SequenceConfig(skip=1.0), "skip must be below 1, got 1"),
        (SequenceConfig(shuffle=1.1), "shuffle must be at most 1, got 1.1"),
        (TrainConfig(learning_rate=0.0), "learning_rate must be above 0, got 0"),
        (TrainConfig(minutes=0.0), "minutes must be above 0, got 0"),
        (TrainConfig(network=NetworkConfig(num_heads=3, num_kv_heads=2)), "multiple of num_kv_heads"),
    ],
)
def test_settings_that_cannot_be(
    config: BuildConfig | NetworkConfig | SequenceConfig | TrainConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_the_written_configuration_is_that_of_the_network() -> None:
    config = replace(NetworkConfig(), hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2)
    written = config.hf_config(vocab_size=100, max_positions=50)
    assert (written["hidden_size"], written["num_hidden_layers"], written["num_attention_heads"]) == (64, 2, 2)
    assert (written["vocab_size"], written["max_position_embeddings"], written["model_type"]) == (100, 50, "qwen3")
