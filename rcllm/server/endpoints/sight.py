"""What a person or a program sees of the server: whether it lives and is ready, what it is, holds and has answered.

Knows nothing of how answers come about.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from starlette.responses import Response

from rcllm.core.decoding import Generated, RecommendResponse
from rcllm.core.ranking import RankResponse
from rcllm.core.texts import ScoreResponse
from rcllm.errors import NotServedError
from rcllm.plain_json import without_nan
from rcllm.server.kept import Answered
from rcllm.server.reply import JsonReply
from rcllm.server.served import Ask
from rcllm.version import __version__


async def health(ask: Ask) -> JsonReply:
    """Whether the process answers at all."""
    return JsonReply({"status": "ok"})


async def ready(ask: Ask) -> JsonReply:
    """Whether requests may be sent here: warm as far as the cache holds, and not going down."""
    warmth = ask.served.backend.stats().warmth
    is_ready = not warmth.running and not ask.served.is_closing
    told = {"ready": is_ready, "closing": ask.served.is_closing, "warming": asdict(warmth)}
    return JsonReply(told, 200 if is_ready else 503)


async def version(ask: Ask) -> JsonReply:
    return JsonReply({"version": __version__})


async def models(ask: Ask) -> JsonReply:
    about, served = ask.served.backend.about, ask.served
    model = {"id": served.model, "object": "model", "created": int(served.started_s), "owned_by": "rcllm"}
    more = {"root": about.model, "max_model_len": about.max_positions, "fingerprint": about.fingerprint}
    return JsonReply({"object": "list", "data": [{**model, **more, "kinds": sorted(about.kinds)}]})


async def cache_stats(ask: Ask) -> JsonReply:
    return JsonReply(asdict(ask.served.backend.stats()))


async def metrics(ask: Ask) -> Response:
    return Response(ask.served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def receipt(ask: Ask) -> JsonReply:
    found = _found(ask)
    told = {"request_id": found.response.request_id, "receipt": without_nan(asdict(found.response.receipt))}
    return JsonReply(told)


async def replay(ask: Ask) -> JsonReply:
    """Runs a request again as it was, and says where the two answers part first."""
    found = _found(ask)
    asked = replace(found.asked, deadline_ms=None)
    again = await ask.served.backend.answer(asked)
    difference = first_difference(found.response, again)
    told: dict[str, object] = {"request_id": asked.request.request_id, "same": difference is None}
    levels = {"then": found.response.receipt.level, "now": again.receipt.level}
    return JsonReply({**told, "first_difference": difference, "level": levels})


def _found(ask: Ask) -> Answered:
    """What this caller was answered. Raises NotServedError."""
    found = ask.served.answers.find(ask.caller.name, ask.path("request_id"))
    if found is None:
        raise NotServedError(
            "there is no answer with this request id: it was never given to this key, or so many were since "
            "(server.kept_answers)"
        )
    return found


def first_difference(then: Any, now: Any) -> dict[str, object] | None:
    """The first place at which two answers to one request differ; None where they are equal to the bit."""
    for name in _COMPARED[type(then)]:
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            return {"field": name, **_place(before, after)}
    return None


_COMPARED: dict[type, tuple[str, ...]] = {
    RankResponse: ("candidates", "scores", "order"),
    RecommendResponse: ("items", "scores"),
    ScoreResponse: ("log_probs",),
    Generated: ("token_ids", "text", "finish_reason"),
}


def _place(before: Any, after: Any) -> dict[str, object]:
    if not isinstance(before, tuple):
        return {"then": before, "now": after}
    pairs = zip(before, after, strict=False)
    index = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(before), len(after)))
    then, now = (values[index] if index < len(values) else None for values in (before, after))
    return {"index": index, "then": then, "now": now}
