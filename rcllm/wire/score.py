"""Scores as SGLang and as vLLM have them, at one address: a body is told apart by its fields.

SGLang's `query` and `items` are token ids or texts, joined as they are, and the answer is how likely each label token
is next. vLLM's pairs of texts are answered as reranking is. Knows nothing of HTTP or of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NewType

from rcllm.annotated import Gt, MinLen
from rcllm.core.ranking import Level, TokenIds, UserId
from rcllm.core.texts import ScoreRequest, ScoreResponse
from rcllm.data.text import well_formed
from rcllm.errors import RequestError
from rcllm.wire.bodies import Object, named, read, read_text, served
from rcllm.wire.rerank import RerankBody, parse_rerank

TextOrIds = NewType("TextOrIds", object)  # a text or a list of token ids
TextsOrIds = NewType("TextsOrIds", tuple)  # type: ignore[type-arg]  # of them
_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
_IGNORED = ("priority", "mm_processor_kwargs", "truncate_prompt_tokens", "activation", "rid")


@dataclass(frozen=True, slots=True)
class SglangBody:
    query: TextOrIds
    items: TextsOrIds
    label_token_ids: Annotated[tuple[int, ...], MinLen(1)]
    apply_softmax: bool = False
    item_first: bool = False
    model: str = ""
    user: UserId | None = None
    level: Level | None = None
    deadline_ms: Annotated[float, Gt(0)] | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class PairsBody:
    """Pairs of texts, grouped by the first one: each group is one reranking."""

    groups: tuple[RerankBody, ...]
    places: tuple[tuple[int, ...], ...]  # per group, which pair each of its documents is of


def parse_score(value: Object) -> SglangBody | PairsBody:
    """Raises RequestError."""
    if "query" in value or "label_token_ids" in value:
        readers = {TextOrIds: _read_text_or_ids, TextsOrIds: _read_items, str: read_text}
        return read(SglangBody, served(value, {}, _IGNORED), readers)
    for names in _PAIRS:
        if all(value.get(name) is not None for name in names):
            return _pairs(value, *names)
    told = ", ".join(f"{one} and {other}" for one, other in _PAIRS)
    raise RequestError(f"expected query, items and label_token_ids (SGLang), or two lists of texts (vLLM): {told}")


def _pairs(value: Object, first: str, second: str) -> PairsBody:
    firsts, seconds = _texts(value[first], first), _texts(value[second], second)
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise named(f"{second}: expected as many texts as in {first}, or one in {first}, got {len(seconds)}", second)
    grouped: dict[str, list[int]] = {}
    for place, text in enumerate(firsts):
        grouped.setdefault(text, []).append(place)
    rest = served(value, {}, (first, second, *_IGNORED))
    groups = [
        parse_rerank({**rest, "query": text, "documents": [seconds[place] for place in places]})
        for text, places in grouped.items()
    ]
    return PairsBody(tuple(groups), tuple(map(tuple, grouped.values())))


def _texts(value: object, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise named(f"{name}: expected a text, or a list of texts that are not empty", name)
    return [well_formed(text) for text in texts]


def _read_text_or_ids(value: object) -> str | TokenIds:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return tuple(value)
    raise RequestError("expected a text or a list of token ids")


def _read_items(value: object) -> tuple[str | TokenIds, ...]:
    if isinstance(value, str):
        return (well_formed(value),)
    if not isinstance(value, list) or not value:
        raise RequestError("expected a text, a list of texts, or a list of lists of token ids")
    return tuple(_read_text_or_ids(each) for each in value)


def score_request(
    body: SglangBody, request_id: str, opening: Callable[[str], TokenIds], going_on: Callable[[str], TokenIds]
) -> ScoreRequest:
    """`opening` tokenises what begins a prompt, with the tokens that stand before all; `going_on` any other text."""

    def ids(given: object, encode: Callable[[str], TokenIds]) -> TokenIds:
        return encode(given) if isinstance(given, str) else given  # type: ignore[return-value]  # as it was read

    query = ids(body.query, going_on if body.item_first else opening)
    items = tuple(ids(item, opening if body.item_first else going_on) for item in body.items)
    labels = body.label_token_ids
    return ScoreRequest(request_id, query, items, labels, body.item_first, body.user, body.level, body.tenant)


def score_to_json(body: SglangBody, response: ScoreResponse, model: str) -> dict[str, object]:
    """Probabilities, in the order of the labels: among them where `apply_softmax`, else among all tokens."""
    rows = [_softmax(row) if body.apply_softmax else list(map(math.exp, row)) for row in response.log_probs]
    receipt = response.receipt
    return {
        "scores": rows,
        "model": model,
        "usage": usage_to_json(receipt.num_tokens, 0, receipt.num_reused),
        "object": "scoring",
    }


def _softmax(row: Sequence[float]) -> list[float]:
    highest = max(row)
    parts = [math.exp(value - highest) for value in row]
    return [part / sum(parts) for part in parts]


def pairs_to_json(scores: Mapping[int, float], num_tokens: int, num_reused: int, **named: object) -> dict[str, object]:
    """`scores`: by pair; `named`: id, model, created."""
    data = [{"index": place, "object": "score", "score": scores[place]} for place in sorted(scores)]
    return {**named, "object": "list", "data": data, "usage": usage_to_json(num_tokens, 0, num_reused)}


def usage_to_json(num_prompt: int, num_answer: int, num_cached: int) -> dict[str, object]:
    """As OpenAI counts."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
