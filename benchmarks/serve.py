"""What does serving add to a ranking, how many a second are answered, and what becomes of the rest?

Regime of `overhead`: one request at a time from another process over one kept connection on the loopback, the same
requests asked in Python and over HTTP by turns; items warm, level `blocks`, every user new; SmolLM2-135M in fp32 on the
CPU. Both sides tokenise, look up and compute; the difference is what the server adds. Floor: none of it is arithmetic
of the model, so a server that answers by rule (no model) shows how much is HTTP and JSON alone.

Regime of the other parts: the server and its load are processes of their own on the loopback, the tuned rankers
(adapters/), read-out pointwise, 20 candidates. `saturation`, `mixed` and `overload` have prompts of the paper's length,
with warm items and new users; `soak` has short ones. Ceiling of `saturation`: one over the time of a ranking alone,
for what a pass of several rankings shares is little. `document`: see benchmarks/serve_document.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO

import httpx

from benchmarks.harness import Options, dataset, options, percentile, run_parts, show
from benchmarks.serve_document import document
from benchmarks.serve_mixed import mixed, soak
from benchmarks.serve_sweep import overload, saturation
from rcllm.config import CacheConfig, Config, ServerConfig
from rcllm.core.ranking import Level, RankOptions, RankRequest, UserId
from rcllm.data import Dataset, build_requests, named_items
from rcllm.engine.engine import Engine
from rcllm.server.app import make_app
from rcllm.server.backend import Backend
from rcllm.server.fake import FakeBackend
from rcllm.server.on_engine import EngineBackend
from rcllm.server.run import HttpServer
from rcllm.wire.requests import request_to_json

QUESTION = "What HTTP adds to a ranking, how many rankings a second are answered, and what becomes of the rest"
_WARM_UP = 3  # requests that do not count


def main() -> None:
    chosen = options("serve", QUESTION, tuple(_PARTS))
    run_parts("serve", QUESTION, chosen, {name: partial(part, chosen) for name, part in _PARTS.items()})


def overhead(chosen: Options) -> dict[str, float]:
    data = dataset("amazon_scientific")
    requests = _requests(data, chosen.requests or (10 if chosen.quick else 40), chosen.seed)
    engine = Engine.build(data.catalogue, Config(cache=CacheConfig(pool_mb=4000)))
    engine.warm(named_items(requests))  # all fit: else whoever asks first would compute for both
    gc.collect()
    gc.freeze()
    with _serving(EngineBackend(engine, "model")) as address, _client(address) as client:
        pairs = [(_by_python(engine, request), client.ask(request)) for request in requests][_WARM_UP:]
    titles: dict[str, str] = {item_id: " ".join(item.fields.values()) for item_id, item in data.catalogue.items()}
    with _serving(FakeBackend(titles)) as address, _client(address) as client:
        by_rule = [client.ask(request) for request in requests][_WARM_UP:]
    python, http = ([pair[side] for pair in pairs] for side in (0, 1))
    added = [over - alone for alone, over in pairs]
    rows = {"in Python": python, "over HTTP": http, "added": added, "over HTTP, answered by rule": by_rule}
    show(
        f"{len(pairs)} rankings of {len(requests[0].candidates)} candidates, one at a time",
        ["", "P50 ms", "P90 ms"],
        [[name, f"{statistics.median(ms):.2f}", f"{percentile(ms, 0.9):.2f}"] for name, ms in rows.items()],
    )
    return {
        "num_requests": len(pairs),
        "rank_python_ms_p50": statistics.median(python),
        "rank_http_ms_p50": statistics.median(http),
        "http_overhead_ms_p50": statistics.median(added),
        "http_overhead_ms_p90": percentile(added, 0.9),
        "http_by_rule_ms_p50": statistics.median(by_rule),
    }


def _requests(data: Dataset, count: int, seed: int) -> list[RankRequest]:
    made = build_requests(data, count + _WARM_UP, num_candidates=20, num_history=12, min_history=4, seed=seed)
    rank = RankOptions(level=Level("blocks"))
    return [dataclasses.replace(each, options=rank, positive=None) for each in made]


def _by_python(engine: Engine, request: RankRequest) -> float:
    """Milliseconds. Another user than over HTTP, so that neither finds the history of the other."""
    start = time.perf_counter()
    engine.rank(dataclasses.replace(request, user_id=UserId(f"{request.user_id} in Python")))
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def _serving(backend: Backend) -> Iterator[str]:
    listening, address = threading.Event(), list[str]()
    config = ServerConfig(port=0, warm=False)

    def told(where: str) -> None:
        address.append(where)
        listening.set()

    server = HttpServer(make_app(backend, config), config, told)
    thread = threading.Thread(target=server.run)
    thread.start()
    listening.wait()
    try:
        yield address[0]
    finally:
        server.should_exit = True
        thread.join()


@dataclasses.dataclass(frozen=True)
class _Client:
    """Asks from another process, one request at a time."""

    to: IO[str]
    back: IO[str]

    def ask(self, request: RankRequest) -> float:
        """Milliseconds that the other process waited."""
        self.to.write(json.dumps(request_to_json(request)) + "\n")
        self.to.flush()
        return float(self.back.readline())


@contextlib.contextmanager
def _client(address: str) -> Iterator[_Client]:
    command = [sys.executable, "-c", f"from benchmarks.serve import client_alone; client_alone({address!r})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield _Client(process.stdin, process.stdout)
        process.stdin.close()


def client_alone(address: str) -> None:
    """For a process of its own: reads bodies, writes how long each answer took."""
    with httpx.Client(base_url=address, timeout=60) as http:
        for line in sys.stdin:
            start = time.perf_counter()
            http.post("/v1/rank", content=line).raise_for_status().json()
            print((time.perf_counter() - start) * 1e3, flush=True)


_PARTS: dict[str, Callable[[Options], dict[str, float]]] = {
    "overhead": overhead,
    "saturation": saturation,
    "mixed": mixed,
    "overload": overload,
    "soak": soak,
    "document": document,
}


if __name__ == "__main__":
    main()
