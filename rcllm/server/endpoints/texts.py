"""`/v1/completions`, `/v1/chat/completions`, `/tokenize` and `/detokenize`.

Knows nothing of how texts come about. Invariant: what is wrong with a request is told by its status, also where the
answer would be a stream; a stream ends with `[DONE]`, or with an error and no `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise

from starlette.responses import Response

from rcllm.core.decoding import Generated
from rcllm.core.texts import TextRequest
from rcllm.plain_json import to_json
from rcllm.prompt.chat import ChatPrompt
from rcllm.server.failures import error_body
from rcllm.server.reply import EventStream, JsonReply
from rcllm.server.served import Ask
from rcllm.wire.items import parse_detokenize, parse_tokenize
from rcllm.wire.openai import ChatBody, CompletionBody, Named, Pieces, parse_chat, parse_completion, text_requests

_DONE = "[DONE]"
_PART = 64  # tokens of a prompt that are cached as one, so that prompts that begin alike share their beginning


async def completions(ask: Ask) -> Response:
    body = parse_completion(ask.value)
    ask.check_model(body.model)
    ask.check_items(len(body.prompt) * body.n, "prompt")
    texts = ask.served.backend.texts
    prompts = [texts.opening(each) if isinstance(each, str) else each for each in body.prompt]
    ask.check_tokens(sum(map(len, prompts)))
    return await _answered(ask, body, [_in_parts(ids) for ids in prompts], body.max_tokens, "cmpl")


async def chat(ask: Ask) -> Response:
    body = parse_chat(ask.value)
    ask.check_model(body.model)
    prompt = ask.served.backend.texts.chat(body.messages)  # type: ignore[arg-type]  # they were read as messages
    ask.check_tokens(sum(map(len, prompt.parts)))
    wanted = body.max_completion_tokens or body.max_tokens or ask.served.config.max_tokens
    return await _answered(ask, body, [prompt], wanted, "chatcmpl")


def _in_parts(ids: Sequence[int]) -> ChatPrompt:
    """Whole parts, and a last one of what is left."""
    cuts = [*range(0, len(ids), _PART), len(ids)]
    parts = tuple(tuple(ids[start:stop]) for start, stop in pairwise(cuts))
    return ChatPrompt(parts or ((),), shares_first=False)


async def _answered(
    ask: Ask, body: CompletionBody | ChatBody, prompts: Sequence[ChatPrompt], wanted: int, prefix: str
) -> Response:
    max_tokens = min(wanted, ask.served.config.max_tokens)
    requests = text_requests(body, ask.request_id, prompts, max_tokens)
    named = Named(
        f"{prefix}-{ask.request_id}", int(ask.served.wall_clock()), ask.served.model, isinstance(body, ChatBody)
    )
    if body.stream:
        events = _stream(ask, body, requests, named, len(prompts))
        return EventStream(await anext(events), events, ask.end_s)
    async with asyncio.TaskGroup() as together:
        tasks = [together.create_task(ask.answer(each, body.deadline_ms)) for each in requests]
    return JsonReply(named.whole([task.result() for task in tasks], len(prompts)))


# ---- streams --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _News:
    """What became known of one choice: tokens, or how it ended."""

    index: int
    token_ids: Sequence[int] = ()
    ended: Generated | Exception | None = None


async def _stream(
    ask: Ask, body: CompletionBody | ChatBody, requests: Sequence[TextRequest], named: Named, num_prompts: int
) -> AsyncGenerator[str, None]:
    """The data of each event. Raises what is wrong with the request before the first one."""
    decode = ask.served.backend.texts.decode
    pieces = [Pieces(decode, request.options.stop) for request in requests]
    begun, answers = [False] * len(requests), dict[int, Generated]()
    async with aclosing(_news(ask, body, requests)) as news:
        async for each in news:
            index, ended = each.index, each.ended
            if isinstance(ended, Exception):
                if not any(begun):
                    raise ended
                yield to_json(error_body(ended)[1])
                return
            text = pieces[index].more(each.token_ids) if ended is None else pieces[index].rest(ended.text)
            if ended is not None:
                answers[index] = ended
            if text or ended is not None:
                yield to_json(named.piece(index, text, ended, first=not begun[index]))
                begun[index] = True
    if body.stream_options is not None and body.stream_options.include_usage:
        yield to_json(named.usage([answers[index] for index in range(len(requests))], num_prompts))
    yield _DONE


async def _news(
    ask: Ask, body: CompletionBody | ChatBody, requests: Sequence[TextRequest]
) -> AsyncGenerator[_News, None]:
    """What happens to all choices, in the order in which it does; they are withdrawn where nobody reads on."""
    queue = asyncio.Queue[_News]()

    async def follow(index: int, request: TextRequest) -> None:
        def on_tokens(token_ids: Sequence[int]) -> None:
            queue.put_nowait(_News(index, token_ids))

        try:
            ended = await ask.answer(request, body.deadline_ms, on_tokens)
        except Exception as error:
            queue.put_nowait(_News(index, ended=error))
        else:
            queue.put_nowait(_News(index, ended=ended))

    tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            each = await queue.get()
            left -= each.ended is not None
            yield each
    finally:
        for task in tasks:
            task.cancel()


# ---- tokens ---------------------------------------------------------------------------------------------------------


async def tokenize(ask: Ask) -> JsonReply:
    body = parse_tokenize(ask.value)
    ask.check_model(body.model)
    texts = ask.served.backend.texts
    ids = texts.opening(body.prompt) if body.add_special_tokens else texts.going_on(body.prompt)
    return JsonReply({"count": len(ids), "max_model_len": ask.served.backend.about.max_positions, "tokens": list(ids)})


async def detokenize(ask: Ask) -> JsonReply:
    body = parse_detokenize(ask.value)
    ask.check_model(body.model)
    return JsonReply({"prompt": ask.served.backend.texts.decode(body.tokens)})
