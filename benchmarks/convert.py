"""Is a ranker that was converted to the block mask without labels as good as its teacher, where training never was?

Regime: Amazon Industrial, which no committed adapter saw; held-out users, 20 candidates, up to 8 events, SmolLM2-135M,
read-out `pointwise`. The teacher is a causal ranker of that domain, at level `full`; the student learned its scores
alone, and is asked at `blocks`, beside the adapter that it started from. Differences are paired, intervals 95 %
bootstrap. Both are looked for in the cache folder, where these commands write them (hours on 2 cores):

    rcllm tune --dataset DATA/amazon_industrial --template titles --start adapters/smollm2-135m-causal \
        --out CACHE/benchmarks/convert-teacher
    rcllm tune --dataset DATA/amazon_industrial --mask blocks --start adapters/smollm2-135m-blocks \
        --teacher CACHE/benchmarks/convert-teacher/best --out CACHE/benchmarks/convert-student

`curve_*`: validation of the student as it learned, by the minutes that it had, from its record. Ceiling: the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.enrich import beside, engine_of, flat, place
from benchmarks.fidelity_setup import adapter_of, scored
from benchmarks.harness import Options, console, dataset, options, run_parts, show
from rcllm.data import Negatives, build_requests
from rcllm.fetch import cache_dir
from rcllm.fidelity.baselines import baseline_gains
from rcllm.fidelity.fusion import Scored, gains
from rcllm.fidelity.intervals import bootstrap
from rcllm.fidelity.measures import agreement
from rcllm.fidelity.records import RecordFile
from rcllm.model.adapter import adapter_record

QUESTION = "NDCG@10 of a ranker converted without labels, beside its teacher's, on a domain that is new to both"
SET = "amazon_industrial"
SIZES: dict[Negatives, tuple[int, str]] = {"uniform": (500, ""), "popularity": (100, "_popular")}  # requests, suffix
TARGETS = 3  # per user


def main() -> None:
    chosen = options("convert", QUESTION, tuple(PARTS), precision=True)
    with RecordFile(cache_dir() / "benchmarks" / "convert.jsonl") as kept:
        run_parts("convert", QUESTION, chosen, {name: partial(part, chosen, kept) for name, part in PARTS.items()})


def quality(kind: Negatives, chosen: Options, kept: RecordFile) -> dict[str, float]:
    """The same requests to all."""
    data, (most, suffix) = dataset(SET), SIZES[kind]
    count = min(6 if chosen.quick else most, chosen.requests or most)
    test = build_requests(data, None, 20, 8, kind, "test", chosen.seed, TARGETS, min_history=2)[:count]
    found, scores = baseline_gains(data, test), dict[str, list[tuple[float, ...]]]()
    for who, template, level, folder in (
        ("teacher", "titles", "full", trained("convert-teacher")),
        ("student", "echo", "blocks", trained("convert-student")),
        ("start", "echo", "blocks", adapter_of("blocks")),
    ):
        with engine_of(template, data, folder, model=chosen.model) as engine:
            scores[who] = [tuple(record.scores) for record in scored(engine, [level], test, kept)[level]]
        found[who] = gains([Scored(each, each, place(r)) for each, r in zip(scores[who], test, strict=True)], 0.0)
    metrics: dict[str, float] = {f"requests{suffix}": len(test)}
    rows = []
    for who, values in found.items():
        key, tau = flat(who) + suffix, ""
        figures, row = beside(values, found["teacher"], "teacher", key, chosen.seed)
        metrics |= figures
        if who in ("student", "start"):
            taus = [[agreement(*pair).tau] for pair in zip(scores["teacher"], scores[who], strict=True)]
            of_all = bootstrap(taus, seed=chosen.seed)[0]
            metrics |= {f"tau_{key}": of_all.mean, f"tau_lo_{key}": of_all.low, f"tau_hi_{key}": of_all.high}
            tau = str(of_all)
        rows.append([who, *row, tau])
    show(f"{data.name}, {kind} candidates, {len(test)} requests", ["", "NDCG@10", "− teacher", "Kendall τ"], rows)
    return metrics


def curve(chosen: Options, kept: RecordFile) -> dict[str, float]:
    """Of the student's validation, by its minutes."""
    metrics, rows = dict[str, float](), []
    for point in adapter_record(trained("convert-student"))["curve"]:
        key = f"{point['minutes']:.0f}_minutes"
        figures = {"ndcg10": float(point["validation_ndcg10"]), "tau": float(point["tau"])}
        metrics |= {f"curve_{name}_{key}": value for name, value in figures.items()}
        rows.append([key.replace("_", " "), *(f"{value:.3f}" for value in figures.values())])
    show("The student as it learned, validation", ["", "NDCG@10", "Kendall τ with the teacher"], rows)
    return metrics


def trained(name: str) -> Path:
    folder = cache_dir() / "benchmarks" / name / "best"
    if not folder.is_dir():
        console.print(f"[red]{folder} is missing; make it as the head of this module says")
        raise SystemExit(1)
    return folder


PARTS: dict[str, Callable[[Options, RecordFile], dict[str, float]]] = {
    "uniform": partial(quality, "uniform"),
    "popularity": partial(quality, "popularity"),
    "curve": curve,
}

if __name__ == "__main__":
    main()
