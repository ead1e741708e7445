"""Pictures of a run and of a plan, as PNG. Knows nothing of how they came about; needs matplotlib (`rcllm[report]`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcllm.errors import ConfigError
from rcllm.sim.plan import Plan
from rcllm.sim.setup import Run

_INK, _GRID = "#1d2733", "#e4e8ec"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by all eyes
_MS = 1e3


def draw_run(run: Run, title: str) -> bytes:
    """The distribution of times to the first token, requests over time, and how busy nodes were."""
    figure, axes = new_figure(3)
    draw_cdfs(axes[0], {"all requests": run.outcome.ttft(run.warm_s) * _MS})
    arrivals = np.array([each.arrival_s for each in run.outcome.answers])
    ttft = np.array([each.ttft_s for each in run.outcome.answers]) * _MS
    axes[1].plot(arrivals, ttft, ".", markersize=2, color=COLOURS[0], alpha=0.4)
    axes[1].axvline(run.warm_s, color=_INK, linewidth=1, linestyle=":")
    label(axes[1], "arrival, s (what is left of the line does not count)", "time to first token, ms")
    use = np.array(run.outcome.busy_s) / (run.outcome.end_s or 1.0)
    axes[2].bar(range(len(use)), sorted(use, reverse=True), color=COLOURS[2], width=1.0)
    label(axes[2], "nodes, busiest first", "share of the time that they compute")
    figure.suptitle(title, fontsize=10, color=_INK)
    return to_png(figure)


def draw_plan(plan: Plan, title: str) -> bytes:
    """Memory by stratum and dtype, and what each number of nodes that was tried comes to."""
    figure, axes = new_figure(2)
    bottom = np.zeros(len(plan.memory))
    for colour, stratum in zip(COLOURS, ("instruction", "prototypes", "histories", "hot", "shard"), strict=False):
        sizes = np.array([getattr(each, stratum) / 1e9 for each in plan.memory.values()])
        axes[0].bar(list(plan.memory), sizes, bottom=bottom, color=colour, label=stratum)
        bottom += sizes
    axes[0].axhline(plan.options.memory_gb, color=_INK, linewidth=1, linestyle=":", label="memory of a node")
    axes[0].legend(frameon=False, fontsize=8, labelcolor=_INK, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    label(axes[0], "dtype of cached KV", "GB per node")
    nodes = [trial.nodes for trial in plan.trials]
    for colour, name in zip(COLOURS, ("p50", "p90", "p99"), strict=False):
        values = [getattr(trial.summary, f"ttft_{name}_ms") for trial in plan.trials]
        axes[1].plot(nodes, values, "o-", color=colour, label=name.upper(), markersize=4)
    axes[1].axhline(plan.options.slo_ms, color=_INK, linewidth=1, linestyle=":", label="target")
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].legend(frameon=False, fontsize=8, labelcolor=_INK)
    label(axes[1], "nodes", "time to first token, ms")
    figure.suptitle(title, fontsize=9, color=_INK)
    return to_png(figure)


def draw_cdfs(axis: Any, samples: Mapping[str, Sequence[float] | np.ndarray[Any, Any]]) -> None:
    """One curve for each name; times in milliseconds."""
    for colour, (name, values) in zip(COLOURS * len(samples), samples.items(), strict=False):
        ordered = np.sort(np.asarray(values))
        axis.plot(ordered, (np.arange(len(ordered)) + 1) / max(1, len(ordered)), color=colour, label=name)
    label(axis, "time to first token, ms", "share of requests")
    if len(samples) > 1:
        axis.legend(frameon=False, fontsize=8, labelcolor=_INK)


def new_figure(num_panels: int) -> tuple[Any, list[Any]]:
    """A row of panels. Raises ConfigError without matplotlib."""
    try:  # optional: only this function draws
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'rcllm[report]', or leave --plot out") from error
    figure = Figure(figsize=(5.2 * num_panels, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9, color=_INK)
    axis.set_ylabel(y, fontsize=9, color=_INK)
    axis.grid(color=_GRID)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
