"""A placement that is built from past requests, for catalogues whose items can be counted one by one.

Knows nothing of costs. Invariant: the requests that a placement is learnt from are never those that it is simulated on.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rcllm.cluster.place import make_place
from rcllm.cluster.placement import PlacedHoldings, Room
from rcllm.cluster.statistics import Collector
from rcllm.core.requests import ItemId
from rcllm.errors import ConfigError
from rcllm.sim.options import Workload
from rcllm.sim.workload import SimRequest, item_lengths

MAX_ITEMS = 1_000_000  # of which a graph is made


def learn(
    policy: str,
    past: Iterable[SimRequest],
    workload: Workload,
    room: Room,
    kv_bytes_per_token: int,
    hot_share: float,
) -> PlacedHoldings:
    """The placement that a policy of `cluster.place` makes of past requests. Raises ConfigError, CapacityError."""
    if workload.items > MAX_ITEMS:
        raise ConfigError(
            f"--placement {policy} counts every item, and can do so for {MAX_ITEMS:,}; the catalogue has "
            f"{workload.items:,}: take --placement topics, which stands for it in large catalogues"
        )
    collector = Collector()
    for request in past:
        collector.add(np.array(request.items, dtype=np.int64))
    items = np.arange(workload.items)
    sizes = item_lengths(items, workload) * kv_bytes_per_token
    statistics = collector.finish([ItemId(str(item)) for item in range(workload.items)], sizes)
    placement = make_place(policy, hot_share=hot_share)(statistics, room)
    return PlacedHoldings.of(placement, range(workload.items))
