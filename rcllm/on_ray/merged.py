"""Figures of many replicas as those of one server.

Never imports ray or torch. Invariant: counts are sums, and what cannot be added up is told of the replica where it is
worst.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rcllm.server.backend import Door, Stats, Warmth
from rcllm.store.contract import TierStats

_ADDED = (
    "num_unanswered",
    "num_blocks",
    "num_bytes",
    "budget_bytes",
    "code_bytes",
    "misses",
    "evictions",
    "store_errors",
    "loop_failures",
    "guard_failures",
)


def merged(replicas: Iterable[Stats]) -> Stats:
    """`Stats` of a cluster; rates are of the slowest replica, the guard's and the costs' of the one that erred most."""
    stats = list(replicas)
    if not stats:
        return Stats(warmth=Warmth(running=True))
    added: dict[str, Any] = {name: sum(getattr(each, name) for each in stats) for name in _ADDED}
    guards = [each.guard for each in stats if each.guard is not None]
    costs = [each.costs for each in stats if each.costs is not None]
    return Stats(
        num_items=max(each.num_items for each in stats),
        hits=_added(each.hits for each in stats),
        tiers=_tiers([tier for each in stats for tier in each.tiers]),
        rates=_least(each.rates for each in stats),
        door=_door([each.door for each in stats]),
        costs=max(costs, key=lambda each: each.num_passes, default=None),
        guard=max(guards, key=lambda each: len(each.events), default=None),
        warmth=_warmth([each.warmth for each in stats]),
        **added,
    )


def _added(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(total)


def _least(rates: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
    least: dict[str, float] = {}
    for each in rates:
        least |= {name: min(rate, least.get(name, rate)) for name, rate in each.items()}
    return least


def _tiers(tiers: Sequence[TierStats]) -> tuple[TierStats, ...]:
    by_name: dict[str, TierStats] = {}
    for tier in tiers:
        before = by_name.get(tier.tier)
        by_name[tier.tier] = tier if before is None else _sum(before, tier)
    return tuple(by_name.values())


def _sum(one: TierStats, other: TierStats) -> TierStats:
    names = [name for name in TierStats.__dataclass_fields__ if name != "tier"]
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in names})


def _door(doors: Sequence[Door]) -> Door:
    return Door(
        sum(each.num_waiting for each in doors),
        min(each.wait_ms for each in doors),
        _added(each.outcomes for each in doors),
        _added(each.degraded for each in doors),
    )


def _warmth(warmths: Sequence[Warmth]) -> Warmth:
    def of(what: Callable[[Warmth], int]) -> int:
        return sum(map(what, warmths))

    errors = sorted({each.error for each in warmths if each.error})
    return Warmth(
        any(each.running for each in warmths),
        of(lambda each: each.done_blocks),
        of(lambda each: each.total_blocks),
        any(each.full for each in warmths),
        "; ".join(errors),
    )
