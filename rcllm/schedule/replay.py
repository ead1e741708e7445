"""Runs an answered request again: what to ask for, and the first difference between the two answers.

Pure, and never imports torch; whoever keeps answers decides how many and for how long. Invariant: what is asked again
is what was computed, after degradation, so that neither a deadline nor a guard that has stepped since changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from rcllm.core.decoding import Generated, GenerateRequest, RecommendRequest, RecommendResponse
from rcllm.core.ranking import Level, RankOptions, RankRequest, RankResponse
from rcllm.core.texts import ScoreRequest, ScoreResponse, TextRequest
from rcllm.errors import RequestError

Request = RankRequest | RecommendRequest | GenerateRequest | ScoreRequest
Response = RankResponse | RecommendResponse | Generated | ScoreResponse
R = TypeVar("R", bound=Request)

TOLERANCE = 1e-3  # of scores: what the cache changes by rounding in fp32 (docs/numerics.md); give more for 16 bits


@dataclass(frozen=True, slots=True)
class Difference:
    """The first one, in the order in which causes come before effects."""

    where: str  # model, epoch, num_tokens, level, candidates, scores[3], order[0], token_ids[7], …
    before: str
    after: str


def request_again(request: R, response: Response, defaults: RankOptions) -> R:
    """The request that `response` answered, with everything pinned that was decided on the way.

    `defaults`: options of requests that bring none. Raises RequestError for an answer that cannot come out again: one
    of last known scores was not computed, one under bias `running_mean` depends on the requests before it, and one of
    relaxed speculation on the drafts that there were.
    """
    if isinstance(request, TextRequest) and request.pool and request.options.speculation.name == "relaxed":
        raise RequestError(f"request {request.request_id!r}: relaxed speculation depends on the answers before it")
    if not isinstance(request, RankRequest):
        return request  # beam, seed and level stand in it
    assert isinstance(response, RankResponse)
    receipt, options = response.receipt, request.options or defaults
    if "last_scores" in receipt.degraded:
        raise RequestError(f"request {request.request_id!r} was answered by last known scores, which nothing computes")
    if receipt.bias == "running_mean":
        raise RequestError(f"request {request.request_id!r}: bias running_mean depends on the requests before it")
    pinned = replace(options, level=Level.parse(receipt.level), selection=receipt.selection or options.selection)
    return replace(request, candidates=response.candidates, options=pinned)


def first_difference(before: Response, after: Response, tolerance: float = TOLERANCE) -> Difference | None:
    """Where two answers to one request differ first; None: nowhere, scores within `tolerance`.

    Of two orders that differ only among scores within the tolerance, none is wrong, and it is no difference.
    """
    for where, one, other in _facts(before, after):
        if one != other:
            return Difference(where, str(one), str(other))
    if isinstance(before, Generated):
        assert isinstance(after, Generated)
        return _first("token_ids", before.token_ids, after.token_ids)
    assert not isinstance(after, Generated)
    if isinstance(before, ScoreResponse):
        assert isinstance(after, ScoreResponse)
        return _of_labels(before, after, tolerance)
    assert not isinstance(after, ScoreResponse)
    if isinstance(before, RecommendResponse):
        assert isinstance(after, RecommendResponse)
        return _of_items(before, after, tolerance)
    return _of_scores(before.scores, after.scores, tolerance)


def _facts(before: Response, after: Response) -> list[tuple[str, object, object]]:
    """What must agree for answers to be comparable, causes first."""
    names = ["model", "epoch", "level", "history", "layout", "readout", "num_tokens"]
    one, other = before.receipt, after.receipt
    facts = [(name, getattr(one, name), getattr(other, name)) for name in names if hasattr(one, name)]
    if isinstance(before, RankResponse) and isinstance(after, RankResponse):
        facts.append(("candidates", before.candidates, after.candidates))
    return facts


def _of_scores(before: tuple[float, ...], after: tuple[float, ...], tolerance: float) -> Difference | None:
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        if not abs(one - other) <= tolerance:
            return Difference(f"scores[{i}]", f"{one:.6g}", f"{other:.6g}")
    return None


def _of_labels(before: ScoreResponse, after: ScoreResponse, tolerance: float) -> Difference | None:
    for i, (one, other) in enumerate(zip(before.log_probs, after.log_probs, strict=True)):
        if found := _of_scores(one, other, tolerance):
            return replace(found, where=f"log_probs[{i}]{found.where.removeprefix('scores')}")
    return None


def _of_items(before: RecommendResponse, after: RecommendResponse, tolerance: float) -> Difference | None:
    """Items of scores within the tolerance may have changed places."""
    if len(before.items) == len(after.items) and (found := _of_scores(before.scores, after.scores, tolerance)):
        return found
    kept = dict(zip(after.items, after.scores, strict=True))
    for i, (item_id, score) in enumerate(zip(before.items, before.scores, strict=True)):
        there = kept.get(item_id)
        if there is None or not abs(there - score) <= tolerance:
            return Difference(f"items[{i}]", item_id, after.items[i] if i < len(after.items) else "")
    return _first("items", before.items, after.items) if len(before.items) != len(after.items) else None


def _first(name: str, before: tuple[object, ...], after: tuple[object, ...]) -> Difference | None:
    for i, (one, other) in enumerate(zip(before, after, strict=False)):
        if one != other:
            return Difference(f"{name}[{i}]", str(one), str(other))
    if len(before) != len(after):
        return Difference(f"len({name})", str(len(before)), str(len(after)))
    return None
