"""What training a ranker is told: what to learn, from what, for how long.

Knows nothing of data or networks, and imports nothing that takes time, because the command line is made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from rcllm.annotated import Ge, Gt, Interval, MinLen, Opt
from rcllm.core.requests import Mask, Negatives, Readout
from rcllm.errors import ConfigError
from rcllm.fields import check

_LEARN, _DATA, _TEACH = "What to learn", "From what", "From a teacher"


@dataclass(frozen=True, slots=True)
class ExampleConfig:
    """The shape of the prompts that are learnt from."""

    num_candidates: Annotated[int, Ge(2), Opt("Candidates in a prompt.", name="--candidates", panel=_DATA)] = 20
    # before a target
    num_history: Annotated[int, Ge(1), Opt("Most events in a prompt.", name="--history", panel=_DATA)] = 10
    min_history: Annotated[int, Ge(1)] = 2
    targets_per_user: Annotated[int, Ge(1)] = 4
    prompts_per_batch: Annotated[int, Ge(1)] = 16
    negatives: Annotated[
        tuple[Negatives, ...],
        MinLen(1),
        Opt("uniform, popularity, retrieved; may repeat: taken in turns.", metavar="KIND", panel=_DATA),
    ] = ("uniform", "popularity")
    # candidates that a prompt takes from the other prompts of its batch, instead of drawing its own
    borrowed: Annotated[int, Ge(0)] = 0

    @property
    def least_history(self) -> int:
        """Events before a target, at least: `min_history`, or all that a prompt shows where that is fewer."""
        return min(self.min_history, self.num_history)


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """What to learn, from what, and for how long."""

    mask: Annotated[
        Mask,
        Opt(
            "causal: an ordinary ranker. blocks: items and events see the instruction alone, so that reusing their KV "
            "is exact.",
            panel=_LEARN,
        ),
    ] = "causal"
    readout: Annotated[Readout, Opt("What the loss reads.", metavar="pointwise|label", panel=_LEARN)] = "pointwise"
    rank: Annotated[int, Ge(1), Opt("Rank of the adapter.", panel=_LEARN)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    learning_rate: Annotated[float, Gt(0), Opt("The highest; it rises, then falls.", panel=_LEARN)] = 1e-3
    losses: Annotated[int, Ge(1), Opt("Prompts to learn from, at most.", panel=_LEARN)] = 6000
    # over all runs; the learning rate falls towards whichever end is nearer
    minutes: Annotated[float, Gt(0), Opt("Stop after this much training.", panel=_LEARN)] = math.inf
    warm_up: Annotated[float, Interval(ge=0, le=1)] = 0.05  # share of the training in which the learning rate rises
    clip: Annotated[float, Gt(0)] = 1.0  # largest norm of a gradient
    evaluate_every: Annotated[int, Ge(1), Opt("Losses between two validations.")] = 480
    validation_requests: Annotated[int, Ge(1), Opt("Most requests of validation users that decide when to stop.")] = 100
    patience: Annotated[int, Ge(1)] = 8  # evaluations without a better validation loss before it stops early
    # with a teacher alone
    temperature: Annotated[
        float, Gt(0), Opt("Divides scores of teacher and student; higher: small differences count more.", panel=_TEACH)
    ] = 1.0
    labels: Annotated[
        float,
        Interval(ge=0, le=1),
        Opt("Share of the loss that what users chose decides, beside the teacher; 0 needs no labels.", panel=_TEACH),
    ] = 0.0
    seed: Annotated[int, Ge(0), Opt()] = 0
    examples: ExampleConfig = field(default_factory=ExampleConfig)


TEMPLATES: dict[Mask, str] = {"causal": "titles", "blocks": "echo"}  # that each mask learns well with


def examples_for(mask: Mask) -> ExampleConfig:
    """Batches that suit the mask: under `blocks` candidates are shared, so most are borrowed from other prompts."""
    if mask == "blocks":
        return ExampleConfig(
            num_candidates=9,
            num_history=8,
            targets_per_user=3,
            prompts_per_batch=12,
            negatives=("uniform",),
            borrowed=6,
        )
    return ExampleConfig(num_candidates=6, prompts_per_batch=16)


def check_config(config: TuneConfig) -> None:
    """Raises ConfigError."""
    check(config)
    check_examples(config.examples)
    if config.readout == "likelihood":
        raise ConfigError("likelihood needs no tuning: tune the read-out label or pointwise")


def check_examples(config: ExampleConfig) -> None:
    """Raises ConfigError."""
    check(config)
    if config.borrowed >= config.num_candidates - 1:
        raise ConfigError(
            f"expected at least 2 candidates of which at least one is drawn, got {config.num_candidates} with "
            f"{config.borrowed} borrowed"
        )
