"""`rcllm describe`: text about users and items, offline. Knows nothing of how jobs resume or text is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rcllm.cache.heap import share_arenas
from rcllm.cli.clustered import check_extra, cluster_of, configured_by
from rcllm.cli.commands.describe import JobOptions, SpeculationOptions
from rcllm.cli.inputs import Inputs, load_inputs_given, make_config, make_engine
from rcllm.cli.options import EngineOptions, ItemOptions
from rcllm.cli.outputs import check_file
from rcllm.cli.screen import GOES_ON, busy, console, interruptible, progress, say
from rcllm.cli.tables import facts_table
from rcllm.config import ClusterConfig, Config
from rcllm.core.decoding import Speculation
from rcllm.data import Catalogue
from rcllm.describe.checkpoint import Described, rejects_file
from rcllm.describe.estimate import Estimate, cost_per_million, estimate, hours_per_million
from rcllm.describe.job import Describing, Part, Progress, Report, describe
from rcllm.describe.options import DescribeOptions, Kind, check_options
from rcllm.describe.profiles import Parse, Profile, catalogue_digest, items, survey, users
from rcllm.describe.repeats import find_repeats, read_once
from rcllm.describe.writer import GeneratorWriter, make_router, provenance_of
from rcllm.drafts.groups import Router
from rcllm.errors import ConfigError
from rcllm.fetch import digest
from rcllm.late import Late
from rcllm.prompt.template import Template

if TYPE_CHECKING:
    from rcllm.on_ray import jobs, recipe
else:
    jobs, recipe = (Late(f"rcllm.on_ray.{name}") for name in ("jobs", "recipe"))


def describe_command(
    rows: Path,
    out: Path,
    options: DescribeOptions,
    speculation: SpeculationOptions,
    job: JobOptions,
    engine_options: EngineOptions,
    item_options: ItemOptions,
) -> None:
    """Runs the job, or estimates it."""
    _check_speculation(speculation, options.kind)
    if job.cluster is not None:
        engine_options = _check_cluster(job, speculation, engine_options)
    options = replace(options, speculation=_speculation(speculation))
    check_options(options)
    engine_options = replace(engine_options, template=engine_options.template or f"describe_{options.kind}")
    config = make_config(engine_options)
    template = Template.load(config.prompt.template)
    if not template.open:
        raise ConfigError(
            f"template {config.prompt.template!r} is for rankings; describing needs one with `open = true`, such as "
            f"describe_{options.kind}"
        )
    if not job.dry_run:
        _check_out(out, rows, config, engine_options, item_options)
    inputs = _catalogue(options.kind, item_options)
    parse, whole = (_parse(options.kind, template, inputs, most) for most in (options.max_events, None))
    with busy("reading rows"):
        repeats = find_repeats(rows, whole, options.max_events)
        read = partial(read_once, rows, options.kind, parse, repeats)
        counted = survey(read(0, note=lambda remark: say(f"note: {rows}: {remark}")))
        settings = {
            "input": digest(rows),
            "catalogue": catalogue_digest(inputs.catalogue),
            "groups": speculation.groups,
        }
    if repeats.num_rows and options.kind == "user":
        say(
            f"{len(repeats.joined):,} users stand in several rows: each is described once, from all of them in the "
            f"order of the file ({repeats.num_rows:,} rows joined)"
        )
    engine = make_engine(config, inputs)
    router = None
    if options.kind == "user" and speculation.groups > 1:
        with busy("grouping users"):
            everyone = (row for row in read(0) if isinstance(row, Profile))
            router = make_router(everyone, inputs.catalogue, speculation.groups, options.seed)
    writer = GeneratorWriter(engine, options, router)
    if job.dry_run:
        with busy("measuring a few answers"):
            found = estimate(read(0), writer, options)
        console().print(facts_table("A dry run: nothing was written", _estimate_facts(found, job.price_per_hour)))
        return
    total = counted.num_profiles if options.limit is None else min(options.limit, counted.num_profiles)
    section = config.cluster if job.cluster is None else cluster_of(job.cluster, config)
    process = Process(config, item_options, options, router, writer.identity, section)
    several = nullcontext() if job.cluster is None else jobs.processes(process, section)
    with interruptible(GOES_ON), several as describes, _bar(options.kind, total) as show:
        report = describe(
            read,
            writer,
            options,
            out,
            provenance_of(engine),
            settings=settings | {"config": writer.identity},
            pools=speculation.pools,
            strict=job.strict,
            describes=describes,
            on_progress=show,
        )
    if report.rejects is not None:
        say(_told_rejects(report))
    console().print(facts_table("Described", _facts(report, options, job.price_per_hour)))


@dataclass(frozen=True, slots=True)
class Process:
    """One of several that describe: what it needs to make its own engine, at another place. It is pickled."""

    config: Config
    items: ItemOptions
    options: DescribeOptions
    router: Router | None
    identity: str  # of the writer that leads the job
    cluster: ClusterConfig

    def __call__(self, number: int) -> Callable[[Part], tuple[Part, list[tuple[int, Described]]]]:
        """Raises ConfigError where this process would write other texts."""
        share_arenas()
        config = recipe.for_node(self.config, self.cluster, number)
        engine = make_engine(config, _catalogue(self.options.kind, self.items))
        writer = GeneratorWriter(engine, self.options, self.router)
        if writer.identity != self.identity:
            raise ConfigError(
                f"process {number} has another model, template or catalogue at these paths than the one that leads the "
                "job: give every machine the same files"
            )
        describing = Describing(writer, self.options, provenance_of(engine))
        return lambda part: (part, list(describing.rows(part.profiles)))


def _check_cluster(job: JobOptions, speculation: SpeculationOptions, options: EngineOptions) -> EngineOptions:
    """Raises ConfigError for what one process alone can do."""
    assert job.cluster is not None
    check_extra()
    if speculation.pools is not None:
        raise ConfigError(
            "--pools are of one process, and each of a cluster drafts from its own answers: leave one out"
        )
    if job.dry_run:
        raise ConfigError("--dry-run measures this machine: leave out --cluster")
    return configured_by(options, job.cluster)


@contextmanager
def _bar(kind: Kind, total: int) -> Iterator[Callable[[Progress], None]]:
    with progress("rate") as bar:
        task = bar.add_task(f"describing {kind}s", total=total, rate="")

        def show(now: Progress) -> None:
            bar.update(task, completed=now.num_profiles, rate=f"{now.rate.tokens_per_s:,.0f} tokens/s")

        yield show


def _check_speculation(given: SpeculationOptions, kind: Kind) -> None:
    """Raises ConfigError for what would be ignored."""
    default = SpeculationOptions()
    if given.speculate != "relaxed" and (given.k, given.p) != (default.k, default.p):
        raise ConfigError(f"--k and --p are for --speculate relaxed, got --speculate {given.speculate}")
    if given.speculate == "none" and (given.pools is not None or given.groups != default.groups):
        raise ConfigError("--pools and --groups say what to draft from; leave them out with --speculate none")
    if kind == "item" and given.groups != default.groups:
        raise ConfigError("--groups puts users together; leave it out with --kind item")


def _speculation(options: SpeculationOptions) -> Speculation:
    relaxed = options.speculate == "relaxed"
    return Speculation("relaxed", options.k, options.p) if relaxed else Speculation(options.speculate)


def _catalogue(kind: Kind, options: ItemOptions) -> Inputs:
    """Items that histories name; none where events are texts, and for items, whose rows hold their text."""
    if kind == "item" and (options.items is not None or options.dataset is not None):
        raise ConfigError("--kind item describes the rows of the file itself; leave out --items and --dataset")
    return load_inputs_given(options) or Inputs(Catalogue(()))


def _parse(kind: Kind, template: Template, inputs: Inputs, max_events: int | None) -> Parse:
    return items(template.event) if kind == "item" else users(inputs.catalogue or None, max_events)


def _check_out(out: Path, *reads: object) -> None:
    """Whether the output can be written and is none of what is read; the job itself refuses a file of something else.

    Raises ConfigError, DataError.
    """
    for path in (out, rejects_file(out)):
        check_file(path, *reads, beside=out)
    if out.suffix not in (".parquet", ".pq"):
        raise ConfigError(f"expected --out to be named .parquet, which is what is written, got {out.name}")


def _told_rejects(report: Report) -> str:
    """How many rows could not be described, and the first ones' reasons."""
    lines = [f"warning: {report.done.num_rejects:,} rows could not be described; all of them are in {report.rejects}"]
    lines += [f"  row {each.row:,}: {each.reason}" for each in report.first_rejects]
    if (more := report.done.num_rejects - len(report.first_rejects)) > 0:
        lines.append(f"  … and {more:,} more")
    return "\n".join(lines)


