"""The position-bias probe: how much of a score is the candidate, and how much the slot that it stands in.

Each request is ranked under several orders of its candidates; their KV is reused, so an order costs its fresh tokens
only. Knows engines only as something that ranks batches. Invariant: scores are compared item by item, so what differs
between two orders of one request is order alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import stats

from rcllm.core.ranking import RankOptions, RankRequest, RankResponse
from rcllm.core.receipts import RankReceipt
from rcllm.errors import RcllmError, RequestError, answered
from rcllm.fidelity.measures import agreement

FloatArray = npt.NDArray[np.float64]
Orders = npt.NDArray[np.int64]  # [orders, slots]: which candidate stands in a slot

_CONFIDENCE = 0.95


class Ranker(Protocol):
    """An engine, as far as the probe needs one."""

    def rank_batch(self, requests: Sequence[RankRequest]) -> Sequence[RankResponse | RcllmError]:
        """One response per request, in order."""
        ...


@dataclass(frozen=True, slots=True)
class SlotMean:
    """What standing in one slot does to a score, in the unit of the scores."""

    slot: int  # from 0, the first candidate of the prompt
    mean: float  # score here minus the same item's mean over all orders, averaged over requests
    low: float  # 95 % interval over requests (Student's t); NaN for a single request
    high: float
    num_requests: int  # with that many candidates


@dataclass(frozen=True, slots=True)
class PositionBias:
    """What order does to the scores of one read-out. Variances are means over requests."""

    level: str
    readout: str
    layout: str
    num_requests: int
    num_orders: int  # per request, the order asked included
    within_variance: float  # of one item's score over orders: what order alone does
    between_variance: float  # of the items' scores, less what order alone does to their means; never below 0
    order_share: float  # within / (within + between): 0 order does nothing, 1 order is all; NaN where nothing varies
    tau: float  # mean Kendall τ between two orders' scores; NaN where none ranks anything
    top1: float  # share of pairs of orders that agree on the best item
    slots: tuple[SlotMean, ...]
    fresh_tokens: int  # computed by the probe, missing blocks included
    full_tokens: int  # that ranking all orders in full would have computed


@dataclass(frozen=True, slots=True)
class _Probed:
    """One request under all its orders."""

    scores: FloatArray  # [orders, items], by item as asked
    by_slot: FloatArray  # [slots]: mean over orders of score minus the item's own mean
    taus: tuple[float, ...]  # one per pair of orders; NaN where a side ranks nothing
    top1: float
    computed_tokens: int
    full_tokens: int  # that full recompute would have computed
    receipt: RankReceipt  # of the order asked


def position_bias(
    engine: Ranker,
    requests: Sequence[RankRequest],
    permutations: int = 8,
    seed: int = 0,
    options: RankOptions | None = None,
    *,
    on_request: Callable[[int], None] = lambda done: None,
) -> PositionBias:
    """Ranks each request as asked and under `permutations` other orders of its candidates.

    `options`: over those of the requests. Level `blocks` is the cheapest; what it finds is the bias of that level.
    A read-out that isolates candidates from each other and names no slots (`pointwise`, `likelihood`) has none; a label
    names a slot, so `label` has some even where candidates do not see each other. Variances are those of a one-way
    random-effects model, items by orders (Searle, Casella and McCulloch 1992, "Variance Components", section 3.6).
    Raises RequestError where there is no request, or one with less than two candidates.
    """
    if permutations < 1:
        raise RequestError(f"expected one or more permutations, got {permutations}")
    if not requests or min(len(request.candidates) for request in requests) < 2:
        raise RequestError("the position probe needs requests, and two or more candidates in each")
    rng = np.random.default_rng(seed)
    probed: list[_Probed] = []
    for done, request in enumerate(requests, 1):
        asked = request if options is None else replace(request, options=options)
        orders = latin_orders(len(request.candidates), permutations, rng)
        probed.append(_compare(orders, answered(engine.rank_batch([_reordered(asked, order) for order in orders]))))
        on_request(done)
    receipt = probed[0].receipt
    within, between = _variances([p.scores for p in probed])
    taus = [tau for p in probed for tau in p.taus if not np.isnan(tau)]
    return PositionBias(
        level=receipt.level,
        readout=receipt.readout,
        layout=receipt.layout,
        num_requests=len(probed),
        num_orders=permutations + 1,
        within_variance=within,
        between_variance=between,
        order_share=within / (within + between) if within + between > 0 else float("nan"),
        tau=float(np.mean(taus)) if taus else float("nan"),
        top1=float(np.mean([p.top1 for p in probed])),
        slots=_slot_means([p.by_slot for p in probed]),
        fresh_tokens=sum(p.computed_tokens for p in probed),
        full_tokens=sum(p.full_tokens for p in probed),
    )


def latin_orders(num_items: int, permutations: int, rng: np.random.Generator) -> Orders:
    """The order asked, then `permutations` others, as rows of random Latin squares: shape [permutations + 1, items].

    Within a square no item stands twice in one slot, so a few orders move every item to as many slots. A square is the
    cyclic one with its slots and items renamed by one random permutation, which keeps the order asked as its first row
    and gives every item other neighbours.
    """
    rows = [np.arange(num_items)]
    while len(rows) <= permutations:
        names = rng.permutation(num_items)
        for shift in rng.permutation(np.arange(1, num_items))[: permutations + 1 - len(rows)]:
            row = np.empty(num_items, dtype=np.int64)
            row[names] = np.roll(names, shift)
            rows.append(row)
    return np.stack(rows)


def _reordered(request: RankRequest, order: npt.NDArray[np.int64]) -> RankRequest:
    return replace(request, candidates=tuple(request.candidates[i] for i in order))


def _compare(orders: Orders, responses: Sequence[RankResponse]) -> _Probed:
    by_slot = np.array([response.scores for response in responses])  # [orders, slots]
    scores = np.take_along_axis(by_slot, np.argsort(orders, axis=1), axis=1)  # [orders, items]
    centred = by_slot - scores.mean(axis=0)[orders]
    pairs = [agreement(one, other) for one, other in itertools.combinations(scores, 2)]
    receipts = [response.receipt for response in responses]
    return _Probed(
        scores,
        centred.mean(axis=0),
        tuple(pair.tau for pair in pairs),
        float(np.mean([pair.top1 for pair in pairs])),
        computed_tokens=sum(receipt.num_fresh for receipt in receipts) + _materialised(receipts),
        full_tokens=sum(receipt.num_tokens for receipt in receipts),
        receipt=receipts[0],
    )


def _materialised(receipts: Sequence[RankReceipt]) -> int:
    """Tokens of missing blocks; the receipts of requests that were computed together repeat what they share."""
    total, i = 0, 0
    while i < len(receipts):
        total += receipts[i].num_computed
        i += receipts[i].batch_size
    return total


def _variances(scores: Sequence[FloatArray]) -> tuple[float, float]:
    """Within items and between items, each a mean over requests; `scores`: [orders, items] per request."""
    within = [one.var(axis=0, ddof=1).mean() for one in scores]
    means = [one.mean(axis=0).var(ddof=1) for one in scores]
    between = [max(0.0, m - w / len(one)) for m, w, one in zip(means, within, scores, strict=True)]
    return float(np.mean(within)), float(np.mean(between))


def _slot_means(by_slot: Sequence[FloatArray]) -> tuple[SlotMean, ...]:
    found = []
    for slot in range(max(map(len, by_slot))):
        values = np.array([one[slot] for one in by_slot if slot < len(one)])
        mean, count = float(values.mean()), len(values)
        half = float("nan")
        if count > 1:
            half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))
        found.append(SlotMean(slot, mean, mean - half, mean + half, count))
    return tuple(found)
