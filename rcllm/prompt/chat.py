"""Conversations as token ids, by the model's own chat template.

The template is rendered with marks in the place of what people wrote, which is tokenised apart and put in afterwards:
no message can write a control token, whatever it says. Knows nothing of requests. Invariant: parts joined are the whole
prompt, and each but the last ends with a message.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from rcllm.core.ranking import TokenIds
from rcllm.errors import RequestError
from rcllm.late import Late
from rcllm.prompt.template import ChatFormat
from rcllm.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import sandbox
else:
    sandbox = Late("jinja2.sandbox")

_MARK = re.compile("\ue000([0-9]+)\ue001")  # of the private use area, where no template has anything to say
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    parts: tuple[TokenIds, ...]  # each ends with a message, but for the last: what stands before the answer
    shares_first: bool  # the first part is the application's words: a system message and what stands around it


class Chat:
    """Writes conversations for one model. Safe to share."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        """`chat_format`: for a model without a chat template."""
        self._tokenizer, self._format = tokenizer, chat_format

    def prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """Raises RequestError for no messages, and for what the model's template does not take."""
        if not messages:
            raise RequestError("messages: expected at least one message, got none")
        marked = [{"role": each.role, "content": f"\ue000{i}\ue001"} for i, each in enumerate(messages)]
        text = self._rendered(marked)
        pieces = _MARK.split(text)  # template, number, template, number, …, template
        parts: list[TokenIds] = []
        opening: TokenIds = self._tokenizer.encode_opening(pieces[0])
        bos = self._tokenizer.bos_ids
        if bos and opening[: len(bos)] != bos:
            opening = bos + opening
        for number, template in zip(pieces[1::2], pieces[2::2], strict=True):
            parts.append(opening + self._tokenizer.encode(messages[int(number)].content))
            opening = self._tokenizer.encode_control(template)
        if not opening:
            raise RequestError("messages: the model's chat template leaves nothing to answer after the last message")
        shares = bool(parts) and pieces[1] == "0" and messages[0].role in ("system", "developer")
        return ChatPrompt((*parts, opening), shares)

    def _rendered(self, messages: Sequence[dict[str, str]]) -> str:
        told = self._tokenizer.chat
        if told.template is None:
            return _by_format(self._format, messages)
        try:
            values = {"messages": messages, "add_generation_prompt": True, **told.tokens}
            return str(_compiled(told.template).render(**values))
        except Exception as error:  # whatever the text of a template does
            raise RequestError(f"messages: the model's chat template does not take these: {error}") from error


def _by_format(chat: ChatFormat, messages: Sequence[dict[str, str]]) -> str:
    before = {"user": chat.user, "tool": chat.user, "assistant": chat.assistant}
    first = "" if messages[0]["role"] in ("system", "developer") else chat.system
    turns = (before.get(each["role"], chat.system) + each["content"] for each in messages)
    return first + "".join(turns) + chat.assistant


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """As transformers compiles them: in a sandbox that changes nothing."""
    world = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    world.globals["raise_exception"] = _refuse
    return world.from_string(template)


def _refuse(message: str) -> NoReturn:
    """What templates call where the turns are in no order that they know."""
    raise ValueError(message)
