"""The options of `rcllm sim` and `rcllm plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rcllm.annotated import Opt
from rcllm.cli.spread import spread
from rcllm.sim.options import PlanOptions, RunOptions, System, Workload

_OUT = "What is written"


@dataclass(frozen=True, slots=True)
class SimFiles:
    """What is read and written beside the table."""

    log: Annotated[
        Path | None, Opt("Requests to replay, as `rcllm rank` reads them; lengths and times are drawn.", metavar="FILE")
    ] = None
    out: Annotated[Path | None, Opt("The figures and all options as JSON.", metavar="FILE.json", panel=_OUT)] = None
    trace: Annotated[
        Path | None, Opt("A trace for chrome://tracing or ui.perfetto.dev.", metavar="FILE.json", panel=_OUT)
    ] = None
    plot: Annotated[Path | None, Opt("A picture.", metavar="FILE.png", panel=_OUT)] = None


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """What is written beside the table."""

    out: Annotated[Path | None, Opt("The plan as JSON.", metavar="FILE.json", panel=_OUT)] = None
    plot: Annotated[Path | None, Opt("A picture.", metavar="FILE.png", panel=_OUT)] = None


@spread("rcllm.cli.sim:sim_command")
def sim(workload: Workload, system: System, run: RunOptions, files: SimFiles) -> None:
    """Simulate a cluster: times, hits and use of nodes, before there is one.

    Routing, scheduling and eviction are those of a real one; times come from a roofline of the GPU or from measured
    passes. docs/simulation.md says what is modelled and what is not.

    Example: `rcllm sim --nodes 40 --items 778000 --qps 40 --trace trace.json`
    """


@spread("rcllm.cli.plan:plan_command")
def plan(options: PlanOptions, files: PlanFiles) -> None:
    """Plan a cluster: nodes, memory, times to the first token, and what it costs.

    Memory follows from formulas (docs/planning.md). The number of nodes is the smallest that meets the target in a
    simulation; half and double of the catalogue and of the load are planned as well.

    Example: `rcllm plan --items 1000000 --tokens-per-item 100 --model qwen3-8b --qps 100 --slo-ms 300`
    """
