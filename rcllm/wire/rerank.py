"""Reranking as Jina, Cohere and vLLM have it: a query, documents, and how relevant each is.

A document becomes a candidate with its text, the query the one thing that the user did, in the user's own words.
Knows nothing of HTTP or of models. Invariant: a relevance lies between 0 and 1, and equal documents have equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, NewType

from rcllm.annotated import Ge, Gt, MinLen
from rcllm.core.ranking import Event, ItemId, Level, RankOptions, RankRequest, RankResponse, Readout, UserId
from rcllm.data.text import as_text
from rcllm.errors import RequestError
from rcllm.prompt.plain import text_id
from rcllm.wire.bodies import Object, read, read_text, served
from rcllm.wire.rank import fields_of

Document = NewType("Document", dict)  # type: ignore[type-arg]  # fields by name, of texts
_UNSERVED: dict[str, tuple[object, ...]] = {"truncate_prompt_tokens": (-1,), "use_activation": (True,), "softmax": ()}
_IGNORED = ("priority", "max_chunks_per_doc", "max_tokens_per_doc", "truncation", "activation", "mm_processor_kwargs")


@dataclass(frozen=True, slots=True)
class RerankBody:
    query: Annotated[str, MinLen(1)]
    documents: Annotated[tuple[Document, ...], MinLen(1)]
    model: str = ""
    top_n: Annotated[int, Ge(0)] = 0  # 0: all
    return_documents: bool | None = None
    rank_fields: tuple[str, ...] = ()  # of documents that are objects; empty: all
    user: UserId | None = None  # whose words the query is, so that its KV may be kept
    level: Level | None = None
    deadline_ms: Annotated[float, Gt(0)] | None = None
    tenant: str = ""


def parse_rerank(value: Object) -> RerankBody:
    """Raises RequestError."""
    return read(RerankBody, served(value, _UNSERVED, _IGNORED), {Document: _read_document, str: read_text})


def _read_document(value: object) -> Document:
    match value:
        case str():
            return Document({"text": as_text(value)})
        case Mapping():
            return Document({str(name): as_text(inner) for name, inner in value.items()})
    raise RequestError("expected a document to be a text, or an object of texts by name")


@dataclass(frozen=True, slots=True)
class Reranking:
    """A ranking that answers a body, and which candidate each document is: equal ones are one."""

    request: RankRequest
    candidate_of: tuple[int, ...]  # per document

    @classmethod
    def of(
        cls, body: RerankBody, request_id: str, options: RankOptions, shown: tuple[str, ...], text_field: str
    ) -> Reranking:
        """`options`: of the ranking; `shown`: the fields that the template shows."""
        texts: dict[ItemId, dict[str, str]] = {}
        ids = []
        for document in body.documents:
            fields = _fields(document, body.rank_fields, shown, text_field)
            item_id = ItemId(text_id(repr(sorted(fields.items()))))
            texts[item_id] = fields
            ids.append(item_id)
        if body.level is not None:
            options = replace(options, level=body.level)
        places = {item_id: place for place, item_id in enumerate(texts)}
        history = (Event(text=body.query),)
        request = RankRequest(
            request_id, tuple(texts), history, body.user, texts=texts, options=options, tenant=body.tenant
        )
        return cls(request, tuple(places[item_id] for item_id in ids))

    def relevances(self, response: RankResponse) -> dict[int, float]:
        """By document; without those that were left out to keep a deadline."""
        readout, asked = response.receipt.readout, self.request.candidates
        scores = dict(zip(response.candidates, response.scores, strict=True))
        found = ((document, scores.get(asked[candidate])) for document, candidate in enumerate(self.candidate_of))
        return {document: relevance(readout, score) for document, score in found if score is not None}


def _fields(document: Document, chosen: tuple[str, ...], shown: tuple[str, ...], text_field: str) -> dict[str, str]:
    """Of one document; where the template shows none of its fields, they are all written into the one that it does."""
    fields = fields_of({name: text for name, text in document.items() if not chosen or name in chosen}, text_field)
    if not fields or any(name in shown for name in fields):
        return fields
    return {text_field: ", ".join(f"{name}: {text}" for name, text in fields.items())}


def relevance(readout: str | Readout, score: float) -> float:
    """From 0 to 1: the probability of yes against no, of the label among the candidates, or per token of the text."""
    if readout != "pointwise":
        return math.exp(min(score, 0.0))
    return 1.0 / (1.0 + math.exp(-score)) if score >= 0 else 1.0 - 1.0 / (1.0 + math.exp(score))


def rerank_to_json(
    body: RerankBody, reranking: Reranking, response: RankResponse, model: str, *, documents: bool
) -> dict[str, object]:
    """Best first. `documents`: whether they are returned where the body does not say."""
    relevances = reranking.relevances(response)
    best = sorted(relevances, key=lambda i: -relevances[i])[: body.top_n or None]
    shows = documents if body.return_documents is None else body.return_documents
    results: list[dict[str, object]] = []
    for index in best:
        result: dict[str, object] = {"index": index, "relevance_score": relevances[index]}
        results.append(result | ({"document": dict(body.documents[index])} if shows else {}))
    receipt = response.receipt
    meta: dict[str, object] = {
        "api_version": {"version": "2"},
        "tokens": {"input_tokens": receipt.num_tokens},
        "cached_tokens": receipt.num_reused,
    }
    if receipt.notes:
        meta["warnings"] = list(receipt.notes)
    if receipt.degraded:
        meta["degraded"] = list(receipt.degraded)
    return {
        "id": response.request_id,
        "model": model,
        "usage": {"prompt_tokens": receipt.num_tokens, "total_tokens": receipt.num_tokens},
        "results": results,
        "meta": meta,
    }
