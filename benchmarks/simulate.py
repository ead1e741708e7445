"""Does a simulation of RcLLM come to the figures of its paper, what do our levels add, and how far does it scale?

Regime: the paper's three data sets by their stated shapes, Qwen3-8B on one A100 a node and Qwen2.5-72B on four, from
1 to 100 nodes, Poisson arrivals; 5,000 requests a point. Costs are a roofline through the two points of the paper's
Fig. 1c. What the paper does not disclose is listed in `simulate_setup.Assumptions`, is the plainest choice, and is
swept one at a time (part `assumptions`). Parts that the paper has no figure for: our levels and placements on the same
requests, and the simulator's own speed up to 1,000 nodes and 10^8 items.
"""

from __future__ import annotations

import dataclasses
import resource
from functools import partial

from benchmarks.harness import Options, console, options, run_parts, show
from benchmarks.simulate_setup import (
    NODES,
    POLICIES,
    POLICY_MEANS,
    RATES,
    RECOMPUTED_P90_MS,
    SHAPES,
    SPEED_UPS,
    SWEEPS,
    Bench,
)
from rcllm.config import RouteName
from rcllm.core.requests import Level
from rcllm.sim.options import RunOptions, System, Workload
from rcllm.sim.outcome import Summary
from rcllm.sim.setup import resolve, simulate

QUESTION = "RcLLM's evaluation by simulation beside the paper's figures; our levels and placements; speed and scale"
PARTS = ("speed_up", "policies", "growth", "ratio", "assumptions", "ours", "placements", "scale")
PERCENTILES = ("p50", "p90", "p99")
CLOSE = 0.2  # of the paper's figure
Metrics = dict[str, float]


def main() -> None:
    chosen = options("simulate", QUESTION, PARTS)
    requests = chosen.requests or (2_000 if chosen.quick else 5_000)
    base = {name: Bench(shape, requests=requests, seed=chosen.seed) for name, shape in SHAPES.items()}
    run_parts(
        "simulate",
        QUESTION,
        chosen,
        {
            "speed_up": partial(speed_up, base),
            "policies": partial(policies, base),
            "growth": partial(growth, base["amazon"]),
            "ratio": partial(ratio, base["amazon"]),
            "assumptions": partial(assumptions, base["amazon"]),
            "ours": partial(ours, base),
            "placements": partial(placements, base["amazon"]),
            "scale": partial(scale, chosen),
        },
        slow=("assumptions",),
    )


# ---- Figs. 6, 8 and 9 -----------------------------------------------------------------------------------------------


def speed_up(base: dict[str, Bench]) -> Metrics:
    """TTFT of prefix caching over that of RcLLM, by number of nodes; and its hit rates."""
    metrics: Metrics = {}
    for (model, name), paper in SPEED_UPS.items():
        rows = []
        for nodes, label in zip(NODES, paper, strict=True):
            bench = dataclasses.replace(base[name], model=model, nodes=nodes)
            cached, reused = bench.prefix_cache().summary, bench.rcllm().summary
            ratios = _ratios(cached, reused)
            most = max(ratios)
            key = f"{model}_{name}_k{nodes}"
            metrics |= {f"fig8_{key}": most, f"fig8_{key}_over_paper": most / label, f"fig9_hit_{key}": reused.hit_rate}
            if nodes == 40:
                metrics |= _fig6(model, name, cached, reused)
            row = [
                str(nodes),
                *(f"{each:.2f}" for each in ratios),
                f"{most:.2f}",
                f"{label:.2f}",
                f"{most / label:.2f}",
            ]
            rows.append([*row, f"{reused.hit_rate:.0%}", f"{cached.utilisation:.0%}", f"{reused.utilisation:.0%}"])
        columns = [
            "nodes",
            "P50",
            "P90",
            "P99",
            "largest",
            "Fig. 8",
            "ratio",
            "hits",
            "cached: in use",
            "RcLLM: in use",
        ]
        show(f"Speed-up over prefix caching, {model}, {name}", columns, rows)
    close = [abs(value - 1) <= CLOSE for key, value in metrics.items() if key.endswith("_over_paper")]
    console.print(f"{sum(close)} of {len(close)} labels of Fig. 8 are met within {CLOSE:.0%}\n")
    amazon = [abs(metrics[f"fig8_8b_amazon_k{nodes}_over_paper"] - 1) for nodes in NODES]
    return {
        **metrics,
        "fig8_labels": len(close),
        "fig8_labels_within_20_percent": sum(close),
        "fig8_8b_amazon_worst_deviation": max(amazon),
    }


