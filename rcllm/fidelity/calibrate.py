"""The search for how far reuse may go: coarse to fine over levels, layouts, label places, read-outs, contexts.

Knows nothing of terminals or of where results go. Invariant: every figure of the Calibration comes from records of the
requests given; with the same records kept, the search takes the same decisions and computes nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, product
from typing import TypeVar, get_args

from rcllm.config import check_options, context_samples
from rcllm.core.ranking import LabelPlace, Layout, Level, RankOptions, RankRequest, Readout, Selection, order
from rcllm.data.requests import named_items
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError, RequestError
from rcllm.fidelity.calibration import Calibration, Rung, passing
from rcllm.fidelity.evaluate import evaluate, evaluate_timed, with_context
from rcllm.fidelity.measures import ndcg
from rcllm.fidelity.pareto import fronts
from rcllm.fidelity.records import Configuration, Record, RecordFile
from rcllm.fidelity.spread import Ahead
from rcllm.fidelity.summary import Summary, compare, summarise, timing
from rcllm.fidelity.target import CONTEXTS, LEVELS, Target
from rcllm.model.ceilings import describe_hardware

K = TypeVar("K")

_FEWEST = 16  # requests of the first round
_CONTEXTS_KEPT = 2  # per read-out, layout and label place, after the first round
_FINALISTS = 6  # rungs per read-out, layout and label place that are measured on all requests
Records = dict[Configuration, list[Record]]


@dataclass(frozen=True, slots=True)
class Space:
    """What is tried: not the whole cross, see `calibrate`."""

    levels: tuple[Level, ...] = tuple(map(Level.parse, LEVELS))  # cheapest first: the first one probes the contexts
    readouts: tuple[Readout, ...] = get_args(Readout)
    layouts: tuple[Layout, ...] = get_args(Layout)
    label_places: tuple[LabelPlace, ...] = get_args(LabelPlace)
    contexts: tuple[str, ...] = CONTEXTS
    selections: tuple[Selection, ...] = (Selection(),)  # of level corrected
    base: RankOptions = field(default_factory=RankOptions)  # what is the same for all: history, bias, parallel

    def settings(self) -> list[Configuration]:
        """Every combination that means something, once, without its level."""
        found: dict[Configuration, None] = {}
        for readout, layout, place, context in product(self.readouts, self.layouts, self.label_places, self.contexts):
            bias = self.base.bias if readout == "label" else "none"
            options = replace(self.base, readout=readout, layout=layout, label_place=place, bias=bias)
            try:
                check_options(options)
            except ConfigError:  # a layout that the read-out cannot have
                continue
            found[Configuration.of(context, options).setting] = None
        return list(found)

    def check(self) -> None:
        """Raises ConfigError for what cannot be tried."""
        settings = self.settings()
        if not settings or not self.levels or not self.selections:
            raise ConfigError("there is nothing to try: name one or more levels, read-outs, layouts, and so on")
        if self.base.bias == "running_mean":
            raise ConfigError(
                "bias running_mean makes scores depend on the requests before; calibrate with content_free"
            )
        for rung in self.rungs(settings[0]):
            if rung.options.level.name in ("full", "exact", "auto"):
                raise ConfigError(f"level {rung.options.level} is not tried: full and exact are always there beside")
            check_options(rung.options)
        for context in self.contexts:
            context_samples(context)

    def rungs(self, setting: Configuration) -> list[Configuration]:
        """A setting at every level, `corrected` under every selection."""
        chosen = [
            Configuration.of(setting.context, replace(setting.options, level=level, selection=selection))
            for level, selection in product(self.levels, self.selections)
        ]
        return list(dict.fromkeys(chosen))


@dataclass(frozen=True, slots=True)
class CalibrateProgress:
    """How far one round of the search is, for a progress bar."""

    stage: str
    done: int  # (configuration, request) pairs
    total: int
    num_configurations: int


@dataclass(frozen=True, slots=True)
class Trial:
    """The requests that a calibration is measured on, and how."""

    requests: Sequence[RankRequest]
    samples: Sequence[RankRequest]  # of other users, for the contexts `typical` and `mean(n)`
    dataset: str
    seed: int = 0
    num_timed: int = 10  # requests whose time is measured; 0: none
    batch: int = 8


def calibrate(
    engine: Engine,
    trial: Trial,
    space: Space,
    target: Target,
    kept: RecordFile,
    on_progress: Callable[[CalibrateProgress], None] = lambda now: None,
    ahead: Ahead | None = None,
) -> Calibration:
    """Searches `space` in three rounds, each on more requests and fewer configurations than the one before.

    1. A sixteenth of the requests: all contexts, at the first level; per read-out, layout and label place the two with
       the highest Kendall τ go on.
    2. A quarter: those at all levels; the Pareto front of FLOPs and τ goes on, then the front behind it, up to six.
    3. All requests; and times, one request at a time.
    After each round, a combination of read-out, layout and label place whose full recompute ranks clearly worse
    (NDCG@10, paired interval) than the best one's is left out. `ahead`: has what is not timed measured by several
    processes. Raises DataError where no request can be asked.
    """
    space.check()
    if engine.config.model.mask == "blocks":  # every level is `blocks` and exact, in the context of its tuning
        space = replace(space, levels=(Level("blocks"),), contexts=(engine.prompter.context_name,))
    return _Search(engine, trial, space, target, kept, on_progress, ahead).run()


def with_precision(
    found: Calibration,
    engine: Engine,
    wide: Engine,
    trial: Trial,
    kept: RecordFile,
    on_progress: Callable[[CalibrateProgress], None] = lambda now: None,
) -> Calibration:
    """The same with what the engine's own dtype and weights cost, beside `wide`, whose are fp32 and full.

    Both recompute the prompts of the recommended setting in full, so that reuse has no part in it.
    """
    full = (found.recommended or found.rungs[0].configuration).full
    requests = [request for request in trial.requests if _is_askable(engine, request, full.options)]
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        on_progress(CalibrateProgress("precision", done, 2 * len(requests), 1))

    narrow, reference = (
        evaluate(each, requests, [full.options], kept, batch=trial.batch, on_records=advance)[full.options]
        for each in (engine, wide)
    )
    return replace(found, precision=Rung(full, summarise(narrow, reference, seed=trial.seed)))


def _is_askable(engine: Engine, request: RankRequest, options: RankOptions) -> bool:
    try:
        engine.prompter.build(replace(request, options=options))
    except RequestError:
        return False
    return True


class _Search:
    def __init__(
        self,
        engine: Engine,
        trial: Trial,
        space: Space,
        target: Target,
        kept: RecordFile,
        on_progress: Callable[[CalibrateProgress], None],
        ahead: Ahead | None,
    ) -> None:
        self._ahead = ahead
        self.engine, self.trial, self.space, self.target, self.kept = engine, trial, space, target, kept
        self.engines = {context: with_context(engine, context, trial.samples) for context in space.contexts}
        self.requests: list[RankRequest] = []
        self.text_notes = _text_notes(engine, trial.requests, space)
        self.notes: list[str] = []  # what was left out
        self._on_progress = on_progress

    def run(self) -> Calibration:
        settings = self._askable(self.space.settings())
        whole = len(self.requests)
        few = min(whole, max(_FEWEST, whole // 16))
        some = min(whole, max(2 * few, whole // 4))
        probes = [self.space.rungs(setting)[0] for setting in settings]
        records = self._round("1/3 contexts", probes, few)
        settings = [best.setting for best in self._best_contexts(self._keep_good_groups(probes, records), records)]
        rungs = [rung for setting in settings for rung in self.space.rungs(setting)]
        records = self._round("2/3 levels", rungs, some)
        rungs = self._finalists(self._keep_good_groups(rungs, records), records)
        records = self._round("3/3 all requests", rungs, whole)
        rungs = self._keep_good_groups(rungs, records)
        return self._calibration(rungs, records, self._times(rungs))

    def _askable(self, settings: list[Configuration]) -> list[Configuration]:
        """Leaves out settings that this template or tokenizer cannot express, and requests that some prompt refuses."""
        shapes = list(dict.fromkeys(setting.full for setting in settings))
        refused: dict[Configuration, str] = {}
        good: list[RankRequest] = []
        for request in self.trial.requests:
            try:
                for shape in [shape for shape in shapes if shape not in refused]:
                    try:
                        self.engine.prompter.build(replace(request, options=shape.options))
                    except ConfigError as error:
                        refused[shape] = str(error)
                good.append(request)
            except RequestError as error:
                self.notes.append(f"request {request.request_id} left out: {error}")
        self.notes += [f"{shape} left out: {why}" for shape, why in refused.items()]
        self.requests, left = good, [setting for setting in settings if setting.full not in refused]
        if not good or not left:
            raise DataError(f"nothing to calibrate on: {'; '.join(self.notes[:3]) or 'there are no requests'}")
        return left

    def _round(self, stage: str, rungs: Sequence[Configuration], count: int) -> Records:
        """Records of the first `count` requests, of `rungs` and of full recompute of the same prompts."""
        wanted = list(dict.fromkeys([*(rung.full for rung in rungs), *rungs]))
        advance = self._progress(f"{stage}, {count} requests", len(wanted) * count, len(wanted))
        records: Records = {}
        for context, some in _grouped(wanted, lambda c: c.context).items():
            engine = self.engines.get(context, self.engine)
            options = {configuration: configuration.options for configuration in some}
            asked, chosen = self.requests[:count], list(options.values())
            if self._ahead is not None:
                self._ahead.run(engine, asked, chosen, advance)
            told = advance if self._ahead is None else _nothing
            found = evaluate(engine, asked, chosen, self.kept, batch=self.trial.batch, on_records=told)
            records |= {configuration: found[chosen] for configuration, chosen in options.items()}
        return records

    def _times(self, rungs: Sequence[Configuration]) -> Records:
        """Timed records of the rungs, of full recompute and of prefix caching, interleaved per context; or none."""
        if not (count := min(self.trial.num_timed, len(self.requests))):
            return {}
        work: list[tuple[Engine, list[Configuration]]] = []
        for context, some in _grouped(rungs, lambda c: c.context).items():
            base = dict.fromkeys(at for rung in some for at in (rung.full, rung.exact))
            work.append((self.engines.get(context, self.engine), [*base, *some]))
        total = sum(len(some) for _, some in work)
        advance = self._progress(f"times, {count} requests", total * count, total)
        records: Records = {}
        for engine, some in work:
            chosen = [configuration.options for configuration in some]
            found = evaluate_timed(engine, self.requests[:count], chosen, self.kept, on_records=advance)
            records |= {configuration: found[configuration.options] for configuration in some}
        return records

    def _keep_good_groups(self, rungs: Sequence[Configuration], records: Records) -> list[Configuration]:
        """Without the groups that rank clearly worse than the best even when everything is recomputed."""
        groups = list(dict.fromkeys(rung.full for rung in rungs))
        best = max(groups, key=lambda full: _ndcg10(records[full]))
        for full in groups:
            gap = compare(records[full], records[best], seed=self.trial.seed)["ndcg10"]
            if gap.high < 0:
                self.notes.append(
                    f"{full} left out after {gap.count} requests: its NDCG@10 is {-gap.mean:.3f} below that of {best}"
                )
                rungs = [rung for rung in rungs if rung.full != full]
        return list(rungs)

    def _best_contexts(self, probes: Sequence[Configuration], records: Records) -> list[Configuration]:
        best: list[Configuration] = []
        for full, some in _grouped(probes, lambda c: c.full).items():
            tau = {probe: self._summary(records, probe, full).measures["tau"].mean for probe in some}
            best += sorted(some, key=lambda probe: -_number(tau[probe]))[:_CONTEXTS_KEPT]
        return best

    def _finalists(self, rungs: Sequence[Configuration], records: Records) -> list[Configuration]:
        best: list[Configuration] = []
        for full, some in _grouped(rungs, lambda c: c.full).items():
            found = {rung: self._summary(records, rung, full) for rung in some}
            points = {rung: (summary.flops, -_number(summary.measures["tau"].mean)) for rung, summary in found.items()}
            best += [rung for front in fronts(points) for rung in front][:_FINALISTS]
        return best

    def _calibration(self, rungs: Sequence[Configuration], records: Records, timed: Records) -> Calibration:
        measured: list[Rung] = []
        for full, some in _grouped(rungs, lambda c: c.full).items():
            exact = full.exact
            if timed:
                summary = self._summary(timed, exact, full)
                measured.append(Rung(exact, self._with_times(summary, exact, timed)))
            for configuration in (full, *some):
                summary = self._summary(records, configuration, full)
                measured.append(Rung(configuration, self._with_times(summary, configuration, timed)))
        return Calibration(
            identity=self.engine.identity,
            hardware=asdict(describe_hardware()),
            dataset=self.trial.dataset,
            seed=self.trial.seed,
            num_requests=len(self.requests),
            rungs=tuple(measured),
            target=self.target,
            recommended=self._recommended(measured, records),
            notes=(*self.text_notes, *self.notes),
        )

    def _recommended(self, measured: Sequence[Rung], records: Records) -> Configuration | None:
        """The cheapest rung that passes, of the group whose full recompute ranks best among those that have one."""
        reusing = [rung for rung in measured if rung.configuration.context]
        passed = passing(reusing, self.target)
        best = max(passed, key=lambda rung: _ndcg10(records[rung.configuration.full]), default=None)  # first: cheapest
        return best.configuration if best else None

    def _summary(self, records: Records, rung: Configuration, full: Configuration) -> Summary:
        return summarise(records[rung], records[full], seed=self.trial.seed)

    def _with_times(self, summary: Summary, configuration: Configuration, timed: Records) -> Summary:
        if not timed:
            return summary
        reference = timed[configuration.full], timed[configuration.exact]
        return replace(summary, timing=timing(timed[configuration], *reference))

    def _progress(self, stage: str, total: int, num_configurations: int) -> Callable[[int], None]:
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            self._on_progress(CalibrateProgress(stage, done, total, num_configurations))

        advance(0)
        return advance


def _nothing(more: int) -> None:
    """Records that were told of when they came."""


def _text_notes(engine: Engine, requests: Sequence[RankRequest], space: Space) -> list[str]:
    """What is cut, and how the ranker is asked otherwise than it learnt."""
    prompter = engine.prompter
    cut = prompter.text_counts(named_items(requests)).told(prompter.template)
    of_options = [prompter.learnt.option_differences(setting.options) for setting in space.settings()]
    return list(dict.fromkeys([*prompter.notes, *chain.from_iterable(of_options), *([cut] if cut else [])]))


def _grouped(rungs: Iterable[Configuration], by: Callable[[Configuration], K]) -> dict[K, list[Configuration]]:
    groups: dict[K, list[Configuration]] = {}
    for rung in rungs:
        groups.setdefault(by(rung), []).append(rung)
    return groups


def _ndcg10(records: Sequence[Record]) -> float:
    """Mean over the requests that name a positive; lowest where none does."""
    known = [ndcg(order(record.scores), record.positive, 10) for record in records if record.positive is not None]
    return sum(known) / len(known) if known else -1.0


def _number(value: float) -> float:
    """What is not defined comes last."""
    return -math.inf if math.isnan(value) else value
