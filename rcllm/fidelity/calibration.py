"""What `rcllm calibrate` found for one model and template, and what follows from it: which reuse may be used.

Pure: files and decisions, no engine and no torch. Invariant: a rung that was not measured, or that was measured for
another model, template, option or context, never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rcllm.core.ranking import Level, RankOptions
from rcllm.durable import write
from rcllm.errors import ConfigError, DataError, UncalibratedError
from rcllm.fidelity.intervals import Interval
from rcllm.fidelity.records import Configuration
from rcllm.fidelity.summary import Summary
from rcllm.fidelity.target import Cost, Target
from rcllm.fields import parse
from rcllm.plain_json import as_json, read_object, to_json
from rcllm.schedule.admission import Admitted, Identity, exact_blocks, exactly, is_exact

VERSION = 1


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
    target: Target = field(
        default_factory=Target
    )  # what must be met to pass; the same figures may be judged by another one
    recommended: Configuration | None = None  # the cheapest rung that passes it, of the prompts that rank best
    notes: tuple[str, ...] = ()  # what was left out, and why
    precision: Rung | None = (
        None  # full recompute as measured here, against that in fp32 with full weights; None: is it
    )

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
        value["rungs"] = [_flat(rung) for rung in self.rungs]
        value["precision"] = _flat(self.precision) if self.precision else None
        value["recommended"] = self.recommended.to_json() if self.recommended else None
        try:
            write(path, to_json(value, indent=1).encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises DataError for a file that is no calibration, or is of another version of the format."""
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}; `rcllm calibrate` makes one") from error
        value = read_object(text, f"{path}: expected what `rcllm calibrate` writes", DataError)
        if (version := value.pop("version", None)) != VERSION:
            raise DataError(f"{path}: format version {version}, expected {VERSION}; run `rcllm calibrate` again")
        where = f"{path}: expected what `rcllm calibrate` writes"
        return parse(cls, value, where, error=DataError, readers={Rung: _read_rung})


def is_calibration(path: Path) -> bool:
    """Whether `path` is a file of `rcllm calibrate`, of any version."""
    try:
        value = read_object(path.read_bytes(), "", DataError)
    except (OSError, DataError):
        return False
    return {"version", "rungs"} <= value.keys()


def passing(rungs: Sequence[Rung], target: Target) -> list[Rung]:
    """Those that pass, cheapest first: by FLOPs where not all were timed. Ties: the closest to full recompute first."""
    found = [rung for rung in rungs if not target.failures(rung.summary)]
    timed = target.cost == "ttft" and all(rung.summary.timing is not None for rung in found)
    kind: Cost = "ttft" if timed else "flops"
    return sorted(found, key=lambda rung: (rung.cost(kind), -rung.summary.measures["tau"].mean))


def _flat(rung: Rung) -> dict[str, Any]:
    return rung.configuration.to_json() | as_json(rung.summary)


def _read_rung(value: Any) -> Rung:
    """A rung lies flat in the file: the configuration's two keys beside those of the summary."""
    if not isinstance(value, dict):
        raise DataError(f"expected an object, got {value!r}")
    names = [field.name for field in fields(Configuration)]
    summary = {name: inner for name, inner in value.items() if name not in names}
    configuration = {name: inner for name, inner in value.items() if name in names}
    return Rung(Configuration.from_json(configuration, ""), parse(Summary, summary, readers={float: _read_figure}))


def _read_figure(value: Any) -> float:
    """A figure that is not there is null in the file and NaN here."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"expected a number or null, got {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """An Admission that allows what was measured and passes; without a calibration, only what is exact.

    Make one with `Calibrated.of`, which refuses a calibration of another model.
    """

    calibration: Calibration | None
    identity: Identity
    context: str
    target: Target = field(default_factory=Target)
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

    def cheaper(self, options: RankOptions) -> tuple[Admitted, ...]:
        """The rungs that pass and are cheaper than `options`; where those were not measured, all that pass."""
        if self.identity.mask == "blocks" and options.history != "semantic":
            return exact_blocks(options, self.identity.mask)
        rungs = self._rungs(replace(options, level=Level("auto")))  # exact levels have no setting of their own
        passed, asked = passing(rungs, self.target), Configuration.of(self.context, options)
        place = next((i for i, rung in enumerate(passed) if rung.configuration == asked), len(passed))
        return tuple(
            Admitted(
                replace(options, level=found.level, selection=found.selection),
                (f"level {found.level} instead of {options.level}: {self._measured(rung)}",),
            )
            for rung in reversed(passed[:place])
            for found in [rung.configuration.options]
        )

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
