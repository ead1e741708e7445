"""NaN and infinity are no settings: every offline job refuses them before it computes anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("rcllm.annotated", reason="needs the one rule for checking values")

from rcllm.core.decoding import Speculation
from rcllm.describe import job
from rcllm.errors import ConfigError
from rcllm.sid.build import BuildConfig
from rcllm.sid.network import NetworkConfig
from rcllm.sid.sequences import SequenceConfig
from rcllm.sid.train import TrainConfig
from rcllm.tune import train as tune

_CHECKS: dict[str, Callable[[float], object]] = {
    "sid train, learning_rate": lambda x: replace(TrainConfig(), learning_rate=x).check(),
    "sid train, clip": lambda x: replace(TrainConfig(), clip=x).check(),
    "sid train, weight_decay": lambda x: replace(TrainConfig(), weight_decay=x).check(),
    "sid train, dropout": lambda x: replace(TrainConfig(), network=NetworkConfig(dropout=x)).check(),
    "sid train, skip": lambda x: replace(TrainConfig(), sequences=SequenceConfig(skip=x)).check(),
    "sid train, shuffle": lambda x: replace(TrainConfig(), sequences=SequenceConfig(shuffle=x)).check(),
    "sid build, collaborative_weight": lambda x: BuildConfig(collaborative_weight=x).check(),
    "tune, learning_rate": lambda x: tune.check_config(tune.TuneConfig(learning_rate=x)),
    "tune, alpha": lambda x: tune.check_config(tune.TuneConfig(alpha=x)),
    "tune, warm_up": lambda x: tune.check_config(tune.TuneConfig(warm_up=x)),
    "tune, clip": lambda x: tune.check_config(tune.TuneConfig(clip=x)),
    "describe, temperature": lambda x: job.check_options(job.DescribeOptions(temperature=x)),
    "describe, top_p": lambda x: job.check_options(job.DescribeOptions(top_p=x)),
    "describe, p": lambda x: job.check_options(job.DescribeOptions(speculation=Speculation("relaxed", 2, x))),
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
        lambda x: tune.check_config(tune.TuneConfig(minutes=x)),
    ):
        check(math.inf)
        with pytest.raises(ConfigError):
            check(minutes)
