"""A calibration on one page: quality against cost with the Pareto front marked, and the table behind it.

Knows nothing of engines. Invariant: every figure shown stands in the Calibration; the page needs no other file and no
network.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcllm.errors import ConfigError, DataError
from rcllm.fidelity.calibration import Calibration, Rung
from rcllm.fidelity.intervals import Interval
from rcllm.fidelity.measures import QUALITY
from rcllm.fidelity.pareto import fronts
from rcllm.fidelity.records import Configuration

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by all eyes
_INK, _GREY, _GRID = "#1d2733", "#5b6773", "#e4e8ec"
_STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {_INK}; max-width: 1240px; margin: 2.5rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
.lead, .notes, summary {{ color: {_GREY} }} .lead {{ margin-top: 0 }} img {{ width: 100%; height: auto }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; width: 100%; font-size: 13px }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid {_GRID}; white-space: nowrap }}
th {{ color: {_GREY}; font-weight: 600 }} td:first-child, th:first-child {{ text-align: left }}
td:last-child, th:last-child {{ text-align: left; white-space: normal; min-width: 14rem; color: {_GREY} }}
.passes {{ background: #eef7f1 }} .best {{ background: #cfebd8; font-weight: 600 }}
code {{ background: #f2f4f6; padding: .1rem .3rem; border-radius: 3px }}
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """What the figure's vertical axis shows."""

    name: str
    label: str
    line: float  # what to be held against
    line_name: str


