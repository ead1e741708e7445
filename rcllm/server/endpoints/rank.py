"""`/v1/rank`, `/v1/recommend`, reranking and scores: one pass for a list of candidates.

Knows nothing of how answers come about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rcllm.core.ranking import Event, RankOptions, whose
from rcllm.server.reply import JsonReply
from rcllm.server.served import Ask
from rcllm.wire.lines import recommendation_to_json, without_history
from rcllm.wire.rank import Body, parse_rank_body, parse_recommend_body, rank_to_json
from rcllm.wire.rerank import RerankBody, Reranking, parse_rerank, rerank_to_json
from rcllm.wire.score import PairsBody, SglangBody, pairs_to_json, parse_score, score_request, score_to_json


async def rank(ask: Ask) -> JsonReply:
    about = ask.served.backend.about
    body = parse_rank_body(ask.value, ask.request_id, about.options, about.text_field)
    known = _known(ask, body)
    request = replace(body.request, history=body.request.history or known.events)
    response = await ask.answer(request, body.extras.deadline_ms, prior=body.prior)
    return JsonReply(known.told(rank_to_json(response, body)))


async def recommend(ask: Ask) -> JsonReply:
    body = parse_recommend_body(ask.value, ask.request_id)
    known = _known(ask, body)
    request = replace(body.request, history=body.request.history or known.events)
    request = without_history(request) if body.unseen else request
    response = await ask.answer(request, body.extras.deadline_ms)
    answer = recommendation_to_json(response, receipts=body.extras.explain)
    return JsonReply(known.told({**answer, "scores": list(response.scores)}))


@dataclass(frozen=True, slots=True)
class _Known:
    """What the server was told of the user, as far as a request can still name it."""

    events: tuple[Event, ...] = ()
    num_gone: int = 0  # more that it was told of, whose items have left the catalogue since

    def told(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """An answer that says how many events the server itself knew of, and in its notes how many it left out."""
        notes = [f"{self.num_gone} known events are left out, since the catalogue no longer has their items"]
        known = {"known_events": len(self.events)} if self.events else {}
        return {**answer, **known, **({"notes": [*answer.get("notes", ()), *notes]} if self.num_gone else {})}


def _known(ask: Ask, body: Body[Any]) -> _Known:
    """Nothing where the body itself says what the user did."""
    if body.has_history:
        return _Known()
    request, items = body.request, ask.served.backend.items
    events = ask.served.histories.of(whose(request.user_id, ask.tenant_of(request.tenant)))
    left = tuple(event for event in events if event.item_id is None or event.item_id in items)
    return _Known(left, len(events) - len(left))


async def rerank(ask: Ask) -> JsonReply:
    """As Jina and vLLM answer: documents stand in the answer unless the body says otherwise."""
    return await _rerank(ask, documents=True)


async def rerank_v2(ask: Ask) -> JsonReply:
    """As Cohere answers: an index, and no document unless the body asks for it."""
    return await _rerank(ask, documents=False)


async def _rerank(ask: Ask, *, documents: bool) -> JsonReply:
    body = parse_rerank(ask.value)
    ask.check_model(body.model)
    ask.check_items(len(body.documents), "documents")
    reranking = _reranking(ask, body, ask.request_id)
    response = await ask.answer(reranking.request, body.deadline_ms)
    return JsonReply(rerank_to_json(body, reranking, response, ask.served.model, documents=documents))


def _reranking(ask: Ask, body: RerankBody, request_id: str) -> Reranking:
    about = ask.served.backend.about
    options = replace(about.options, readout=about.rerank)
    if about.rerank == "pointwise":  # candidates are branches after the history; letters have no bias to correct
        options = replace(options, layout="history_first", bias=RankOptions().bias)
    return Reranking.of(body, request_id, options, about.shown, about.text_field)


async def score(ask: Ask) -> JsonReply:
    body = parse_score(ask.value)
    return await (_sglang(ask, body) if isinstance(body, SglangBody) else _pairs(ask, body))


async def _sglang(ask: Ask, body: SglangBody) -> JsonReply:
    ask.check_model(body.model)
    ask.check_items(len(body.items), "items")
    texts = ask.served.backend.texts
    request = score_request(body, ask.request_id, texts.opening, texts.going_on)
    ask.check_tokens(len(request.query) + sum(map(len, request.items)))
    response = await ask.answer(request, body.deadline_ms)
    return JsonReply(score_to_json(body, response, ask.served.model))


async def _pairs(ask: Ask, body: PairsBody) -> JsonReply:
    ask.check_model(body.groups[0].model)
    ask.check_items(sum(map(len, body.places)), "text_2")
    rerankings = [
        _reranking(ask, group, f"{ask.request_id}-{number}" if number else ask.request_id)
        for number, group in enumerate(body.groups)
    ]
    async with asyncio.TaskGroup() as together:
        tasks = [
            together.create_task(ask.answer(each.request, group.deadline_ms))
            for each, group in zip(rerankings, body.groups, strict=True)
        ]
    responses = [task.result() for task in tasks]
    scores = {
        places[document]: relevance
        for places, reranking, response in zip(body.places, rerankings, responses, strict=True)
        for document, relevance in reranking.relevances(response).items()
    }
    receipts = [response.receipt for response in responses]
    named = {"id": ask.request_id, "model": ask.served.model, "created": int(ask.served.wall_clock())}
    num_tokens, num_reused = sum(each.num_tokens for each in receipts), sum(each.num_reused for each in receipts)
    return JsonReply(pairs_to_json(scores, num_tokens, num_reused, **named))
