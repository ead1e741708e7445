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
    rows = request.rows / view.tokens_per_s
    if not blocks:
        return rows
    num_bytes = np.array([block.num_bytes for block in blocks], dtype=np.float64)[:, None]
    computed = np.array([block.num_tokens for block in blocks], dtype=np.float64)[:, None] / view.tokens_per_s
    held = [view.holdings.held(block.key) for block in blocks]
    somewhere = np.array([_can_be_fetched(each, view.up) for each in held])[:, None]
    times = np.where(somewhere, np.minimum(num_bytes / view.fetch_bytes_per_s, computed), computed)  # [blocks, nodes]
    for place, (block, each) in enumerate(zip(blocks, held, strict=True)):
        if each.everywhere:
            times[place] = np.minimum(times[place], block.num_bytes / view.read_bytes_per_s)
        elif each.nodes:
            at = list(each.nodes)
            read = np.array(each.read_s) if each.read_s else block.num_bytes / view.read_bytes_per_s[at]
            times[place, at] = np.minimum(times[place, at], read)
    return np.asarray(times.sum(axis=0) + rows)


def _can_be_fetched(held: Held, up: BoolArray) -> bool:
    return bool(up.any() if held.everywhere else any(up[node] for node in held.nodes))