def _ratios(slow: Summary, fast: Summary) -> list[float]:
    return [getattr(slow, f"ttft_{name}_ms") / getattr(fast, f"ttft_{name}_ms") for name in PERCENTILES]


def _fig6(model: str, name: str, cached: Summary, reused: Summary) -> Metrics:
    """The distribution of TTFT at 40 nodes, by three of its points."""
    metrics = {}
    for percentile in PERCENTILES:
        for side, summary in (("prefix", cached), ("rcllm", reused)):
            metrics[f"fig6_{model}_{name}_{side}_{percentile}_ms"] = getattr(summary, f"ttft_{percentile}_ms")
    return metrics


# ---- Fig. 10 --------------------------------------------------------------------------------------------------------


def policies(base: dict[str, Bench]) -> Metrics:
    """Mean TTFT of scheduling policies over the load, and of our least-time policy on the same requests."""
    metrics: Metrics = {}
    names: dict[str, RouteName] = {**POLICIES, "least_time": "ttft"}
    for name, bench in base.items():
        rows = []
        for policy, route in names.items():
            paper = POLICY_MEANS.get((name, policy))
            row = [policy]
            for place, rate in enumerate(RATES):
                found = dataclasses.replace(bench, qps=float(rate)).rcllm(route).summary
                metrics[f"fig10_{name}_{policy}_{rate}qps_mean_ms"] = found.ttft_mean_ms
                row.append(f"{found.ttft_mean_ms:.0f}" + (f" / {paper[place] * 1e3:.0f}" if paper else ""))
            metrics[f"fig10_{name}_{policy}_hit"] = found.hit_rate
            rows.append([*row, f"{found.hit_rate:.0%}", f"{found.busiest:.0%}"])
        columns = ["policy", *(f"{rate} a second" for rate in RATES), "hits", "busiest node"]
        show(f"Mean TTFT in ms, simulated / Fig. 10, {name}, 40 nodes, 8B", columns, rows)
    return metrics


def growth(bench: Bench) -> Metrics:
    """What could make TTFT grow with the load as in Fig. 10, where nodes are idle most of the time."""
    changes: dict[str, dict[str, object]] = {
        "as assumed": {},
        "popular topics": {"topic_zipf": 0.8},
        "bursty": {"arrivals": "bursty"},
        "queues known late": {"view_ms": 1000.0},
        "popular topics, bursty, late": {"topic_zipf": 0.8, "arrivals": "bursty", "view_ms": 1000.0},
    }
    metrics, rows = dict[str, float](), []
    for title, changed in changes.items():
        row = [title]
        for policy, route in POLICIES.items():
            runs = [dataclasses.replace(bench.assuming(**changed), qps=float(rate)).rcllm(route) for rate in (10, 40)]
            means = [run.summary.ttft_mean_ms for run in runs]
            metrics[f"growth_{_flat(title)}_{policy}"] = means[1] / means[0]
            row.append(f"{means[1] / means[0]:.2f}")
        rows.append(row)
    paper = (POLICY_MEANS["amazon", policy] for policy in POLICIES)
    rows.append(["Fig. 10", *(f"{means[-1] / means[0]:.2f}" for means in paper)])
    show("Mean TTFT at 40 requests a second over that at 10, Amazon, 8B", ["", *POLICIES], rows)
    return metrics


# ---- Fig. 11 --------------------------------------------------------------------------------------------------------


