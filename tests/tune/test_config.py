"""Settings of a training: what suits a mask, and what is refused before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rcllm.errors import ConfigError
from rcllm.plain_json import as_json
from rcllm.prompt.template import Template
from rcllm.tune.config import TEMPLATES, ExampleConfig, TuneConfig, check_config, check_examples, examples_for


@pytest.mark.parametrize("mask", ["causal", "blocks"])
def test_what_suits_a_mask_passes_its_own_check(mask: str) -> None:
    config = TuneConfig(mask=mask, examples=examples_for(mask))  # type: ignore[arg-type]
    check_config(config)
    assert not Template.load(TEMPLATES[mask]).open  # type: ignore[index]


def test_under_the_mask_blocks_most_candidates_are_borrowed() -> None:
    causal, blocks = examples_for("causal"), examples_for("blocks")
    assert causal.borrowed == 0
    assert blocks.borrowed > blocks.num_candidates // 2
    assert blocks.borrowed < blocks.num_candidates - 1, "one is drawn for the prompt itself"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"warm_up": 1.5}, "warm_up must be at most 1, got 1.5"),
        ({"clip": -1.0}, "clip must be above 0, got -1"),
        ({"losses": 0}, "losses must be at least 1, got 0"),
        ({"readout": "likelihood"}, "likelihood needs no tuning"),
        ({"mask": "none"}, "mask must be one of causal, blocks, got 'none'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(replace(TuneConfig(), **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_candidates": 4, "borrowed": 3}, "expected at least 2 candidates of which at least one is drawn"),
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"num_history": 0}, "num_history must be at least 1, got 0"),
        ({"negatives": ()}, "negatives must be a list of at least 1"),
        ({"negatives": ("hard",)}, "must be one of uniform, popularity, retrieved"),
    ],
)
def test_prompts_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_examples(replace(ExampleConfig(), **change))  # type: ignore[arg-type]


def test_no_limit_of_time_is_written_as_null() -> None:
    """A checkpoint holds the settings as JSON, which has no word for infinity."""
    assert as_json(TuneConfig())["minutes"] is None
    assert as_json(TuneConfig(minutes=3.0))["minutes"] == 3.0
    assert as_json(TuneConfig())["examples"]["negatives"] == ["uniform", "popularity"]
