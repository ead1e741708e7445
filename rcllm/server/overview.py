"""One look at the server for its page: what it holds, what waits, and what became of requests so far.

Counts only grow, so that whoever looks twice sees what happened between. Knows nothing of HTTP. Invariant: the work and
the size of one look are bounded, and nothing in it is what a user wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rcllm.fidelity.shadow import GuardStatus
from rcllm.server.backend import Stats
from rcllm.server.served import Served
from rcllm.version import __version__

_STEPS = 20  # of the guard, the latest


def overview(served: Served) -> dict[str, Any]:
    """As the page has it, with NaN where a figure could not be measured."""
    about, stats, tally = served.backend.about, served.backend.stats(), served.metrics.tally()
    return {
        "time_s": served.wall_clock(),
        "started_s": served.started_s,
        "version": __version__,
        "model": served.model,
        "kinds": sorted(about.kinds),
        "level": str(about.options.level),
        "max_candidates": about.max_candidates,
        "closing": served.is_closing,
        "catalogue": {"num_items": stats.num_items, "warming": asdict(stats.warmth)},
        "cache": _cache(stats),
        "queue": _queue(stats),
        "requests": asdict(tally),
        "guard": None if stats.guard is None else _guard(stats.guard),
    }


def _cache(stats: Stats) -> dict[str, Any]:
    pool = {
        "tier": "device",
        "num_blocks": stats.num_blocks,
        "num_bytes": stats.num_bytes,
        "budget_bytes": stats.budget_bytes,
        "evictions": stats.evictions,
    }
    below = [{name: getattr(tier, name) for name in pool} for tier in stats.tiers]
    return {
        "tiers": [pool, *below],
        "hits": dict(stats.hits),
        "misses": stats.misses,
        "store_errors": stats.store_errors,
    }


def _queue(stats: Stats) -> dict[str, Any]:
    door = stats.door
    return {
        "num_waiting": door.num_waiting,
        "num_unanswered": stats.num_unanswered,
        "wait_ms": door.wait_ms,
        "outcomes": dict(door.outcomes),
        "loop_failures": stats.loop_failures,
    }


def _guard(status: GuardStatus) -> Mapping[str, Any]:
    return {
        "ladder": list(status.ladder),
        "target": status.target,
        "share": status.share,
        "num_waiting": status.num_waiting,
        "kinds": [asdict(kind) for kind in status.stats.kinds],
        "counts": asdict(status.stats.counts),
        "steps": [asdict(step) for step in status.events[-_STEPS:]],
    }
