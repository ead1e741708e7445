"""What does a cluster lose when replicas are killed, and what is routing by what replicas hold worth?

Regime: replicas of SmolLM2-135M in fp32 with one thread each, on one machine, behind Ray Serve and HTTP; items of
Amazon Scientific in groups that are asked for together (8 candidates, 15 % from any group, 3 events), level `blocks`,
placement learned from earlier requests. `kill`: two replicas that hold everything, eight requests under way at any
time, SIGKILL to one after a third and to one after two thirds. `routing`: four replicas that hold a third of the items
each, the same requests at the same moments for each policy; what is missing is computed, since on one machine fetching
is only a copy. Replicas outnumber the cores of a small machine, so compare policies, not milliseconds; the floor of
tokens computed is 0, where every replica holds what it is asked for. `simulated`: see `cluster_simulated.py`.
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

from benchmarks.cluster_setup import Items, Reply, ask_at_rate, ask_steadily, replicas, served
from benchmarks.cluster_simulated import simulated
from benchmarks.harness import Options, options, percentile, run_parts, show

QUESTION = "What is lost when replicas are killed under load, and what routing by what replicas hold is worth"
_POLICIES = ("round_robin", "load_only", "affinity", "ttft")
_AT_ONCE = 8
_RATE = 3.0  # requests a second of `routing`


def main() -> None:
    parts = {"kill": kill, "routing": routing, "simulated": simulated}
    chosen = options("cluster", QUESTION, tuple(parts))
    run_parts("cluster", QUESTION, chosen, {name: partial(part, chosen) for name, part in parts.items()})


def kill(chosen: Options) -> dict[str, float]:
    """Two SIGKILLs under load: what was lost, what came twice, and how long until both replicas answer again."""
    num_requests = chosen.requests or (200 if chosen.quick else 1000)
    items = Items(60, chosen.seed)
    answered, recovered = threading.Semaphore(0), list[float]()
    with served(items, 2, 2.0, route="affinity") as client:
        killing = threading.Thread(target=_kill_twice, args=(client, answered, num_requests, recovered))
        killing.start()
        replies = ask_steadily(client, items.bodies(num_requests, 1), _AT_ONCE, answered)
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
        "kill_hit_rate_before": _hit_rate(replies[: num_requests // 3]),
        "kill_hit_rate_at_end": _hit_rate(replies[-num_requests // 5 :]),
        "kill_ms_p50": statistics.median(ms),
        "kill_ms_max": max(ms),
    }
    show(f"{num_requests} rankings, two kills", ["", ""], [[name, f"{each:,.2f}"] for name, each in figures.items()])
    return figures


def _hit_rate(replies: Sequence[Reply]) -> float:
    """Share of candidates that the replica had which answered."""
    good = [reply for reply in replies if reply.status == 200]
    return sum(reply.num_held for reply in good) / sum(len(reply.items) for reply in good)


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
    num_requests, rate = chosen.requests or (60 if chosen.quick else 300), _RATE
    items = Items(60 if chosen.quick else 120, chosen.seed)
    rows, figures = [], dict[str, float]()
    for policy in _POLICIES:
        with served(items, 4, 1.33, route=policy, peers=False) as client:
            replies = ask_at_rate(client, items.bodies(num_requests, 1), rate, chosen.seed)
        found = _routed(replies, items, num_requests)
        figures |= {f"{policy}_{name}": each for name, each in found.items()}
        rows.append([policy, *(f"{each:,.2f}" for each in found.values())])
    show(f"{num_requests} rankings at {rate:g} a second, four replicas", ["", *found], rows)
    return figures | {"routing_num_requests": num_requests, "routing_rate_per_s": rate}


def _routed(replies: Sequence[Reply], items: Items, num_requests: int) -> dict[str, Any]:
    good = [reply for reply in replies if reply.status == 200]
    asked = sum(len(body["candidates"]) for body in items.bodies(num_requests, 1))
    ms = [reply.ms for reply in good]
    return {
        "failed": len(replies) - len(good),
        "hit_rate": sum(reply.num_held for reply in good) / asked,
        "tokens_computed": sum(reply.receipt["num_computed"] for reply in good) / len(good),
        "ms_p50": statistics.median(ms),
        "ms_p99": percentile(ms, 0.99),
    }


if __name__ == "__main__":
    main()