def write_report(calibration: Calibration, html_path: Path, png_path: Path) -> None:
    """Writes the page and its figure. Raises ConfigError without matplotlib, DataError for what cannot be written."""
    figure = draw(calibration)
    page = render(calibration, figure)
    try:
        png_path.write_bytes(figure)
        html_path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"the report cannot be written: {error}") from error


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(calibration: Calibration) -> bytes:
    """A PNG: NDCG@10 (where it is known) and Kendall τ against cost, with intervals."""
    try:  # optional: only this function draws
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("the report's figure needs matplotlib: pip install 'rcllm[report]'") from error
    axes = _axes(calibration)
    figure = Figure(figsize=(6.4 * len(axes), 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        _panel(place, calibration, axis)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _axes(calibration: Calibration) -> list[Axis]:
    tau = Axis("tau", "Kendall τ with full recompute", calibration.target.tau, "target")
    full = _reference(calibration).full
    ndcg10 = next(rung.summary.measures["ndcg10"].mean for rung in calibration.rungs if rung.configuration == full)
    return [tau] if math.isnan(ndcg10) else [Axis("ndcg10", "NDCG@10", ndcg10, "full recompute"), tau]


def _reference(calibration: Calibration) -> Configuration:
    """Whose full recompute and prefix caching are drawn as lines."""
    return calibration.recommended or calibration.rungs[0].configuration


def _panel(place: Any, calibration: Calibration, axis: Axis) -> None:
    rungs = [  # without `exact`, whose answers are full recompute's and were looked at on few requests
        rung
        for rung in calibration.rungs
        if rung.configuration.options.level.name != "exact" and not math.isnan(rung.summary.measures[axis.name].mean)
    ]
    groups = list(dict.fromkeys(rung.configuration.full for rung in rungs))
    points = {rung.configuration: (_cost(calibration, rung), rung.summary.measures[axis.name]) for rung in rungs}
    front = fronts({name: (cost, -value.mean) for name, (cost, value) in points.items()})[:1]
    best = front[0] if front else []
    place.plot(
        [points[name][0] for name in best],
        [points[name][1].mean for name in best],
        color=_INK,
        linewidth=1.2,
        alpha=0.55,
        label="Pareto front",
        zorder=2,
    )
    place.plot([], [], "o", color="none", markeredgecolor=_INK, markersize=13, label="recommended")
    for colour, group in zip(_COLOURS * len(groups), groups, strict=False):
        names = [rung.configuration for rung in rungs if rung.configuration.full == group]
        for name in names:
            _mark(place, points[name], colour, on_front=name in best, chosen=name == calibration.recommended)
        place.plot([], [], "o", color=colour, label=group.prompt_name)
    for number, name in enumerate(best):
        below = number % 2
        place.annotate(
            f"{name.level_name}\n{name.context}".rstrip(),
            (points[name][0], points[name][1].high if not below else points[name][1].low),
            xytext=(0, -7 if below else 7),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8.5,
            color=_INK,
        )
    _decorate(place, calibration, axis)


def _mark(place: Any, point: tuple[float, Interval], colour: str, *, on_front: bool, chosen: bool) -> None:
    cost, value = point
    spread = [[value.mean - value.low], [value.high - value.mean]] if not math.isnan(value.low) else None
    place.errorbar(
        cost,
        value.mean,
        yerr=spread,
        fmt="o",
        color=colour,
        markerfacecolor=colour if on_front else "white",
        markersize=11 if chosen else 7,
        markeredgewidth=1.4,
        elinewidth=1,
        alpha=1.0 if on_front else 0.6,
        zorder=4 if on_front else 3,
    )
    if chosen:
        place.plot(
            cost, value.mean, "o", color="none", markeredgecolor=_INK, markersize=16, markeredgewidth=1.4, zorder=5
        )


def _decorate(place: Any, calibration: Calibration, axis: Axis) -> None:
    place.set_xscale("log")
    place.set_xlabel(_cost_name(calibration), color=_INK)
    place.set_ylabel(axis.label, color=_INK)
    dashed = {"color": _GREY, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    words = {"textcoords": "offset points", "color": _GREY, "fontsize": 8.5, "annotation_clip": False}
    place.axhline(axis.line, **dashed)
    place.annotate(axis.line_name, (0, axis.line), (4, 3), ("axes fraction", "data"), ha="left", **words)
    exact = _reference(calibration).exact
    for rung in calibration.rungs:
        if rung.configuration == exact:
            cost = _cost(calibration, rung)
            place.axvline(cost, **dashed)
            place.annotate("prefix caching", (cost, 0), (-3, 5), ("data", "axes fraction"), ha="right", **words)
    ticks = _ticks(*place.get_xlim())
    place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    place.minorticks_off()
    place.margins(y=0.14)
    place.grid(color=_GRID, linewidth=0.8)
    place.set_axisbelow(True)
    place.spines[["top", "right"]].set_visible(False)
    place.spines[["left", "bottom"]].set_color(_GREY)
    place.tick_params(colors=_GREY)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … within a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    coarse, fine = (
        [value for d in decades for m in steps if low <= (value := m * 10.0**d) <= high]
        for steps in ((1, 2, 5), range(1, 10))
    )
    return coarse if len(coarse) > 2 else fine


# ---- the page -------------------------------------------------------------------------------------------------------


def render(calibration: Calibration, figure: bytes) -> str:
    """The page; `figure` is a PNG that it carries with it."""
    identity, hardware, target = calibration.identity, calibration.hardware, calibration.target
    lead = (
        f"{calibration.num_requests:,} requests of {calibration.dataset}, model {identity.model}, template "
        f"{identity.template}, {identity.dtype} with {identity.kv_dtype} KV, weights {identity.weights}, mask "
        f"{identity.mask}, seed {calibration.seed}; {hardware.get('cpu', 'unknown machine')}, "
        f"{hardware.get('num_threads', '?')} threads"
    )
    best = calibration.recommended
    verdict = (
        f"Recommended: <b>{html.escape(str(best))}</b>."
        if best
        else "No approximate level passes the target: <code>auto</code> answers exactly."
    )
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Fidelity of KV reuse</title>",
        f"<style>{_STYLE}</style><h1>How far KV reuse may go</h1><p class='lead'>{html.escape(lead)}</p>",
        f"<p>{verdict} Target: the 95 % interval of NDCG@10 minus full recompute's above {target.ndcg10_delta:+}, mean "
        f"Kendall τ at least {target.tau}. Filled points are on the Pareto front; bars are 95 % intervals.</p>",
        f"<img alt='Quality against cost' src='data:image/png;base64,{base64.b64encode(figure).decode()}'>",
        "<h2>Against full recompute of the same prompts</h2>",
        _table(_COST_COLUMNS, [_cost_row(calibration, rung) for rung in calibration.rungs]),
        "<details><summary>All ranking measures, with intervals</summary>",
        _table(_quality_columns(), [_quality_row(rung) for rung in calibration.rungs]),
        "</details>",
        "".join(f"<p class='notes'>{html.escape(note)}</p>" for note in calibration.notes),
    ]
    return "\n".join(parts) + "</html>\n"


_COST_COLUMNS = (
    "level, read-out, layout, label, context",
    "requests",
    "fresh tokens",
    "FLOPs saved",
    "TTFT ms",
    "over exact",
    "over full",
    "NDCG@10",
    "Δ NDCG@10",
    "Kendall τ",
    "same top-1",
    "max log-prob shift",
    "passes",
)


def _cost_row(calibration: Calibration, rung: Rung) -> tuple[str, list[str]]:
    """One row of the table of costs: its CSS class, and the texts of its cells."""
    summary, timing, configuration = rung.summary, rung.summary.timing, rung.configuration
    times = (timing.ttft_ms, timing.speedup_exact, timing.speedup_full) if timing else (math.nan,) * 3
    failed = calibration.target.failures(summary) if configuration.context else ()
    cells = [
        str(configuration),
        f"{summary.num_requests:,}",
        f"{summary.fresh_tokens:,.0f}",
        f"{summary.flops_saved:.0%}",
        _cell(times[0], "{:,.1f}"),
        _cell(times[1], "{:.2f}×"),
        _cell(times[2], "{:.2f}×"),
        _with_limits(summary.measures["ndcg10"], "{:.3f}"),
        _with_limits(summary.deltas["ndcg10"], "{:+.4f}"),
        _with_limits(summary.measures["tau"], "{:.3f}"),
        _cell(summary.measures["top1"].mean, "{:.2f}"),
        _cell(summary.measures["max_shift"].mean, "{:.3f}"),
        "; ".join(failed) if failed else "yes" if configuration.context else "exact",
    ]
    best = configuration == calibration.recommended
    return "best" if best else "passes" if configuration.context and not failed else "", cells


def _quality_columns() -> tuple[str, ...]:
    names = [
        name.upper() if name == "mrr" else name.upper().replace("NDCG", "NDCG@").replace("HR", "HR@")
        for name in QUALITY
    ]
    return (_COST_COLUMNS[0], *names, "Δ MRR")


def _quality_row(rung: Rung) -> tuple[str, list[str]]:
    measures = [_with_limits(rung.summary.measures[name], "{:.3f}") for name in QUALITY]
    return "", [str(rung.configuration), *measures, _with_limits(rung.summary.deltas["mrr"], "{:+.4f}")]


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr class='{kind}'>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, cells in rows
    )
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


# ---- words ----------------------------------------------------------------------------------------------------------


def _timed(calibration: Calibration) -> bool:
    return all(rung.summary.timing is not None for rung in calibration.rungs)


def _cost(calibration: Calibration, rung: Rung) -> float:
    return rung.cost("ttft") if _timed(calibration) else rung.summary.flops / 1e9


def _cost_name(calibration: Calibration) -> str:
    return "TTFT, ms (median, one request at a time, warm cache)" if _timed(calibration) else "GFLOP per request"


def _with_limits(interval: Interval, form: str) -> str:
    if math.isnan(interval.mean):
        return "–"
    limits = "" if math.isnan(interval.low) else f" [{form.format(interval.low)}, {form.format(interval.high)}]"
    return form.format(interval.mean) + limits


def _cell(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value)