def _facts(report: Report, options: DescribeOptions, price_per_hour: float | None) -> dict[str, str]:
    done, rate = report.done, report.rate
    per_pass = done.num_tokens / done.num_passes if done.num_passes else 0.0
    facts = {
        "file": str(report.out),
        f"{options.kind}s": f"{done.num_profiles:,}"
        + (f", {report.num_resumed:,} of them in earlier runs" if report.num_resumed else ""),
        "rejected": f"{done.num_rejects:,}",
        "tokens": f"{done.num_tokens:,}; {per_pass:.2f} per forward pass of an answer",
    }
    if options.speculation.name == "relaxed":
        facts["diverged"] = f"{done.num_divergences:,} accepted tokens that plain decoding would not have chosen"
    if rate.num_profiles:
        facts["this run"] = f"{rate.elapsed_s:,.0f} s, {rate.tokens_per_s:,.1f} tokens/s"
        facts |= _cost(rate.seconds_per_profile, price_per_hour)
    return facts


def _estimate_facts(found: Estimate, price_per_hour: float | None) -> dict[str, str]:
    about = "" if found.num_counted == found.num_profiles else "about "
    facts = {
        "rows": f"{found.num_profiles:,} to describe, {found.num_rejects:,} that cannot be used",
        "prompt tokens": f"{about}{found.prompt_tokens:,.0f}",
        "answer tokens": f"about {found.answer_tokens:,.0f}",
        "measured": f"{found.rate.num_profiles} answers, {found.rate.tokens_per_s:,.1f} tokens/s",
        "time": f"about {found.seconds / 3600:,.2f} hours",
    }
    if found.first_reject is not None:
        more = f" … and {found.num_rejects - 1:,} more" if found.num_rejects > 1 else ""
        facts["first bad row"] = f"{found.first_reject.row:,}: {found.first_reject.reason}{more}"
    if price_per_hour is not None:
        facts["cost"] = f"about {found.seconds / 3600 * price_per_hour:,.2f}"
    return facts | _cost(found.rate.seconds_per_profile, price_per_hour)


def _cost(seconds_per_profile: float, price_per_hour: float | None) -> dict[str, str]:
    facts = {"a million rows": f"{hours_per_million(seconds_per_profile):,.0f} hours of this machine"}
    if price_per_hour is not None:
        facts["a million rows"] += (
            f", {cost_per_million(seconds_per_profile, price_per_hour):,.2f} at {price_per_hour} an hour"
        )
    return facts
