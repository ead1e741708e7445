"""A request becomes a prompt: typed blocks with positions, keys, a block mask, and what is to be read at the end.

Typed fields are tokenised apart and joined here; no separator is ever searched for in text. Knows nothing of which KV
exists. Invariant: the blocks' tokens in order are the prompt, and a block sees only blocks before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import get_args

from blake3 import blake3

from rcllm.config import context_samples
from rcllm.core.decoding import OpenRequest
from rcllm.core.ranking import (
    Block,
    ContentKey,
    Event,
    Item,
    ItemId,
    Layout,
    Level,
    Prompt,
    RankOptions,
    RankRequest,
    Read,
    Readout,
    TokenIds,
)
from rcllm.core.receipts import BlockKind
from rcllm.errors import ConfigError, PromptTooLongError, RequestError, UnknownItemError
from rcllm.prompt.draft import Draft, listed
from rcllm.prompt.keys import Context, content_key, token_bytes
from rcllm.prompt.labels import choices
from rcllm.prompt.learnt import Learnt
from rcllm.prompt.remembered import Written
from rcllm.prompt.template import ChatFormat, Template
from rcllm.prompt.texts import EMPTY_TEXT, TextCounts, Texts
from rcllm.prompt.tokenizer import Tokenizer

_NOTHING_LEARNT = Learnt()
_shared_key = lru_cache(maxsize=1 << 14)(content_key)  # of blocks that all users share; about 10 MB
_NO_TEXTS: Mapping[ItemId, Mapping[str, str]] = MappingProxyType({})
_JOINING = b"2"  # how headings, labels and texts are joined; raised where that changes


class Prompter:
    """Builds prompts for one model, template and catalogue. Stateless between calls; safe to share."""

    def __init__(
        self,
        template: Template,
        chat: ChatFormat,
        tokenizer: Tokenizer,
        catalogue: Mapping[ItemId, Item],
        namespace: bytes,
        max_positions: int,
        max_candidates: int,
        context: str = "instruction",
        samples: Sequence[RankRequest] = (),
        learnt: Learnt = _NOTHING_LEARNT,
        notes: Sequence[str] = (),
        complete: Callable[[RankRequest], RankRequest] | None = None,
    ) -> None:
        """`context`: a name of config.CONTEXTS; `samples`: the requests that `typical` and `mean(n)` are made from.

        `learnt`: what the model's ranker was asked in training; `notes`: what every receipt is to say; `complete`: adds
        fresh fields that can be made and that a request lacks.
        """
        self.template, self.chat, self.tokenizer, self.catalogue = template, chat, tokenizer, catalogue
        self.namespace, self.max_positions, self.max_candidates = namespace, max_positions, max_candidates
        self.learnt, self.notes, self._complete = learnt, tuple(notes), complete
        self.texts = Texts(template, tokenizer)
        self.instructions = {layout: self._instruction(layout) for layout in get_args(Layout)}
        self._choose_context(context, samples)

    def in_context(self, context: str, samples: Sequence[RankRequest]) -> Prompter:
        """The same prompts, whose blocks are computed in another canonical context. Raises ConfigError."""
        other = copy(self)
        other._choose_context(context, samples)
        return other

    def _choose_context(self, context: str, samples: Sequence[RankRequest]) -> None:
        self.context_name = context
        self.contexts = {layout: self._fixed_contexts(layout) for layout in get_args(Layout)}
        if count := context_samples(context):
            self.contexts = {layout: self._sampled_contexts(layout, samples, count) for layout in get_args(Layout)}

    @property
    def text_fingerprint(self) -> bytes:
        """Changes with the template, and with how its parts are joined: what figures of answers depend on."""
        return blake3(self.template.fingerprint + _JOINING).digest()

    def _instruction(self, layout: Layout) -> TokenIds:
        """The shared first block: begin-of-sequence, system text, instruction, and the first section's head."""
        t, chat = self.template, self.chat
        head = t.history_head if layout == "history_first" else _on_a_line(t.items_head)
        return self.tokenizer.bos_ids + self.tokenizer.encode_opening(
            chat.system + t.system + chat.user + t.instruction + head
        )

    def _fixed_contexts(self, layout: Layout) -> Mapping[BlockKind, Context]:
        tokens = {"none": (), "bos": self.tokenizer.bos_ids or self.instructions[layout][:1]}
        context = Context((tokens.get(self.context_name, self.instructions[layout]),))
        return {BlockKind.ITEM: context, BlockKind.HISTORY: context}

    def _sampled_contexts(
        self, layout: Layout, samples: Sequence[RankRequest], count: int
    ) -> Mapping[BlockKind, Context]:
        """What stands before the middle candidate, and before the middle event, of the first `count` samples."""
        usable = [sample for sample in samples if sample.history and sample.candidates]
        if len(usable) < count:
            raise ConfigError(
                f"canonical context {self.context_name!r} is made from {count} real requests with a history, got "
                f"{len(usable)}: pass `samples`, or use context 'instruction'"
            )
        prompts = [self.build(replace(sample, options=RankOptions(layout=layout))) for sample in usable[:count]]
        return {
            kind: Context(tuple(_before_middle(prompt, kind) for prompt in prompts))
            for kind in (BlockKind.ITEM, BlockKind.HISTORY)
        }

    def event(self, event: Event, texts: Mapping[ItemId, Mapping[str, str]] = _NO_TEXTS) -> Written:
        """The text of an event: an item of the catalogue or of `texts`, or a user's own words. Raises RequestError."""
        if (event.item_id is None) == (event.text is None):
            raise RequestError(f"an event has either an item_id or a text, got {event}")
        if event.item_id is not None:
            return self.texts.event(self.item(event.item_id, texts=texts.get(event.item_id)))
        return self.texts.own_words(event.text or "")

    def text_counts(self, item_ids: Iterable[ItemId]) -> TextCounts:
        """What befalls the texts of those items that the catalogue has."""
        return self.texts.counts(self.item(item_id) for item_id in item_ids if item_id in self.catalogue)

    def instruction_block(self, layout: Layout) -> Block:
        """The shared first block, whose canonical context is nothing."""
        ids = self.instructions[layout]
        key = content_key(self.namespace, Context(((),)).digest, token_bytes(ids))
        return Block(BlockKind.INSTRUCTION, ids, 0, None, key)

    def item_block(self, item: Item, layout: Layout) -> Block:
        """What `warm` computes for an item as a candidate."""
        written = self.texts.item(item)
        return Block(BlockKind.ITEM, written.ids, 0, item.item_id, self.key(BlockKind.ITEM, written.hashed, layout))

    def event_block(self, item: Item, layout: Layout) -> Block:
        """What `warm` computes for an item as an event of any user's history."""
        written = self.texts.event(item)
        return Block(
            BlockKind.HISTORY, written.ids, 0, item.item_id, self.key(BlockKind.HISTORY, written.hashed, layout)
        )

    def key(self, kind: BlockKind, tokens: bytes, layout: Layout, whose: bytes = b"") -> ContentKey:
        """Names the KV of some tokens, as they are hashed, in the canonical context of their kind.

        `whose`: digest of the user whose words they are.
        """
        make = content_key if whose else _shared_key
        return make(self.namespace, self.contexts[layout][kind].digest, tokens, whose)

    def question_ids(self, readout: Readout) -> TokenIds:
        """What a prompt asks at its end, or of each candidate."""
        t = self.template
        text = {
            "label": t.question + self.chat.assistant + t.answer,
            "pointwise": t.pointwise_question,
            "likelihood": t.likelihood_head,
        }
        return self.texts.own(text[readout])

    def build(self, request: RankRequest) -> Prompt:
        """Raises RequestError (bad request, unknown item, too long)."""
        options = request.options or RankOptions()
        if self.template.open:
            raise ConfigError(
                f"template {self.template.name!r} is for open prompts and ranks no candidates; use another"
            )
        self._check(request)
        request = self.completed(request)
        items = [self.item(i, request.volatile.get(i), request.texts.get(i)) for i in request.candidates]
        return self._assemble(request, items, options)

    def completed(self, request: RankRequest) -> RankRequest:
        """The request with the fresh fields that can be made and that it lacks."""
        return request if self._complete is None else self._complete(request)

    def build_open(self, request: OpenRequest) -> Prompt:
        """A prompt that decoding continues: instruction, history, question. Raises RequestError."""
        level = request.level or Level("exact")
        if level.name in ("corrected", "auto"):
            raise ConfigError(
                f"level {level} is for rankings; open prompts take full, exact, linked(k), tail(r), blocks"
            )
        options = RankOptions(level=level, history=request.history_mode)
        draft = Draft(self.namespace, _closed(request), options)
        draft.add(BlockKind.INSTRUCTION, self.instructions["history_first"])
        self._add_history(draft)
        ids = self.texts.own(self.template.question + self.chat.assistant + self.template.answer)
        if not ids:
            raise ConfigError(
                f"template {self.template.name!r}: question must not be empty; decoding begins at its end"
            )
        draft.reads.append(Read(draft.add(BlockKind.QUESTION, ids), len(ids) - 1, ()))
        self._check_length(draft)
        return draft.prompt(0, self.notes)

    def build_content_free(self, num_candidates: int, options: RankOptions) -> Prompt:
        """A prompt without history whose candidates all read the same: what it scores is the labels' own bias."""
        items = [Item(ItemId("content-free"), {})] * num_candidates
        return self._assemble(RankRequest("content-free", ()), items, options)

    def _assemble(self, request: RankRequest, items: Sequence[Item], options: RankOptions) -> Prompt:
        draft = Draft(self.namespace, request, options)
        draft.add(BlockKind.INSTRUCTION, self.instructions[options.layout])
        if options.layout == "history_first":
            self._add_history(draft)
        match options.readout:
            case "label":
                self._list_candidates(draft, items, options)
            case "pointwise":
                self._ask_each(draft, items)
            case "likelihood":
                self._continue_each(draft, items)
        self._check_length(draft)
        return draft.prompt(len(items), self._request_notes(request, options))

    def _request_notes(self, request: RankRequest, options: RankOptions) -> tuple[str, ...]:
        """How the request differs from what the ranker learnt, and what of it no prompt shows."""
        notes = [*self.notes, *self.learnt.option_differences(options)]
        if options.readout != "likelihood" and (bare := self._without_fresh(request)):
            notes.append(
                f"{len(bare):,} of {len(request.candidates):,} candidates come without {listed(self.learnt.fresh)}, "
                f"which the adapter was tuned with: {listed(bare)}"
            )
        if strangers := sorted(request.volatile.keys() - set(request.candidates)):
            told = f"{len(strangers):,} of {len(request.volatile):,} volatile texts belong to no candidate"
            notes.append(f"{told}: {listed(strangers)}")
        shown = self.template.shown_fresh if options.readout != "likelihood" else ()
        given = {name for texts in request.volatile.values() for name in texts}
        if unshown := sorted(given - set(shown)):
            where = f"template {self.template.name}" if options.readout != "likelihood" else "read-out likelihood"
            notes.append(f"{where} does not show the volatile fields {listed(unshown)}")
        return tuple(notes)

    def _without_fresh(self, request: RankRequest) -> list[ItemId]:
        """Candidates that lack a fresh field which the ranker learnt to read."""
        if not self.learnt.fresh:
            return []
        given = ((i, self.item(i, request.volatile.get(i), request.texts.get(i))) for i in request.candidates)
        return [item_id for item_id, item in given if not all(item.volatile.get(name) for name in self.learnt.fresh)]

    def _check_length(self, draft: Draft) -> None:
        if draft.end > self.max_positions:
            raise PromptTooLongError(
                f"request {draft.request.request_id!r} needs {draft.end} positions, the limit is {self.max_positions}: "
                "send fewer or shorter candidates or events, or raise model.max_positions if the model allows more"
            )

    def _list_candidates(self, draft: Draft, items: Sequence[Item], options: RankOptions) -> None:
        t, own = self.template, self.texts.own
        before_item = options.label_place == "before"
        if options.layout == "history_first":  # labels before their items bring their own line break
            draft.add(BlockKind.LABEL, own(t.items_head if before_item else _on_a_line(t.items_head)))
        labels = self.texts.labels(len(items), options.label_place)
        if options.parallel:
            draft.isolate_slots()
        for slot, (item, label) in enumerate(zip(items, labels.written, strict=True)):
            draft.open_slot(slot)
            if before_item:
                draft.add(BlockKind.LABEL, label)
            self._add_item(draft, item)
            if not before_item:
                draft.add(BlockKind.LABEL, label)
        draft.close_slots()
        if options.layout == "items_first":
            draft.add(BlockKind.LABEL, own(t.history_head))
            self._add_history(draft)
        question = draft.add(BlockKind.QUESTION, self.question_ids("label"))
        nodes: dict[TokenIds, int] = {(): question}
        for choice in choices(labels.names):  # of labels of several tokens, inner nodes are branches after the question
            if choice.prefix:
                parent = nodes[choice.prefix[:-1]]
                nodes[choice.prefix] = draft.add_branch(choice.prefix[-1:], parent)
            node = nodes[choice.prefix]
            draft.reads.append(Read(node, len(draft.blocks[node]) - 1, choice.token_ids))
        draft.label_ids = labels.names

    def _add_item(self, draft: Draft, item: Item) -> None:
        """A candidate's cached text, and what is fresh of it."""
        written = self.texts.item(item)
        _note(draft, "candidates", written, item.item_id)
        key = self.key(BlockKind.ITEM, written.hashed, draft.options.layout)
        draft.add(BlockKind.ITEM, written.ids, item.item_id, key=key)
        if item.volatile and not (fresh := self.texts.volatile(item)).empty:
            if fresh.cut:
                draft.notes.add("candidates", f"with volatile text cut to {len(fresh.ids)} tokens", item.item_id)
            draft.add(BlockKind.LABEL, fresh.ids, item.item_id)

    def _add_history(self, draft: Draft) -> None:
        """Events one after another; a user's own words have KV of their own, and none where nobody is named."""
        request, options = draft.request, draft.options
        for event in request.history:
            written = self.event(event, request.texts)
            _note(draft, "events", written, event.item_id or "own words")
            private = event.text is not None
            owner = draft.user if private else event.item_id
            key = None
            if options.history == "shared" and owner is not None:
                key = self.key(BlockKind.HISTORY, written.hashed, options.layout, draft.whose if private else b"")
            draft.add(BlockKind.HISTORY, written.ids, owner, key=key, private=private)

    def _ask_each(self, draft: Draft, items: Sequence[Item]) -> None:
        draft.add(BlockKind.LABEL, self.texts.own(self.template.items_head + "\n"))
        answers = self._answer_tokens()
        question = self.question_ids("pointwise")
        draft.isolate_slots()
        for slot, item in enumerate(items):
            draft.open_slot(slot)
            self._add_item(draft, item)
            echo = self.texts.echo(item)
            asked = draft.add(BlockKind.QUESTION, echo + question)
            draft.reads.append(Read(asked, len(echo + question) - 1, answers, slot))

    def _answer_tokens(self) -> TokenIds:
        """The first token of each of pointwise_answers. Raises ConfigError where no score could tell them apart."""
        t = self.template
        begun = [self.texts.own(answer)[:1] for answer in t.pointwise_answers]
        if not all(begun) or begun[0] in begun[1:] or begun[0] == (self.tokenizer.unknown_id,):
            raise ConfigError(
                f"template {t.name!r}: with this tokenizer the first of pointwise_answers {t.pointwise_answers} begins "
                "with the same token as another, or with none that it knows, so that no score could tell them apart; "
                "choose other words"
            )
        return tuple(ids[0] for ids in begun)

    def _continue_each(self, draft: Draft, items: Sequence[Item]) -> None:
        head = draft.add(BlockKind.QUESTION, self.question_ids("likelihood"))
        draft.isolate_slots()
        for slot, item in enumerate(items):
            written = self.texts.continued(item)
            ids = written.ids
            _note(draft, "candidates", written, item.item_id)
            draft.open_slot(slot)
            draft.reads.append(Read(head, len(draft.blocks[head]) - 1, ids[:1], slot))
            if len(ids) > 1:  # the last token is scored, never read from
                block = draft.add(BlockKind.LABEL, ids[:-1])
                draft.reads.extend(Read(block, i, (ids[i + 1],), slot) for i in range(len(ids) - 1))

    def item(
        self,
        item_id: ItemId,
        volatile: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Item:
        """An entry of the catalogue, or one of a request's own `texts`, with the request's own volatile fields.

        Raises UnknownItemError.
        """
        if texts is not None:
            return Item(item_id, texts, volatile or {})
        item = self.catalogue.get(item_id)
        if item is None:
            raise UnknownItemError(f"item {item_id!r} is not in the catalogue of {len(self.catalogue)} items")
        return Item(item_id, item.fields, {**item.volatile, **volatile}) if volatile else item

    def _check(self, request: RankRequest) -> None:
        if not request.candidates:
            raise RequestError(f"request {request.request_id!r} has no candidates; there is nothing to rank")
        if len(request.candidates) > self.max_candidates:
            raise RequestError(
                f"request {request.request_id!r} has {len(request.candidates)} candidates, the limit is "
                f"{self.max_candidates} (prompt.max_candidates)"
            )
        if len(set(request.candidates)) < len(request.candidates):
            twice = [item_id for item_id, count in Counter(request.candidates).items() if count > 1]
            raise RequestError(
                f"request {request.request_id!r}: expected each candidate once, got {listed(twice)} more than once; "
                "remove the repetitions"
            )


def _closed(request: OpenRequest) -> RankRequest:
    """The same user and history, for a draft."""
    return RankRequest(request.request_id, (), request.history, request.user_id, tenant=request.tenant)


def _note(draft: Draft, of: str, written: Written, name: str) -> None:
    """Tells what befell a text."""
    if written.cut:
        draft.notes.add(of, f"cut to {len(written.ids)} tokens", name)
    if written.empty:
        draft.notes.add(of, f"without a text that the template shows, so that they read {EMPTY_TEXT!r}", name)


def _on_a_line(heading: str) -> str:
    """A heading that no item's text is glued to."""
    return heading if heading[-1:].isspace() else heading + "\n"


def _before_middle(prompt: Prompt, kind: BlockKind) -> TokenIds:
    blocks = [i for i, block in enumerate(prompt.blocks) if block.kind is kind]
    middle = blocks[len(blocks) // 2]
    return tuple(token for block in prompt.blocks[:middle] for token in block.token_ids)
