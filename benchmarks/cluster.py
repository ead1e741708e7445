"""What does a cluster lose when replicas are killed, and what is routing by what replicas hold worth?

Regime: replicas of SmolLM2-135M in fp32 with one thread each, on one machine, behind Ray Serve and HTTP; films of
MovieLens in groups that are asked for together (8 candidates, 15 % from any group, 3 events), level `blocks`, placement
learned from earlier requests. `kill`: two replicas that hold everything, eight requests under way at any time, SIGKILL
to one after a third and to one after two thirds. `routing`: four replicas that hold a third of the films each, the same
requests at the same moments for each policy. Replicas outnumber the cores of a small machine, so compare policies, not
milliseconds; the floor of tokens computed is 0, where every replica holds what it is asked for.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import httpx

from benchmarks.cluster_setup import Films, Reply, ask_at_rate, ask_steadily, films_served, replicas
from benchmarks.harness import Options, options, percentile, run_parts, show

QUESTION = "What is lost when replicas are killed under load, and what routing by what replicas hold is worth"
_POLICIES = ("round_robin", "load_only", "affinity", "ttft")
_AT_ONCE = 8


def main() -> None:
    parts = {"kill": kill, "routing": routing}
    chosen = options("cluster", QUESTION, tuple(parts))
    run_parts("cluster", QUESTION, chosen, {name: partial(part, chosen) for name, part in parts.items()})


def kill(chosen: Options) -> dict[str, float]:
    """Two SIGKILLs under load: what was lost, what came twice, and how long until both replicas answer again."""
    num_requests = chosen.requests or (200 if chosen.quick else 1000)
    films = Films(60 if chosen.quick else 200, chosen.seed)
    answered, recovered = threading.Semaphore(0), list[float]()
    with films_served(films, 2, 2.0, route="affinity") as client:
        killing = threading.Thread(target=_kill_twice, args=(client, answered, num_requests, recovered))
        killing.start()
        replies = ask_steadily(client, films.bodies(num_requests, 1), _AT_ONCE, answered)
        killing.join()
    names = Counter(reply.request_id for reply in replies if reply.status == 200)
    lost = [reply for reply in replies if reply.status != 200]
    ms = [reply.ms for reply in replies if reply.status == 200]
    figures = {
        "kill_num_requests": num_requests,
        "kill_num_kills": len(recovered),
        "kill_lost": len(lost),
        "kill_twice": sum(count - 1 for count in names.values()),
        "kill_recovery_s_max": max(recovered),
        "kill_ms_p50": statistics.median(ms),
        "kill_ms_max": max(ms),
    }
    show(f"{num_requests} rankings, two kills", ["", ""], [[name, f"{each:,.1f}"] for name, each in figures.items()])
    return figures


def _kill_twice(client: httpx.Client, answered: threading.Semaphore, count: int, recovered: list[float]) -> None:
    for _ in range(2):
        for _ in range(count // 3):
            answered.acquire()
        victim = min(each.pid for each in replicas())
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while victim in {each.pid for each in replicas()} or not _both_acknowledge(client):
            time.sleep(0.2)
        recovered.append(time.monotonic() - start)


def _both_acknowledge(client: httpx.Client) -> bool:
    """Whether every replica says that it has a change."""
    reply = client.delete("/v1/users/nobody")
    stats = client.put("/v1/items/added", json={"fields": {"title": "A film that was added"}})
    return reply.status_code == 200 and len(stats.json().get("acknowledged", ())) == 2


def routing(chosen: Options) -> dict[str, float]:
    """Hit rate, tokens computed and times of each policy, at one load."""
    num_requests, rate = chosen.requests or (120 if chosen.quick else 1000), 4.0
    films = Films(120 if chosen.quick else 400, chosen.seed)
    rows, figures = [], dict[str, float]()
    for policy in _POLICIES:
        with films_served(films, 4, 1.33, route=policy) as client:
            replies = ask_at_rate(client, films.bodies(num_requests, 1), rate, chosen.seed)
        found = _routed(replies, films, num_requests)
        figures |= {f"{policy}_{name}": each for name, each in found.items()}
        rows.append([policy, *(f"{each:,.2f}" for each in found.values())])
    show(f"{num_requests} rankings at {rate:g} a second, four replicas", ["", *found], rows)
    return figures | {"routing_num_requests": num_requests, "routing_rate_per_s": rate}


def _routed(replies: Sequence[Reply], films: Films, num_requests: int) -> dict[str, Any]:
    good = [reply for reply in replies if reply.status == 200]
    asked = sum(len(body["candidates"]) for body in films.bodies(num_requests, 1))
    ms = [reply.ms for reply in good]
    return {
        "failed": len(replies) - len(good),
        "hit_rate": sum(reply.num_held - reply.num_fetched for reply in good) / asked,
        "fetched_rate": sum(reply.num_fetched for reply in good) / asked,
        "tokens_computed": sum(reply.num_computed for reply in good) / len(good),
        "ms_p50": statistics.median(ms),
        "ms_p99": percentile(ms, 0.99),
    }


if __name__ == "__main__":
    main()
