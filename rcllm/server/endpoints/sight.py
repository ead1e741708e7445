"""What a person or a program sees of the server: whether it lives and is ready, what it is, holds and has answered.

Knows nothing of how answers come about.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from starlette.responses import Response

from rcllm.errors import NotServedError
from rcllm.plain_json import without_nan
from rcllm.schedule.replay import TOLERANCE, first_difference, request_again
from rcllm.schedule.work import Terms
from rcllm.server.backend import Asked
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
    """What every tier holds, how fast it is, what waits, and how well passes were estimated."""
    return JsonReply(without_nan(asdict(ask.served.backend.stats())))


async def guard(ask: Ask) -> JsonReply:
    """Where the fidelity guard stands: rungs, evidence by kind of requests, and the latest steps."""
    status = ask.served.backend.stats().guard
    return JsonReply({"guarding": status is not None, **(without_nan(asdict(status)) if status is not None else {})})


async def metrics(ask: Ask) -> Response:
    return Response(ask.served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def receipt(ask: Ask) -> JsonReply:
    found = _found(ask)
    told = {"request_id": found.response.request_id, "receipt": without_nan(asdict(found.response.receipt))}
    return JsonReply(told)


async def replay(ask: Ask) -> JsonReply:
    """Runs a request again as it was computed, and names the first difference between the two answers."""
    found, backend = _found(ask), ask.served.backend
    request = request_again(found.asked.request, found.response, backend.about.options)
    again = await backend.answer(Asked(request, Terms(deadline_ms=math.inf), again=True))
    difference = first_difference(found.response, again)
    return JsonReply(
        {
            "request_id": request.request_id,
            "same": difference is None,
            "first_difference": None if difference is None else asdict(difference),
            "level": again.receipt.level,
            "tolerance": TOLERANCE,
        }
    )


def _found(ask: Ask) -> Answered:
    """What this caller was answered. Raises NotServedError."""
    found = ask.served.answers.find(ask.caller.name, ask.path("request_id"))
    if found is None:
        raise NotServedError(
            "there is no answer with this request id: it was never given to this key, or so many were since "
            "(server.kept_answers)"
        )
    return found
