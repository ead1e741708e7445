"""The server of `benchmarks.serve`: a process of its own that computes, and the requests that it is asked.

Knows nothing of what is measured. Invariants: it listens at the loopback alone; it ends when its parent closes its
input, or is gone; what it holds is checked before it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.fidelity_setup import LONG_TEMPLATES, POINTWISE, TEMPLATES, adapter_of, paper_shaped
from benchmarks.harness import ROOT, dataset
from benchmarks.serve_load import Shot
from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig, ScheduleConfig, ServerConfig, for_serving
from rcllm.core.ranking import RankRequest, UserId
from rcllm.data import Dataset, build_requests, named_items
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import Recommender
from rcllm.server.app import make_app
from rcllm.server.on_engine import EngineBackend
from rcllm.server.run import HttpServer
from rcllm.wire.requests import parse_request, request_to_json

_END_S = 60.0  # for the server to drain and to check itself
_CODES = (64, 64, 64)


@dataclasses.dataclass(frozen=True)
class Serving:
    """What is served."""

    variant: str  # of the tuned rankers: blocks or causal
    num_requests: int  # that differ
    seed: int
    is_long: bool = True  # prompts of the paper's length; else those that the ranker was tuned on
    is_warm: bool = True  # the items of the requests, before it listens
    pool_mb: int = 3000
    other_rows: int | None = None  # None: as a server has it
    recommends: bool = False  # with semantic IDs that were drawn, for their cost is that of learnt ones


@dataclasses.dataclass
class Server:
    """A server process that listens."""

    address: str
    requests: list[RankRequest]
    num_tokens: int  # of a prompt, in the median
    process: subprocess.Popen[str]
    told: dict[str, int] = dataclasses.field(default_factory=dict)  # at its end: see `serve_alone`


@contextlib.contextmanager
def serving(what: Serving) -> Iterator[Server]:
    """`told` of the server is filled in when it has ended. Raises RuntimeError where it did not end as it should."""
    call = f"from benchmarks.serve_setup import serve_alone; serve_alone({json.dumps(json.dumps(vars(what)))})"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    try:
        first = _line(process)
        requests = [parse_request(each) for each in first["requests"]]
        server = Server(first["address"], requests, first["num_tokens"], process)
        yield server
        assert process.stdin is not None
        process.stdin.close()
        server.told = _line(process)
        if status := process.wait(_END_S):
            raise RuntimeError(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON object that the process writes."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise RuntimeError("the server ended before it said what was expected; its own words stand above")


# ---- in the server's process -----------------------------------------------------------------------------------------


def serve_alone(what: str) -> None:
    """For a process of its own: says where it listens, serves until its input ends, and checks what it holds."""
    asked = Serving(**json.loads(what))
    engine, data = _engine(asked)
    requests = _requests(engine, data, asked)
    if asked.is_warm:
        engine.warm(named_items(requests))
    backend = EngineBackend(engine, "model", _recommender(engine, asked.seed) if asked.recommends else None)
    config = ServerConfig(port=0, warm=False, timeout_s=600, drain_s=10)
    sizes = sorted(engine.prompter.build(dataclasses.replace(each, options=POINTWISE)).num_tokens for each in requests)
    first = {"num_tokens": sizes[len(sizes) // 2], "requests": [request_to_json(each) for each in requests]}

    def tell(address: str) -> None:
        print(json.dumps({"address": address, **first}), flush=True)

    server = HttpServer(make_app(backend, config), config, tell)
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    server.run()
    engine.pool.check()
    engine.loop.scheduler.check()
    stats = backend.stats()
    told = {"unanswered": stats.num_unanswered, "failures": stats.loop_failures, "evictions": stats.evictions}
    told |= {"under_way": len(engine.loop.under_way()), **stats.door.outcomes}
    print(json.dumps(told), flush=True)


def _end_with_input(server: HttpServer) -> None:
    sys.stdin.read()
    server.should_exit = True


def _engine(asked: Serving) -> tuple[Engine, Dataset]:
    data = dataset("amazon_scientific")
    template = (LONG_TEMPLATES if asked.is_long else TEMPLATES)[asked.variant]
    config = Config(
        ModelConfig(adapter=str(adapter_of(asked.variant))),
        PromptConfig(template),
        CacheConfig(pool_mb=asked.pool_mb),
        POINTWISE,
        schedule=for_serving(ScheduleConfig(other_rows=asked.other_rows)),
    )
    return Engine.build(data.catalogue, config), data


def _requests(engine: Engine, data: Dataset, asked: Serving) -> list[RankRequest]:
    if asked.is_long:
        found = paper_shaped(engine, data, "scientific", 20, asked.num_requests, asked.seed)
    else:
        found = build_requests(data, asked.num_requests, 20, 8, min_history=4, seed=asked.seed)
    return [dataclasses.replace(each, positive=None, options=None) for each in found]


def _recommender(engine: Engine, seed: int) -> Recommender:
    """A decoder of semantic IDs over the ranker's own model: what it recommends means nothing, and costs as much."""
    draw, items = np.random.default_rng(seed), tuple(engine.prompter.catalogue)[:5000]
    codes = np.stack([draw.integers(0, size, len(items)) for size in _CODES], axis=1).astype(np.int32)
    tokens = CodeTokens(tuple(np.arange(1000 + 64 * i, 1064 + 64 * i, dtype=np.int32) for i in range(len(_CODES))))
    return Recommender(engine, LiveCodes(CodeIndex.build(codes, items, _CODES)), tokens)


# ---- what is asked ---------------------------------------------------------------------------------------------------


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds of `count` arrivals."""
    return [float(at) for at in np.random.default_rng(seed).exponential(1 / rate, count).cumsum()]


def ranking(request: RankRequest, user: str, at_s: float = 0.0, **more: object) -> Shot:
    """The ranking of a user whom nobody has seen, where the name is new."""
    asked = dataclasses.replace(request, request_id=user, user_id=UserId(user))
    return Shot(json.dumps({**request_to_json(asked), **more}), at_s)


def rankings(requests: Sequence[RankRequest], tag: str, at_s: Sequence[float], **more: object) -> tuple[Shot, ...]:
    """One at each time, every one of a new user."""
    some = (requests[number % len(requests)] for number in range(len(at_s)))
    return tuple(ranking(each, f"{tag}-{n}", at, **more) for n, (each, at) in enumerate(zip(some, at_s, strict=True)))
