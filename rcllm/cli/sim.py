"""`rcllm sim`: a run of the simulator, as a table and as files. Knows nothing of how it is simulated."""

from __future__ import annotations

from dataclasses import fields

from rcllm.cli.commands.sim import SimFiles
from rcllm.cli.outputs import check_apart, check_file
from rcllm.cli.screen import busy, console, say
from rcllm.cli.tables import facts_table
from rcllm.durable import write
from rcllm.plain_json import to_json, without_nan
from rcllm.sim.options import RunOptions, System, Workload
from rcllm.sim.outcome import Summary
from rcllm.sim.plots import draw_run
from rcllm.sim.setup import Run, resolve, simulate
from rcllm.sim.trace import Trace
from rcllm.wire.requests import read_requests


def sim_command(workload: Workload, system: System, run: RunOptions, files: SimFiles) -> None:
    """Simulates, shows and writes."""
    for path in (files.out, files.trace, files.plot):
        check_file(path, files.log, system.costs)
    check_apart(out=files.out, trace=files.trace, plot=files.plot)
    log, report = read_requests(files.log) if files.log is not None else (None, None)
    if report is not None and report.rows_skipped:
        say(f"{files.log}: {report.rows_skipped:,} rows could not be read and are left out")
    trace = Trace() if files.trace is not None else None
    with busy(f"simulating {run.requests:,} requests"):
        done = simulate(workload, system, run, log, on_pass=trace.on_pass if trace is not None else None)
    title = _title(workload, system, num_logged=len(log or ()))
    console().print(facts_table(title, facts(done.summary)))
    speed = f"{done.requests_per_minute:,.0f} requests simulated in a minute of one core"
    say(f"{speed}; the first {done.warm_s:,.1f} s do not count", "dim")
    _write(workload, system, run, files, done, trace, title)


def _write(
    workload: Workload, system: System, run: RunOptions, files: SimFiles, done: Run, trace: Trace | None, title: str
) -> None:
    if files.out is not None:
        result = {"options": _options(workload, system, run), "summary": without_nan(done.summary.as_dict())}
        write(files.out, (to_json(result, indent=2) + "\n").encode())
    if files.trace is not None and trace is not None:
        trace.add_requests(done.outcome)
        trace.write(files.trace)
        if trace.num_dropped:
            say(f"{files.trace} holds the first events; {trace.num_dropped:,} are left out, so that a viewer opens it")
    if files.plot is not None:
        write(files.plot, draw_run(done, title))


def _options(*groups: Workload | System | RunOptions) -> dict[str, object]:
    """All options by name; what is no number stands there as its text."""
    values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in values.items()}


def facts(summary: Summary) -> dict[str, str]:
    """A summary in words and units."""
    found = summary
    told = {
        "time to first token": f"P50 {found.ttft_p50_ms:,.1f}, P90 {found.ttft_p90_ms:,.1f}, P99 "
        f"{found.ttft_p99_ms:,.1f}, mean {found.ttft_mean_ms:,.1f} ms; of it waiting {found.queue_mean_ms:,.1f} ms",
        "items": f"{found.hit_rate:.1%} held by the node that answers, {found.reachable:.1%} by the one that held "
        f"most, {found.fetched:.1%} fetched",
        "tokens": f"{found.computed_share:.1%} of all are computed",
        "nodes": f"{found.utilisation:.1%} of the time in use, the busiest {found.busiest:.1%}",
        "requests": f"{found.num_requests:,} counted, {found.answers_per_s:,.1f} answered a second",
    }
    if found.evictions:
        told["cache"] = f"{found.evictions:,} evictions"
    if found.retries or found.num_unanswered:
        told["failures"] = f"{found.retries:,} retries, {found.num_unanswered:,} requests unanswered"
    return told


def _title(workload: Workload, system: System, num_logged: int) -> str:
    level = resolve(system.level, system.mask)
    device = f"as measured in {system.costs.name}" if system.costs else f"{system.gpus} × {system.gpu}"
    items = f"{num_logged:,} logged requests" if num_logged else f"{workload.items:,} items"
    return (
        f"{system.nodes:,} nodes ({system.model}, {device}), level {level}, route {system.route}, "
        f"{items}, {workload.qps:g} requests a second"
    )