def ratio(bench: Bench) -> Metrics:
    """TTFT over the share of tokens that is recomputed."""
    cached = bench.prefix_cache().summary
    metrics: Metrics = {"fig11_prefix_p90_ms": cached.ttft_p90_ms}
    rows = [["prefix cache", f"{cached.ttft_p50_ms:.0f}", f"{cached.ttft_p90_ms:.0f} / {RECOMPUTED_P90_MS[0]:.0f}", ""]]
    for tenths in range(1, 11):
        share = tenths / 10
        found = bench.rcllm(budgets=(share, share)).summary
        metrics[f"fig11_r{tenths:02d}_p90_ms"] = found.ttft_p90_ms
        paper = f" / {RECOMPUTED_P90_MS[1]:.0f}" if tenths == 3 else ""
        faster = f"{cached.ttft_p90_ms / found.ttft_p90_ms:.2f}"
        rows.append([f"r = {share}", f"{found.ttft_p50_ms:.0f}", f"{found.ttft_p90_ms:.0f}{paper}", faster])
    show("Recompute ratio, Amazon, 8B, 40 nodes", ["", "P50 ms", "P90 ms, simulated / Fig. 11", "speed-up"], rows)
    return metrics


# ---- what is not disclosed ------------------------------------------------------------------------------------------


def assumptions(bench: Bench) -> Metrics:
    """Fig. 8 for 8B Amazon, with one assumption changed at a time."""
    paper = SPEED_UPS["8b", "amazon"]
    rows, metrics = [], dict[str, float]()
    changes = [("as assumed", bench)]
    changes += [
        (f"{name} {value}", bench.assuming(**{name: value})) for name, values in SWEEPS.items() for value in values
    ]
    for title, changed in changes:
        found = []
        for nodes in NODES:
            each = dataclasses.replace(changed, nodes=nodes)
            found.append(max(_ratios(each.prefix_cache().summary, each.rcllm().summary)))
        worst = max(abs(value / label - 1) for value, label in zip(found, paper, strict=True))
        key = title.replace(" ", "_").replace(".", "")
        metrics |= {f"sweep_{key}_k{nodes}": value for nodes, value in zip(NODES, found, strict=True)}
        metrics[f"sweep_{key}_worst_deviation"] = worst
        rows.append([title, *(f"{value:.2f}" for value in found), f"{worst:.0%}"])
    rows.append(["Fig. 8", *(f"{label:.2f}" for label in paper), ""])
    show("Largest speed-up, Amazon, 8B, one assumption changed", ["", *map(str, NODES), "furthest from Fig. 8"], rows)
    return metrics


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(base: dict[str, Bench]) -> Metrics:
    """Our levels with least-time routing, 16-bit KV and fetching, beside both sides of the paper."""
    metrics: Metrics = {}
    auto = {mask: str(resolve(Level("auto"), mask)) for mask in ("causal", "blocks")}
    for name, bench in base.items():
        cached = bench.prefix_cache().summary
        sides = {
            "prefix cache": cached,
            "RcLLM": bench.rcllm().summary,
            f"auto, causal model ({auto['causal']})": bench.ours("auto").summary,
            f"auto, block-mask model ({auto['blocks']})": bench.ours("auto", mask="blocks").summary,
            "linked(16)": bench.ours("linked(16)").summary,
            "corrected(0.3, 0.3)": bench.ours("corrected(0.3, 0.3)").summary,
            "blocks": bench.ours("blocks").summary,
            "blocks, affinity": bench.ours("blocks", route="affinity").summary,
            "blocks, 2 copies": bench.ours("blocks", copies=2.0).summary,
            "blocks, passes shared": bench.ours("blocks", pass_rows=2048).summary,
        }
        rows = []
        for side, found in sides.items():
            ratios = _ratios(cached, found)
            key = f"ours_{name}_{_flat(side)}"
            metrics |= {f"{key}_p50_ms": found.ttft_p50_ms, f"{key}_p99_ms": found.ttft_p99_ms}
            metrics |= {f"{key}_p50_speed_up": ratios[0], f"{key}_hit": found.hit_rate}
            times = [f"{getattr(found, f'ttft_{each}_ms'):.0f}" for each in PERCENTILES]
            shares = [f"{found.hit_rate:.0%}", f"{found.fetched:.0%}", f"{found.computed_share:.0%}"]
            rows.append([side, *times, f"{ratios[0]:.1f}×", f"{ratios[2]:.1f}×", *shares, f"{found.utilisation:.0%}"])
        columns = ["", "P50 ms", "P90 ms", "P99 ms", "P50 over prefix", "P99 over prefix", "hits", "fetched"]
        show(f"{name}, 8B, 40 nodes, 40 requests a second", [*columns, "computed", "in use"], rows)
    return metrics


