"""`rcllm plan`: a plan as tables and files. Knows nothing of how it is found."""

from __future__ import annotations

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rcllm.cli.commands.sim import PlanFiles
from rcllm.cli.outputs import check_apart, check_file
from rcllm.cli.screen import busy, console
from rcllm.cli.tables import NOTHING, facts_table
from rcllm.durable import write
from rcllm.plain_json import to_json, without_nan
from rcllm.sim.options import PlanOptions
from rcllm.sim.plan import Memory, Plan, plan, variants
from rcllm.sim.plots import draw_plan

_GB = 1e9


def plan_command(options: PlanOptions, files: PlanFiles) -> None:
    """Plans, shows and writes."""
    for path in (files.out, files.plot):
        check_file(path, options.costs)
    check_apart(out=files.out, plot=files.plot)
    with busy("planning"):
        plans = {"as asked": plan(options)}
    found = plans["as asked"]
    console().print(facts_table(_title(options), _facts(found)))
    console().print(_memory_table(found))
    console().print(_trials_table(found))
    for name, changed in variants(options).items():
        with busy(f"planning {name}"):
            plans[name] = plan(changed, near=round((found.nodes or 0) * changed.qps / options.qps))
    console().print(_variants_table(plans))
    if files.out is not None:
        result = {name: plan_as_json(each) for name, each in plans.items()}
        write(files.out, (to_json(without_nan(result), indent=2) + "\n").encode())
    if files.plot is not None:
        write(files.plot, draw_plan(found, _title(options)))


def plan_as_json(found: Plan) -> dict[str, object]:
    """All figures of a plan by name."""
    options = found.options
    return {
        "items": options.items,
        "qps": options.qps,
        "slo_ms": options.slo_ms,
        "percentile": options.percentile,
        "nodes": found.nodes,
        "why": found.why,
        "floor_ms": found.floor_ms,
        "expected_hit_rate": found.expected_hit_rate,
        "node_hours_per_million": found.node_hours_per_million,
        "cost_per_million": found.cost_per_million,
        "memory_bytes_per_node": {name: asdict(each) | {"total": each.total} for name, each in found.memory.items()},
        "trials": [asdict(trial) for trial in found.trials],
    }


def _title(options: PlanOptions) -> str:
    device = f"as measured in {options.costs.name}" if options.costs else f"{options.gpus} × {options.gpu}"
    return (
        f"{options.items:,} items of {options.tokens_per_item:g} tokens, {options.qps:g} requests a second, "
        f"P{options.percentile:g} ≤ {options.slo_ms:g} ms; {options.model} on {device} per node, level {options.level}"
    )


def _facts(found: Plan) -> dict[str, str]:
    facts = {"nodes": f"{found.nodes:,}" if found.nodes else "none is enough", "why": found.why}
    facts["alone"] = f"{found.floor_ms:,.1f} ms: a median request on an idle node that holds all of its items"
    if found.best is not None:
        summary = found.best.summary
        facts["time to first token"] = (
            f"P50 {summary.ttft_p50_ms:,.0f}, P90 {summary.ttft_p90_ms:,.0f}, P99 {summary.ttft_p99_ms:,.0f} ms"
        )
        facts["items"] = (
            f"{summary.hit_rate:.0%} held by the node that answers, {summary.fetched:.0%} fetched; "
            f"{found.expected_hit_rate:.0%} expected on a topic's own node"
        )
        facts["nodes in use"] = f"{summary.utilisation:.0%} of the time"
    if found.node_hours_per_million is not None:
        cost = f", which cost {found.cost_per_million:,.2f}" if found.cost_per_million is not None else ""
        facts["a million requests"] = f"{found.node_hours_per_million:,.1f} node hours{cost}"
    return facts


def _memory_table(found: Plan) -> Table:
    nodes = found.nodes or found.options.max_nodes
    table = _table(f"KV on each of {nodes:,} nodes, GB", "stratum", *found.memory)
    rows = {
        "instruction": [f"{each.instruction / _GB:,.2f}" for each in found.memory.values()],
        "prototypes": [f"{each.prototypes / _GB:,.1f}" for each in found.memory.values()],
        "histories": [f"{each.histories / _GB:,.1f}" for each in found.memory.values()],
        "items on every node": [f"{each.hot / _GB:,.1f}" for each in found.memory.values()],
        "items of this node": [f"{each.shard / _GB:,.1f}" for each in found.memory.values()],
        "in all": [f"{each.total / _GB:,.1f}" for each in found.memory.values()],
        "items without room": [_share(each) for each in found.memory.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _share(memory: Memory) -> str:
    return f"{memory.evicted_share:.0%}" if memory.evicted_share else NOTHING


def _trials_table(found: Plan) -> Table:
    table = _table("Simulated", "nodes", "P50 ms", "P90 ms", "P99 ms", "hits", "fetched", "in use", "meets")
    for trial in found.trials:
        summary = trial.summary
        times = (summary.ttft_p50_ms, summary.ttft_p90_ms, summary.ttft_p99_ms)
        shares = (summary.hit_rate, summary.fetched, summary.utilisation)
        cells = [*(f"{value:,.0f}" for value in times), *(f"{share:.0%}" for share in shares)]
        if trial.overloaded:
            cells = ["overloaded", *(len(cells) - 1) * [NOTHING]]
        table.add_row(f"{trial.nodes:,}", *cells, "yes" if trial.meets else "no")
    return table


def _variants_table(plans: dict[str, Plan]) -> Table:
    table = _table("What changes", "", "nodes", "GB per node", "P99 ms", "hits", "node hours\nper million")
    for name, found in plans.items():
        best, hours = found.best, found.node_hours_per_million
        table.add_row(
            name,
            f"{found.nodes:,}" if found.nodes else "none",
            f"{found.memory[found.options.kv_dtype].total / _GB:,.0f}",
            f"{best.summary.ttft_p99_ms:,.0f}" if best else NOTHING,
            f"{best.summary.hit_rate:.0%}" if best else NOTHING,
            f"{hours:,.1f}" if hours is not None else NOTHING,
        )
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table
