"""What each node would do for a request: how many of its items it holds, and how long it would take.

Knows nothing of policies. Per block and node it is read where the node holds it; else fetched from a node that is up
and holds it, or computed, whichever is quicker. Invariant: times come from the view's rates and lookups alone, and
adding a copy never makes a node slower. Arrays are [nodes].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcllm.cluster.view import BoolArray, ClusterView, FloatArray, Held, RoutedBlock, RoutedRequest


def count_held(view: ClusterView, blocks: Sequence[RoutedBlock]) -> FloatArray:
    """How many of the blocks each node holds."""
    nodes: list[int] = []
    everywhere = 0
    for block in blocks:
        held = view.holdings.held(block.key)
        if held.everywhere:
            everywhere += 1
        else:
            nodes += held.nodes
    counts = np.bincount(np.array(nodes, dtype=np.int64), minlength=view.num_nodes)
    return (counts + everywhere).astype(np.float64)


def ready_s(view: ClusterView, request: RoutedRequest) -> FloatArray:
    """Seconds from the start of its turn until a node has all blocks, and has computed the request's own rows."""
    blocks = (*request.items, *request.history)
    own = request.rows / view.tokens_per_s
    if not blocks:
        return own
    held = [view.holdings.held(block.key) for block in blocks]
    num_bytes = np.array([block.num_bytes for block in blocks], dtype=np.float64)
    somewhere = np.array([_can_be_fetched(each, view.up) for each in held])
    times = np.outer([block.num_tokens for block in blocks], 1 / view.tokens_per_s)  # [blocks, nodes]
    np.minimum(times, np.outer(np.where(somewhere, num_bytes, np.inf), 1 / view.fetch_bytes_per_s), out=times)
    for place, each in enumerate(held):
        if each.everywhere:
            np.minimum(times[place], num_bytes[place] / view.read_bytes_per_s, out=times[place])
    total = own + times.sum(axis=0)
    places = [place for place, each in enumerate(held) for _ in each.nodes]
    if places:  # of the nodes that hold a block, few, what they save by that
        nodes = [node for each in held for node in each.nodes]
        told = [seconds for each in held for seconds in each.read_s or (np.nan,) * len(each.nodes)]
        read = np.where(np.isnan(told), num_bytes[places] / view.read_bytes_per_s[nodes], told)
        before = times[places, nodes]
        np.subtract.at(total, nodes, before - np.minimum(before, read))
    return np.asarray(total)


def _can_be_fetched(held: Held, up: BoolArray) -> bool:
    return bool(up.any() if held.everywhere else any(up[node] for node in held.nodes))
