"""Slow, obvious counting: pairs of items, item-kNN, the best node of a request, and the time of a node, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import permutations
from math import sqrt

from rcllm.cluster.placement import Placement
from rcllm.cluster.view import Held, NodeState, RoutedRequest


def count_pairs(requests: Sequence[Collection[int]]) -> Counter[tuple[int, int]]:
    """How many requests held both items, in either order."""
    return Counter(pair for items in requests for pair in permutations(set(items), 2))


def top_neighbours(pairs: Mapping[tuple[int, int], int], count: int) -> dict[tuple[int, int], int]:
    """The largest `count` of each item, ties to the earlier neighbour; kept for both where one keeps them."""
    kept = {}
    for item in {one for one, _ in pairs}:
        near = sorted((other for one, other in pairs if one == item), key=lambda other: (-pairs[item, other], other))
        for other in near[:count]:
            kept[item, other] = kept[other, item] = pairs[item, other]
    return kept


def item_knn(users: Sequence[Collection[int]], num_items: int, history: Collection[int]) -> list[float]:
    """For each item the sum of cosines with the history, and a little for popularity."""
    popularity = [sum(item in user for user in users) for item in range(num_items)]

    def score(item: int) -> float:
        both = (sum(item in user and event in user for user in users) for event in history)
        norms = (sqrt(max(popularity[item], 1) * max(popularity[event], 1)) for event in history)
        return sum(num / norm for num, norm in zip(both, norms, strict=True))

    return [score(item) + 1e-6 * popularity[item] / max(popularity) for item in range(num_items)]


def holds(placement: Placement, node: int, item: int) -> bool:
    """Whether a node holds an item, from the arrays of the placement."""
    if placement.evicted[item]:
        return False
    if placement.replicated[item]:
        return True
    return int(placement.owner[item]) == node or item in placement.halos[node].tolist()


def best_share(placement: Placement, items: Collection[int]) -> float:
    nodes = range(placement.room.num_nodes)
    return max(sum(holds(placement, node, item) for item in items) for node in nodes) / len(items)


def ready_s(nodes: Sequence[NodeState], held: Mapping[object, Held], node: int, request: RoutedRequest) -> float:
    """Seconds until a node has everything, block by block."""
    state, total = nodes[node], request.rows / nodes[node].tokens_per_s
    for block in (*request.items, *request.history):
        where = held.get(block.key, Held())
        ways = [block.num_tokens / state.tokens_per_s]
        if any(each.up and (where.everywhere or n in where.nodes) for n, each in enumerate(nodes)):
            ways.append(block.num_bytes / state.fetch_bytes_per_s)
        if where.everywhere or node in where.nodes:
            read = where.read_s[where.nodes.index(node)] if where.read_s else block.num_bytes / state.read_bytes_per_s
            ways.append(read)
        total += min(ways)
    return total
