"""What `rcllm calibrate` found for one model and template, and what follows from it: which reuse may be used.

Pure: files and decisions, no engine and no torch. Invariant: a rung that was not measured, or that was measured for
another model, template, option or context, never passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rcllm.config import as_json
from rcllm.core.ranking import Level, RankOptions
from rcllm.durable import write
from rcllm.errors import ConfigError, DataError, UncalibratedError
from rcllm.fidelity.intervals import Interval
from rcllm.fidelity.records import Configuration
from rcllm.fidelity.summary import Summary, Timing
from rcllm.plain_json import to_json
from rcllm.schedule.admission import Admitted, Identity, exactly, is_exact

VERSION = 1
Cost = Literal["ttft", "flops"]


@dataclass(frozen=True, slots=True)
class Target:
    """How close to full recompute is close enough, and what cheap means."""

    ndcg10_delta: float = -0.01  # the interval of NDCG@10 minus full recompute's must lie above it
    tau: float = 0.9  # mean Kendall τ with full recompute, at least
    cost: Cost = "ttft"  # `flops` where times were not measured
    min_requests: int = 30  # with fewer, an interval says little

    def __post_init__(self) -> None:
        if self.cost not in get_args(Cost) or not -1.0 <= self.tau <= 1.0:
            raise ConfigError(f"expected cost ttft or flops and tau from -1 to 1, got {self.cost!r} and {self.tau}")

    def failures(self, summary: Summary) -> tuple[str, ...]:
        """Why a configuration does not pass; empty where it does. What is not known does not pass."""
        delta, tau = summary.deltas["ndcg10"], summary.measures["tau"]
        failed = []
        if summary.num_requests < self.min_requests:
            failed.append(f"{summary.num_requests} requests, fewer than {self.min_requests}")
        if math.isnan(delta.low):
            failed.append("NDCG@10 is not known: the requests name no positive")
        elif delta.low <= self.ndcg10_delta:
            failed.append(f"NDCG@10 {delta.low:+.4f} at worst, not above {self.ndcg10_delta:+}")
        if not tau.mean >= self.tau:
            failed.append(f"Kendall τ {tau.mean:.3f}, below {self.tau}")
        return tuple(failed)


@dataclass(frozen=True, slots=True)
class Rung:
    """One configuration and what was measured of it."""

    configuration: Configuration
    summary: Summary

    def cost(self, kind: Cost) -> float:
        """Milliseconds, or FLOPs where there is no time or FLOPs are asked for."""
        timing = self.summary.timing
        return timing.ttft_ms if kind == "ttft" and timing is not None else self.summary.flops


@dataclass(frozen=True, slots=True)
class Calibration:
    """The content of fidelity.json."""

    identity: Identity
    hardware: Mapping[str, Any]  # what times were measured on
    dataset: str
    seed: int
    num_requests: int
    rungs: tuple[Rung, ...]
    target: Target = Target()  # what must be met to pass; the same figures may be judged by another one
    recommended: Configuration | None = None  # the cheapest rung that passes it, of the prompts that rank best
    notes: tuple[str, ...] = ()  # what was left out, and why

    def check(self, identity: Identity) -> None:
        """Raises ConfigError where this was measured for another model or template."""
        if found := identity.differences(self.identity):
            raise ConfigError(
                f"the calibration does not belong to this engine, which has {'; '.join(found)}. Measure it again with "
                "`rcllm calibrate`, or give the --fidelity file of this model and template"
            )

    def rungs_of(self, context: str, options: RankOptions) -> list[Rung]:
        """What was measured of these options at any approximate level."""
        wanted = Configuration.of(context, options).setting
        return [rung for rung in self.rungs if rung.configuration.setting == wanted]

    def save(self, path: Path) -> None:
        """Writes JSON; the file is whole or not there. Raises DataError."""
        value = {"version": VERSION, **asdict(self)}
        value["rungs"] = [rung.configuration.to_json() | summary_to_json(rung.summary) for rung in self.rungs]
        value["recommended"] = self.recommended.to_json() if self.recommended else None
        try:
            write(path, to_json(value, indent=1).encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises DataError for a file that is no calibration, or is of another version of the format."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if (version := value.pop("version")) != VERSION:
                raise DataError(f"{path}: format version {version}, expected {VERSION}; run `rcllm calibrate` again")
            rungs = tuple(
                Rung(Configuration.from_json(rung, str(path)), _summary_from_json(rung)) for rung in value.pop("rungs")
            )
            best = value.pop("recommended")
            return cls(
                identity=Identity(**value.pop("identity")),
                rungs=rungs,
                target=Target(**value.pop("target")),
                recommended=Configuration.from_json(best, str(path)) if best else None,
                notes=tuple(value.pop("notes")),
                **value,
            )
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}; `rcllm calibrate` makes one") from error
        except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
            raise DataError(f"{path}: expected what `rcllm calibrate` writes: {error!r}") from error


def passing(rungs: Sequence[Rung], target: Target) -> list[Rung]:
    """Those that pass, cheapest first: by FLOPs where not all were timed. Ties: the closest to full recompute first."""
    found = [rung for rung in rungs if not target.failures(rung.summary)]
    timed = target.cost == "ttft" and all(rung.summary.timing is not None for rung in found)
    kind: Cost = "ttft" if timed else "flops"
    return sorted(found, key=lambda rung: (rung.cost(kind), -rung.summary.measures["tau"].mean))


def summary_to_json(summary: Summary) -> dict[str, Any]:
    """NaN becomes null: JSON has no other word for a figure that is not there."""
    return as_json(summary)


def _summary_from_json(value: Mapping[str, Any]) -> Summary:
    timing = value["timing"]
    return Summary(
        num_requests=value["num_requests"],
        measures={name: _interval(found) for name, found in value["measures"].items()},
        deltas={name: _interval(found) for name, found in value["deltas"].items()},
        prompt_tokens=value["prompt_tokens"],
        fresh_tokens=value["fresh_tokens"],
        flops=value["flops"],
        flops_saved=value["flops_saved"],
        timing=None if timing is None else Timing(**_numbers(timing)),
    )


def _interval(value: Mapping[str, Any]) -> Interval:
    return Interval(**_numbers(value))


def _numbers(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if number is None else number for name, number in value.items()}


@dataclass(frozen=True, slots=True)
class Calibrated:
    """An Admission that allows what was measured and passes; without a calibration, only what is exact.

    Make one with `Calibrated.of`, which refuses a calibration of another model.
    """

    calibration: Calibration | None
    identity: Identity
    context: str
    target: Target = Target()
    allow_uncalibrated: bool = False  # admit every level as asked; `auto` still means what passes

    @classmethod
    def of(
        cls,
        calibration: Calibration | None,
        identity: Identity,
        context: str,
        target: Target | None = None,
        *,
        allow_uncalibrated: bool = False,
    ) -> Calibrated:
        """`target`: None for the calibration's own. Raises ConfigError for one of another model or template."""
        if calibration is not None:
            calibration.check(identity)
            target = target or calibration.target
        return cls(calibration, identity, context, target or Target(), allow_uncalibrated)

    def admit(self, options: RankOptions) -> Admitted:
        level = options.level
        if level.name == "auto":
            return self._cheapest(options)
        if is_exact(options, self.identity.mask) or self.allow_uncalibrated:
            return Admitted(options)
        rungs = self._rungs(options)
        asked = Configuration.of(self.context, options)
        rung = next((rung for rung in rungs if rung.configuration == asked), None)
        if rung is None:
            known = ", ".join(dict.fromkeys(rung.configuration.level_name for rung in rungs))
            raise UncalibratedError(self._refusal(asked, f"measured there were {known}" if known else self._nothing()))
        if failed := self.target.failures(rung.summary):
            raise UncalibratedError(self._refusal(asked, f"it was measured and does not pass: {'; '.join(failed)}"))
        return Admitted(options, (f"level {level}: {self._measured(rung)}",))

    def ladder(self, options: RankOptions) -> tuple[Level, ...]:
        """The levels that pass, cheapest first, then `exact`: what a guard may step along."""
        passed = [rung.configuration.options.level for rung in passing(self._rungs(options), self.target)]
        return (*dict.fromkeys(passed), Level("exact"))

    def _cheapest(self, options: RankOptions) -> Admitted:
        rungs = self._rungs(options)
        passed = [] if self.identity.mask == "blocks" else passing(rungs, self.target)
        if not passed:
            none_passes = f"for none of {len(rungs)} calibrated levels passes the target"
            why = none_passes if rungs else f"for {self._nothing()}; `rcllm calibrate` measures it"
            return exactly(options, self.identity.mask, why)
        rung, found = passed[0], passed[0].configuration.options
        return Admitted(
            replace(options, level=found.level, selection=found.selection),
            (f"level auto: {found.level}, the cheapest that passes: {self._measured(rung)}",),
        )

    def _rungs(self, options: RankOptions) -> list[Rung]:
        if self.calibration is None:
            return []
        same_pool = self.calibration.identity.semantic_pool == self.identity.semantic_pool
        return self.calibration.rungs_of(self.context, options) if options.history != "semantic" or same_pool else []

    def _nothing(self) -> str:
        if self.calibration is None:
            return "there is no calibration of this model and template"
        return "nothing was calibrated for these options and this canonical context"

    def _refusal(self, asked: Configuration, why: str) -> str:
        level = asked.options.level
        return (
            f"reuse level {level} is not calibrated for {asked.prompt_name}: {why}. Measure it with "
            f'`rcllm calibrate --levels "{level}" …`, ask for level auto or exact, or use it all the same with '
            "--allow-uncalibrated"
        )

    def _measured(self, rung: Rung) -> str:
        assert self.calibration is not None
        summary = rung.summary
        return (
            f"NDCG@10 {_signed(summary.deltas['ndcg10'])} against full recompute, Kendall τ "
            f"{summary.measures['tau'].mean:.3f}, over {summary.num_requests:,} requests of {self.calibration.dataset}"
        )


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
