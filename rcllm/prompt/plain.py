"""Prompts of token ids that somebody else wrote: no template, no catalogue; still typed blocks with keys.

Knows nothing of texts. Invariant: a prompt holds the given tokens in order and no others; what a user
wrote has no key that another user's words could share.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from rcllm.core.ranking import HistoryMode, Level, Prompt, RankOptions, RankRequest, Read, TokenIds
from rcllm.core.receipts import BlockKind
from rcllm.core.texts import ScoreRequest, TextRequest
from rcllm.errors import ConfigError, PromptTooLongError, RequestError
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.draft import Draft
from rcllm.prompt.keys import token_bytes

_ALLOWED = "full, exact, linked(k), tail(r), blocks"


def text_prompt(prompter: Prompter, request: TextRequest) -> Prompt:
    """Raises RequestError for no tokens, tokens that the vocabulary lacks, and too many."""
    parts = [part for part in request.parts if part]
    if not parts:
        raise RequestError(f"request {request.request_id!r}: the prompt is empty; there is nothing to go on from")
    _check_tokens(prompter, request.request_id, parts)
    draft = _draft(prompter, request, "chain")
    shared = request.shares_first and len(parts) > 1
    for number, part in enumerate(parts[:-1]):
        if number == 0 and shared:
            draft.add(BlockKind.INSTRUCTION, part)
        else:
            draft.add(BlockKind.HISTORY, part, draft.user, private=True)
    last = draft.add(BlockKind.QUESTION, parts[-1])
    draft.reads.append(Read(last, len(parts[-1]) - 1, ()))
    return _finished(prompter, draft, 0)


def score_prompt(prompter: Prompter, request: ScoreRequest) -> Prompt:
    """The query, and the items as branches that do not see each other; or each item, and the query after it.

    Raises RequestError.
    """
    if not request.items or not request.label_ids:
        raise RequestError(f"request {request.request_id!r}: expected at least one item and one label token")
    if not all(request.items) or (request.item_first and not request.query):
        raise RequestError(f"request {request.request_id!r}: expected tokens in every item, got an empty text")
    _check_tokens(prompter, request.request_id, [request.query, *request.items, request.label_ids])
    draft = _draft(prompter, request, "shared")
    if request.query and not request.item_first:
        draft.add(BlockKind.HISTORY, request.query, draft.user, private=True)
    draft.isolate_slots()
    for slot, item in enumerate(request.items):
        draft.open_slot(slot)
        if request.item_first:
            _add_item(prompter, draft, item)
            asked = request.query
        else:
            _add_item(prompter, draft, item[:-1])
            asked = item[-1:]  # fresh: its hidden state is read
        read = draft.add(BlockKind.QUESTION, asked)
        draft.reads.append(Read(read, len(asked) - 1, request.label_ids, slot))
    draft.close_slots()
    return _finished(prompter, draft, len(request.items))


def _add_item(prompter: Prompter, draft: Draft, ids: TokenIds) -> None:
    if ids:
        key = prompter.key(BlockKind.ITEM, token_bytes(ids), draft.options.layout)
        draft.add(BlockKind.ITEM, ids, text_id(repr(ids)), key=key)


def text_id(text: str) -> str:
    """An item id for a text that came without one: equal texts have equal ids."""
    return f"text-{blake3(text.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def _draft(prompter: Prompter, request: TextRequest | ScoreRequest, history: HistoryMode) -> Draft:
    level = request.level or Level("exact")
    if level.name in ("corrected", "auto"):
        raise ConfigError(f"level {level} is for rankings; prompts in token ids take {_ALLOWED}")
    options = RankOptions(level=level, readout="pointwise", history=history)
    whose = RankRequest(request.request_id, (), user_id=request.user_id, tenant=request.tenant)
    return Draft(prompter.namespace, whose, options)


def _finished(prompter: Prompter, draft: Draft, num_items: int) -> Prompt:
    if draft.end > prompter.max_positions:
        raise PromptTooLongError(
            f"request {draft.request.request_id!r} needs {draft.end} positions, the limit is {prompter.max_positions}: "
            "send a shorter prompt, or raise model.max_positions if the model allows more"
        )
    return draft.prompt(num_items)


def _check_tokens(prompter: Prompter, request_id: str, parts: Sequence[TokenIds]) -> None:
    size = prompter.tokenizer.vocab_size
    if wrong := [token for part in parts for token in part if not 0 <= token < size]:
        raise RequestError(
            f"request {request_id!r}: expected token ids from 0 to {size - 1}, got {wrong[0]}; they must be of this "
            "model's tokenizer"
        )