def placements(bench: Bench) -> Metrics:
    """Placements built from a log of past requests, on a smaller catalogue of the same shape."""
    small = dataclasses.replace(bench, shape=dataclasses.replace(bench.shape, items=20_000), nodes=40)
    small = small.assuming(topics=1000)
    metrics, rows = dict[str, float](), []
    for copies in (1.0, 2.0, 4.0):
        for placement in ("hash", "topics", "metis", "halo", "learned"):
            found = small.ours("blocks", route="affinity", placement=placement, copies=copies, cache_gb=0.0).summary
            key = f"placed_{placement}_{copies:.0f}copies"
            metrics |= {
                f"{key}_hit": found.hit_rate,
                f"{key}_p50_ms": found.ttft_p50_ms,
                f"{key}_p99_ms": found.ttft_p99_ms,
            }
            times = [f"{getattr(found, f'ttft_{each}_ms'):.0f}" for each in ("p50", "p99")]
            rows.append([f"{copies:.0f} copies", placement, f"{found.hit_rate:.1%}", f"{found.reachable:.1%}", *times])
    show(
        "Amazon's shape with 20,000 items, 40 nodes, level blocks, route affinity, no cache beside the placement",
        ["memory", "placement", "hits", "reachable", "P50 ms", "P99 ms"],
        rows,
    )
    return metrics


# ---- scale ----------------------------------------------------------------------------------------------------------


def scale(chosen: Options) -> Metrics:
    """Simulated requests a minute of one core's time, as nodes and items grow."""
    metrics, rows = dict[str, float](), []
    count = 3_000 if chosen.quick else 10_000
    for nodes, items in ((10, 10**6), (40, 10**6), (100, 10**7), (400, 10**8), (1000, 10**8)):
        for route in ("affinity", "ttft"):
            workload = Workload(items=items, topics=max(1000, 4 * nodes), qps=2.0 * nodes)
            system = System(nodes=nodes, route=route, semantic_history=True)
            run = simulate(workload, system, RunOptions(requests=count, seed=chosen.seed))
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            key = f"scale_{nodes}nodes_{items:.0e}items_{route}".replace("+0", "")
            per_request = run.cpu_s / count * 1e6
            metrics |= {
                f"{key}_requests_per_minute": run.requests_per_minute,
                f"{key}_us_per_request": per_request,
                f"{key}_events_per_s": run.outcome.num_events / run.cpu_s,
                f"{key}_peak_rss_mb": peak_mb,
            }
            speed = [f"{run.requests_per_minute:,.0f}", f"{per_request:.0f}", f"{peak_mb:,.0f}"]
            summary = run.summary
            rows.append(
                [f"{nodes:,}", f"{items:.0e}", route, *speed, f"{summary.hit_rate:.0%}", f"{summary.ttft_p99_ms:.0f}"]
            )
    columns = ["nodes", "items", "route", "requests a minute", "µs a request", "peak RSS MB", "hits", "P99 ms"]
    show(f"The simulator's own speed, {count:,} requests, level blocks", columns, rows)
    slowest = min(value for key, value in metrics.items() if key.endswith("_per_minute"))
    growth = [metrics[f"scale_{n}nodes_1e8items_affinity_us_per_request"] for n in (400, 1000)]
    console.print(f"slowest: {slowest:,.0f} a minute; affinity from 400 to 1,000 nodes: {growth[1] / growth[0]:.2f}×\n")
    return {**metrics, "scale_slowest_requests_per_minute": slowest}


def _flat(name: str) -> str:
    """As a metric's name."""
    return "_".join("".join(sign if sign.isalnum() else " " for sign in name.lower()).split())


if __name__ == "__main__":
    main()
