"""Completions and chats as OpenAI has them: bodies to requests, answers to bodies, whole or as they are written.

What those APIs have and the engine does not is refused by name. Knows nothing of HTTP or of models. Invariant: the
text of a stream is the text of the whole answer, cut into pieces that are whole characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NewType

from blake3 import blake3

from rcllm.annotated import Ge, Gt, Interval, MaxLen, MinLen
from rcllm.core.decoding import Generated, GenerateOptions, Speculation
from rcllm.core.ranking import Level, TokenIds, UserId
from rcllm.core.texts import TextRequest
from rcllm.data.text import well_formed
from rcllm.errors import RequestError
from rcllm.prompt.chat import ROLES, ChatPrompt, Message
from rcllm.wire.bodies import Object, read, read_text, served
from rcllm.wire.score import usage_to_json

Prompts = NewType("Prompts", tuple)  # type: ignore[type-arg]  # of texts and of token ids
Stops = NewType("Stops", tuple)  # type: ignore[type-arg]  # of texts
Turn = NewType("Turn", object)  # a Message
STRICT = Speculation("strict")
_MAX_CHOICES = 16
_UNSERVED: dict[str, tuple[object, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_IGNORED = (
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
_TURN_FIELDS = {"role", "content", "name", "refusal", "annotations"}
_FINISHED = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class StreamOptions:
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against those who listen to the sizes of packets: none is added


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoding:
    """What both bodies have in common."""

    model: str = ""
    temperature: Annotated[float, Interval(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    n: Annotated[int, Interval(ge=1, le=_MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stops = Stops(())
    seed: int | None = None  # None: made of the request's id, which the answer names
    user: Annotated[UserId, MaxLen(512)] | None = None  # whose words the prompt is, so that its KV may be kept
    pool: Annotated[str, MaxLen(64)] = ""  # earlier answers to draft from, by a name of the caller's
    speculation: Speculation = STRICT
    level: Level | None = None
    deadline_ms: Annotated[float, Gt(0)] | None = None
    tenant: Annotated[str, MaxLen(64)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionBody(_Decoding):
    prompt: Prompts
    max_tokens: Annotated[int, Ge(1)] = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBody(_Decoding):
    messages: Annotated[tuple[Turn, ...], MinLen(1)]
    max_tokens: Annotated[int, Ge(1)] | None = None  # None: as many as the server gives
    max_completion_tokens: Annotated[int, Ge(1)] | None = None


def parse_completion(value: Object) -> CompletionBody:
    """Raises RequestError."""
    return read(CompletionBody, served(value, _UNSERVED, _IGNORED), _READERS)


def parse_chat(value: Object) -> ChatBody:
    """Raises RequestError."""
    return read(ChatBody, served(value, _UNSERVED, _IGNORED), _READERS)


def _read_prompts(value: object) -> tuple[str | TokenIds, ...]:
    if isinstance(value, str):
        return (well_formed(value),)
    if isinstance(value, list) and value and all(map(_is_token, value)):
        return (tuple(value),)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return tuple(map(well_formed, value))
    if isinstance(value, list) and value and all(isinstance(e, list) and all(map(_is_token, e)) for e in value):
        return tuple(map(tuple, value))
    raise RequestError("expected a text, a list of texts, token ids, or a list of lists of token ids")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise RequestError("expected a text or a list of texts that are not empty")
    return tuple(map(well_formed, stops))


def _read_turn(value: object) -> Message:
    match value:
        case {"role": str(role), "content": content}:
            if role not in ROLES:
                raise RequestError(f"expected a role of {', '.join(ROLES)}")
            if isinstance(value, Mapping) and value.keys() - _TURN_FIELDS:
                raise RequestError("expected role and content alone: calls of tools are not served here")
            return Message(role, _content(content))
    raise RequestError("expected an object with role and content")


def _content(value: object) -> str:
    """A text, or parts that are texts."""
    match value:
        case str():
            return well_formed(value)
        case list():
            return "".join(_part(each) for each in value)
    raise RequestError("expected content to be a text or a list of text parts")


def _part(value: object) -> str:
    match value:
        case {"type": "text", "text": str(text)}:
            return well_formed(text)
    raise RequestError("expected text parts alone: images and sounds are not served here")


_READERS: Mapping[Any, Any] = {Prompts: _read_prompts, Stops: _read_stops, Turn: _read_turn, str: read_text}


# ---- to requests ----------------------------------------------------------------------------------------------------


def text_requests(
    body: CompletionBody | ChatBody, request_id: str, prompts: Sequence[ChatPrompt], max_tokens: int
) -> list[TextRequest]:
    """A request per choice, `n` for each prompt, whose seeds follow each other. Raises ConfigError."""
    seed = body.seed if body.seed is not None else int.from_bytes(blake3(request_id.encode()).digest()[:4], "little")
    return [
        TextRequest(
            f"{request_id}-{place * body.n + choice}" if len(prompts) * body.n > 1 else request_id,
            user_id=body.user,
            options=GenerateOptions(
                max_tokens=max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=(seed + choice) % (1 << 64),
                stop=body.stop,
                speculation=body.speculation if body.pool else Speculation("none"),
            ),
            level=body.level,
            tenant=body.tenant,
            parts=prompt.parts,
            shares_first=prompt.shares_first,
            pool=body.pool,
        )
        for place, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]


# ---- to answers -----------------------------------------------------------------------------------------------------


class Pieces:
    """The text of an answer in the pieces that may be shown so far: whole characters that begin no stop string."""

    def __init__(self, decode: Any, stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._shown = 0  # characters

    def more(self, token_ids: Sequence[int]) -> str:
        """What comes with these tokens."""
        self._ids += token_ids
        text = self._decode(self._ids)
        return self._take(text[: len(text) - self._held_back(text)])

    def rest(self, text: str) -> str:
        """What is left of the whole `text`."""
        return self._take(text)

    def _take(self, text: str) -> str:
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece

    def _held_back(self, text: str) -> int:
        """Characters at the end that are not whole, or that may become a stop string."""
        incomplete = len(text) - len(text.rstrip("\ufffd"))
        for stop in self._stop:
            if (place := text.find(stop)) >= 0:
                incomplete = max(incomplete, len(text) - place)
            begun = (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
            incomplete = max(incomplete, next(begun, 0))
        return incomplete


@dataclass(frozen=True, slots=True)
class Named:
    """What stands in every object of one answer."""

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, answers: Sequence[Generated], num_prompts: int) -> dict[str, object]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind) | {"choices": choices, "usage": usage_of(answers, num_prompts)}

    def piece(
        self, index: int, text: str, finish: Generated | None = None, *, first: bool = False
    ) -> dict[str, object]:
        """One object of a stream."""
        reason = _FINISHED[finish.finish_reason] if finish is not None else None
        choice: dict[str, object] = {"index": index, "logprobs": None, "finish_reason": reason}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind) | {"choices": [choice]}

    def usage(self, answers: Sequence[Generated], num_prompts: int) -> dict[str, object]:
        """The last object of a stream that is to count."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind) | {"choices": [], "usage": usage_of(answers, num_prompts)}

    def _object(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, answer: Generated) -> dict[str, object]:
        choice: dict[str, object] = {"index": index, "logprobs": None}
        choice["finish_reason"] = _FINISHED[answer.finish_reason]
        if self.chat:
            return choice | {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return choice | {"text": answer.text}


def usage_of(answers: Sequence[Generated], num_prompts: int) -> dict[str, object]:
    """A prompt that has several choices counts once, as OpenAI counts."""
    step = max(1, len(answers) // num_prompts)
    prompts = [answer.receipt for answer in answers[::step]]
    return usage_to_json(
        sum(receipt.num_tokens for receipt in prompts),
        sum(len(answer.token_ids) for answer in answers),
        sum(receipt.num_reused for receipt in prompts),
    )
