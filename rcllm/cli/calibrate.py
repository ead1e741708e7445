"""`rcllm calibrate`: how far reuse may go for a model, a template and requests. Knows nothing of how it is found."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rcllm.cache.heap import share_arenas
from rcllm.cli.calibrated import FILE
from rcllm.cli.clustered import check_extra, cluster_of, configured_by
from rcllm.cli.inputs import (
    Inputs,
    Shape,
    check_ranks,
    context_requests,
    load_inputs,
    load_requests,
    make_config,
    make_engine,
)
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import GOES_ON, console, interruptible, progress, say
from rcllm.cli.tables import NOTHING
from rcllm.config import ClusterConfig, Config, PromptConfig, context_samples, nearest, rounds
from rcllm.core.ranking import LabelPlace, Layout, Level, Policy, RankOptions, RankRequest, Readout, Selection
from rcllm.errors import ConfigError, DataError
from rcllm.fidelity.calibrate import CalibrateProgress, Space, Trial, calibrate, with_precision
from rcllm.fidelity.calibration import Calibration, Rung, is_calibration
from rcllm.fidelity.records import Configuration, RecordFile
from rcllm.fidelity.report import write_report
from rcllm.fidelity.spread import Ahead, Evaluating, Over
from rcllm.fidelity.target import CONTEXTS, Target
from rcllm.late import Late
from rcllm.schedule.admission import Identity

if TYPE_CHECKING:
    from rcllm.on_ray import jobs, recipe
else:
    jobs, recipe = Late("rcllm.on_ray.jobs"), Late("rcllm.on_ray.recipe")

_SHOWN_NOTES = 5
_WORD = re.compile(r"[^\s(]+(?:\([^)]*\))?")  # `corrected(0.3, 0.3)` is one word


def calibrate_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    target: Target,
    requests: str | None,
    count: int,
    candidates: int | None,
    history: int | None,
    timed: int,
    seed: int,
    levels: str,
    readouts: str,
    layouts: str,
    label_places: str,
    contexts: str | None,
    policies: str,
    out: Path,
    cluster: str | None,
) -> None:
    """Searches, saves and reports."""
    if cluster is not None:
        check_extra()
        engine_options = configured_by(engine_options, cluster)
    config = make_config(engine_options)
    check_ranks(config.prompt)
    records = out.with_name(f"{out.name}.records.jsonl")
    _check_out(out, records, requests, config, engine_options, item_options)
    inputs = load_inputs(item_options)
    names = _words(contexts) if contexts else _contexts(engine_options.context, inputs)
    space = Space(
        levels=tuple(map(Level.parse, _words(levels))),
        readouts=_all_of("readouts", readouts, get_args(Readout)),
        layouts=_all_of("layouts", layouts, get_args(Layout)),
        label_places=_all_of("label-places", label_places, get_args(LabelPlace)),
        contexts=names,
        selections=tuple(_selection(policy) for policy in _all_of("policies", policies, get_args(Policy))),
        base=config.rank,
    )
    space.check()
    asked = load_requests(requests, inputs, count, Shape(candidates, history, (20, 10)), seed)
    samples = context_requests(max(names, key=context_samples), inputs, asked)
    dataset = inputs.dataset.name if inputs.dataset is not None and requests is None else str(requests)
    trial = Trial(asked, samples, dataset, seed, timed)
    engine = make_engine(config, inputs, asked, asked=[setting.options for setting in space.settings()])
    several = _several(cluster, config, item_options, samples)
    with interruptible(GOES_ON), RecordFile(records) as kept, several as over, _bars() as show:
        found = calibrate(engine, trial, space, target, kept, show, None if over is None else Ahead(over, kept))
        if rounds(engine.config.model):
            full = replace(config.model, dtype="fp32", weights="full")
            wide = make_engine(replace(config, model=full), inputs, asked, asked=[])
            found = with_precision(found, engine, wide, trial, kept, show)
    found.save(out)
    _report(found, out)
    console().print(_table(found))
    _conclude(found, out)


@dataclass(frozen=True, slots=True)
class Process:
    """One of several that measure: what it needs to make its own engine, at another place. It is pickled."""

    config: Config
    items: ItemOptions
    samples: Sequence[RankRequest]
    cluster: ClusterConfig

    def __call__(self, number: int) -> Evaluating:
        share_arenas()
        config = recipe.for_node(self.config, self.cluster, number)
        return Evaluating(make_engine(config, load_inputs(self.items), self.samples, asked=[]), self.samples)


def _several(
    cluster: str | None, config: Config, items: ItemOptions, samples: Sequence[RankRequest]
) -> AbstractContextManager[Over | None]:
    """Processes that work on parts, while the block runs; None: this one does everything."""
    if cluster is None:
        return nullcontext()
    section = cluster_of(cluster, config)
    process: Any = Process(config, items, samples, section)
    return jobs.processes(process, section)


def _check_out(out: Path, records: Path, *reads: object) -> None:
    """Whether all files can be written and are none of what is read; another calibration alone is replaced.

    Raises ConfigError, DataError.
    """
    if out.suffix in (".html", ".png"):  # as which the report is written beside it
        raise ConfigError(f"--out {out}: expected the name of a .json file, such as {FILE}")
    for path in (out, records, out.with_suffix(".html"), out.with_suffix(".png")):
        check_file(path, *reads, beside=records)
    if out.exists() and not is_calibration(out):
        raise ConfigError(f"--out {out} exists and is no calibration: name another file, or remove it")


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_WORD.findall(text)))


def _all_of(option: str, text: str, known: tuple[str, ...]) -> Any:
    """The words of an option, of which each is one of the values of a Literal."""
    return tuple(_one_of(option, word, known) for word in _words(text))


def _one_of(option: str, word: str, known: tuple[str, ...]) -> Any:
    if word not in known:
        raise ConfigError(f"--{option}: unknown {word!r}; {nearest(word, known)}")
    return word


def _selection(policy: Policy) -> Selection:
    """K difference says nothing in layer 0, where keys depend on their token alone."""
    return Selection(policy, check_layer=1 if policy == "k_difference" else 0)


def _contexts(given: str | None, inputs: Inputs) -> tuple[str, ...]:
    if given is not None:
        return (given,)
    return tuple(name for name in CONTEXTS if inputs.dataset is not None or not context_samples(name))


@contextmanager
def _bars() -> Iterator[Callable[[CalibrateProgress], None]]:
    """A bar per round."""
    with progress("details") as screen:
        tasks: dict[str, Any] = {}

        def show(now: CalibrateProgress) -> None:
            if now.stage not in tasks:
                details = f"{now.num_configurations} configurations"
                tasks[now.stage] = screen.add_task(now.stage, total=now.total, details=details)
            screen.update(tasks[now.stage], completed=now.done)

        yield show


def _report(found: Calibration, out: Path) -> None:
    try:
        write_report(found, out.with_suffix(".html"), out.with_suffix(".png"))
    except (ConfigError, DataError) as error:  # the figures are there all the same
        say(f"there is no report: {error}")


def _table(found: Calibration) -> Table:
    table = Table(
        title=f"{found.num_requests:,} requests of {found.dataset}, against full recompute of the same prompts",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("\nlevel", no_wrap=True)
    table.add_column("prompt,\ncontext of reused blocks")
    for name in ("TTFT\nms", "over\nexact", "FLOPs\nsaved", "NDCG@10\nΔ full", "\n95 %", "Kendall\nτ"):
        table.add_column(name, justify="right")
    table.add_column("\npasses")
    for rung in found.rungs:
        best = rung.configuration == found.recommended
        table.add_row(*_cells(found, rung), style="bold" if best else None)
    return table


def _cells(found: Calibration, rung: Rung) -> list[str | Text]:
    configuration, summary = rung.configuration, rung.summary
    delta, timing = summary.deltas["ndcg10"], summary.timing
    failed = found.target.failures(summary)
    verdict = "" if not configuration.context else "no" if failed else "yes"
    return [
        configuration.level_name,
        Text(configuration.prompt_name),
        _cell(timing.ttft_ms if timing else math.nan, "{:,.0f}"),
        _cell(timing.speedup_exact if timing else math.nan, "{:.1f}×"),
        f"{summary.flops_saved:.0%}",
        _cell(delta.mean, "{:+.4f}"),
        NOTHING if math.isnan(delta.low) else f"{delta.low:+.4f} … {delta.high:+.4f}",
        _cell(summary.measures["tau"].mean, "{:.3f}"),
        verdict,
    ]


def _cell(value: float, form: str) -> str:
    return NOTHING if math.isnan(value) else form.format(value)


def _conclude(found: Calibration, out: Path) -> None:
    """What to do with it."""
    screen = console()
    if found.precision is not None:
        screen.print(Text(_precision(found.precision, found.identity)), soft_wrap=True)
    for note in found.notes[:_SHOWN_NOTES]:
        say(note, "dim")
    if (more := len(found.notes) - _SHOWN_NOTES) > 0:
        say(f"… and {more:,} more, in {out}", "dim")
    if (best := found.recommended) is None:
        screen.print("No approximate level passes the target, so level auto answers exactly (prefix caching).")
        return
    screen.print(Text(f"Recommended: {best}. `rcllm rank` uses it with these options:"))
    screen.print(Text(f"  rcllm rank {' '.join(_options(best, out))} …"), soft_wrap=True)


def _precision(rung: Rung, identity: Identity) -> str:
    """What less than fp32 costs, whatever is reused."""
    delta, tau = rung.summary.deltas["ndcg10"], rung.summary.measures["tau"].mean
    change = "" if math.isnan(delta.low) else f"NDCG@10 {delta.mean:+.4f} ({delta.low:+.4f} … {delta.high:+.4f}), "
    return (
        f"Computing in {identity.dtype} with weights {identity.weights}, against fp32 with full ones, both in full: "
        f"{change}Kendall τ {tau:.3f}"
    )


def _options(best: Configuration, out: Path) -> list[str]:
    """The options of `rcllm rank` that choose this setting, where they are not its defaults."""
    options, defaults = best.options, RankOptions()
    given = {
        "--readout": (options.readout, defaults.readout),
        "--layout": (options.layout, defaults.layout),
        "--label-place": (options.label_place, defaults.label_place),
        "--context": (best.context, PromptConfig().context),
        "--fidelity": (str(out), str(FILE)),
    }
    return [f"{name} {shlex.quote(value)}" for name, (value, default) in given.items() if value != default]
