"""NaN and infinity are no settings: every offline job refuses them before it computes anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from rcllm.core.decoding import Speculation
from rcllm.describe.options import DescribeOptions, check_options
from rcllm.errors import ConfigError
from rcllm.sid.config import BuildConfig, NetworkConfig, SequenceConfig, TrainConfig
from rcllm.tune.config import TuneConfig, check_config

_CHECKS: dict[str, Callable[[float], object]] = {
    "sid train, learning_rate": lambda x: replace(TrainConfig(), learning_rate=x).check(),
    "sid train, clip": lambda x: replace(TrainConfig(), clip=x).check(),
    "sid train, weight_decay": lambda x: replace(TrainConfig(), weight_decay=x).check(),
    "sid train, dropout": lambda x: replace(TrainConfig(), network=NetworkConfig(dropout=x)).check(),
    "sid train, skip": lambda x: replace(TrainConfig(), sequences=SequenceConfig(skip=x)).check(),
    "sid train, shuffle": lambda x: replace(TrainConfig(), sequences=SequenceConfig(shuffle=x)).check(),
    "sid build, collaborative_weight": lambda x: BuildConfig(collaborative_weight=x).check(),
    "tune, learning_rate": lambda x: check_config(TuneConfig(learning_rate=x)),
    "tune, alpha": lambda x: check_config(TuneConfig(alpha=x)),
    "tune, warm_up": lambda x: check_config(TuneConfig(warm_up=x)),
    "tune, clip": lambda x: check_config(TuneConfig(clip=x)),
    "describe, temperature": lambda x: check_options(DescribeOptions(temperature=x)),
    "describe, top_p": lambda x: check_options(DescribeOptions(top_p=x)),
    "describe, p": lambda x: check_options(DescribeOptions(speculation=Speculation("relaxed", 2, x))),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", _CHECKS)
def test_no_job_begins_with_a_value_that_is_no_number(name: str, value: float) -> None:
    with pytest.raises(ConfigError):
        _CHECKS[name](value)


@pytest.mark.parametrize("minutes", [math.nan, -math.inf, 0.0])
def test_time_without_end_is_the_only_infinity(minutes: float) -> None:
    for check in (
        lambda x: replace(TrainConfig(), minutes=x).check(),
        lambda x: check_config(TuneConfig(minutes=x)),
    ):
        check(math.inf)
        with pytest.raises(ConfigError):
            check(minutes)
