"""A request becomes a prompt: typed blocks with positions, keys, a block mask, and what is to be read at the end.

Typed fields are tokenised apart and joined here; no separator is ever searched for in text. Knows nothing of which KV
exists. Invariant: the blocks' tokens in order are the prompt, and a block sees only blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from blake3 import blake3

from rcllm.config import context_samples
from rcllm.core.decoding import OpenRequest
from rcllm.core.ranking import (
    Block,
    BlockKind,
    BoolArray,
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
from rcllm.errors import ConfigError, PromptTooLongError, RequestError, UnknownItemError
from rcllm.prompt.keys import Context, content_key, token_bytes
from rcllm.prompt.labels import check_told_apart, choices, label_names
from rcllm.prompt.template import ChatFormat, Template, render
from rcllm.prompt.tokenizer import Tokenizer

EMPTY_TEXT = "(no text)"  # an item none of whose template fields is known still needs a block


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
    ) -> None:
        """`context`: a name of config.CONTEXTS; `samples`: the requests that `typical` and `mean(n)` are made from."""
        self.template, self.chat, self.tokenizer, self.catalogue = template, chat, tokenizer, catalogue
        self.namespace, self.max_positions, self.max_candidates = namespace, max_positions, max_candidates
        self.context_name = context
        self.instructions = {layout: self._instruction(layout) for layout in get_args(Layout)}
        self.contexts = {layout: self._fixed_contexts(layout) for layout in get_args(Layout)}
        if count := context_samples(context):
            self.contexts = {layout: self._sampled_contexts(layout, samples, count) for layout in get_args(Layout)}

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

    def item_ids(self, item: Item) -> tuple[TokenIds, bool]:
        """The cached text of a candidate, and whether it had to be cut."""
        return self._cut(render(self.template.item, item.fields), self.template.max_item_tokens)

    def event_ids(self, event: Event) -> tuple[TokenIds, bool]:
        """The text of an event, and whether it had to be cut."""
        if (event.item_id is None) == (event.text is None):
            raise RequestError(f"an event has either an item_id or a text, got {event}")
        t = self.template
        if event.item_id is not None:
            text = render(t.event, self.item(event.item_id).fields) or f"\n- {EMPTY_TEXT}"
            return self._cut(text, t.max_event_tokens)
        text = t.event_text.replace("{text}", event.text or EMPTY_TEXT)
        return self._cut(text, t.max_event_tokens, self.tokenizer.encode_unremembered)

    def _cut(
        self, text: str, max_tokens: int, encode: Callable[[str], TokenIds] | None = None
    ) -> tuple[TokenIds, bool]:
        """At least one token: a tokenizer may make nothing of white space or of what its normaliser drops."""
        ids = (encode or self.tokenizer.encode)(text) or self.tokenizer.encode(EMPTY_TEXT)
        return ids[:max_tokens], len(ids) > max_tokens

    def instruction_block(self, layout: Layout) -> Block:
        """The shared first block, whose canonical context is nothing."""
        ids = self.instructions[layout]
        return Block(BlockKind.INSTRUCTION, ids, 0, None, content_key(self.namespace, Context(((),)).digest, ids))

    def item_block(self, item: Item, layout: Layout) -> Block:
        """What `warm` computes for an item as a candidate."""
        ids, _ = self.item_ids(item)
        return Block(BlockKind.ITEM, ids, 0, item.item_id, self.key(BlockKind.ITEM, ids, layout))

    def event_block(self, item: Item, layout: Layout) -> Block:
        """What `warm` computes for an item as an event of any user's history."""
        ids, _ = self.event_ids(Event(item.item_id))
        return Block(BlockKind.HISTORY, ids, 0, item.item_id, self.key(BlockKind.HISTORY, ids, layout))

    def key(self, kind: BlockKind, ids: TokenIds, layout: Layout, user: str | None = None) -> ContentKey:
        """Names the KV of `ids` in the canonical context of its kind; `user`: whose words they are."""
        return content_key(self.namespace, self.contexts[layout][kind].digest, ids, user)

    def question_ids(self, readout: Readout) -> TokenIds:
        """What a prompt asks at its end, or of each candidate."""
        t = self.template
        text = {
            "label": t.question + self.chat.assistant + t.answer,
            "pointwise": t.pointwise_question,
            "likelihood": t.likelihood_head,
        }
        return self.tokenizer.encode_control(text[readout])

    def build(self, request: RankRequest) -> Prompt:
        """Raises RequestError (bad request, unknown item, too long)."""
        options = request.options or RankOptions()
        if self.template.open:
            raise ConfigError(
                f"template {self.template.name!r} is for open prompts and ranks no candidates; use another"
            )
        self._check(request)
        items = [self.item(item_id, request.volatile.get(item_id)) for item_id in request.candidates]
        return self._assemble(request, items, options)

    def build_open(self, request: OpenRequest) -> Prompt:
        """A prompt that decoding continues: instruction, history, question. Raises RequestError."""
        level = request.level or Level("exact")
        if level.name in ("corrected", "auto"):
            raise ConfigError(
                f"level {level} is for rankings; open prompts take full, exact, linked(k), tail(r), blocks"
            )
        options = RankOptions(level=level, history=request.history_mode)
        draft = _Draft(self, RankRequest(request.request_id, (), request.history, request.user_id), options)
        draft.add(BlockKind.INSTRUCTION, self.instructions["history_first"])
        draft.add_history()
        ids = self.tokenizer.encode_control(self.template.question + self.chat.assistant + self.template.answer)
        if not ids:
            raise ConfigError(
                f"template {self.template.name!r}: question must not be empty; decoding begins at its end"
            )
        draft.reads.append(Read(draft.add(BlockKind.QUESTION, ids), len(ids) - 1, ()))
        self._check_length(draft)
        return draft.prompt(0)

    def build_content_free(self, num_candidates: int, options: RankOptions) -> Prompt:
        """A prompt without history whose candidates all read the same: what it scores is the labels' own bias."""
        items = [Item(ItemId("content-free"), {})] * num_candidates
        return self._assemble(RankRequest("content-free", ()), items, options)

    def _assemble(self, request: RankRequest, items: Sequence[Item], options: RankOptions) -> Prompt:
        draft = _Draft(self, request, options)
        draft.add(BlockKind.INSTRUCTION, self.instructions[options.layout])
        if options.layout == "history_first":
            draft.add_history()
        match options.readout:
            case "label":
                self._list_candidates(draft, items, options)
            case "pointwise":
                self._ask_each(draft, items)
            case "likelihood":
                self._continue_each(draft, items)
        self._check_length(draft)
        return draft.prompt(len(items))

    def _check_length(self, draft: _Draft) -> None:
        if draft.end > self.max_positions:
            raise PromptTooLongError(
                f"request {draft.request.request_id!r} needs {draft.end} positions, the limit is {self.max_positions}: "
                "send fewer or shorter candidates or events, or raise model.max_positions if the model allows more"
            )

    def _list_candidates(self, draft: _Draft, items: Sequence[Item], options: RankOptions) -> None:
        t, encode = self.template, self.tokenizer.encode_control
        if options.layout == "history_first":
            before_item = options.label_place == "before"  # such labels bring their own line break
            draft.add(BlockKind.LABEL, encode(t.items_head if before_item else _on_a_line(t.items_head)))
        names = [encode(name) for name in label_names(len(items))]
        check_told_apart(label_names(len(items)), names, self.tokenizer.unknown_id)
        before, after = (
            encode(part) for part in (t.label_before if options.label_place == "before" else t.label_after)
        )
        if options.parallel:
            draft.isolate_slots()
        for slot, (item, name) in enumerate(zip(items, names, strict=True)):
            draft.open_slot(slot)
            if options.label_place == "before":
                draft.add(BlockKind.LABEL, before + name + after)
                draft.add_item(item)
            else:
                draft.add_item(item)
                draft.add(BlockKind.LABEL, before + name + after)
        draft.close_slots()
        if options.layout == "items_first":
            draft.add(BlockKind.LABEL, encode(t.history_head))
            draft.add_history()
        question = draft.add(BlockKind.QUESTION, self.question_ids("label"))
        nodes: dict[TokenIds, int] = {(): question}
        for choice in choices(names):  # labels of several tokens: their inner nodes are branches after the question
            if choice.prefix:
                parent = nodes[choice.prefix[:-1]]
                nodes[choice.prefix] = draft.add_branch(choice.prefix[-1:], parent)
            node = nodes[choice.prefix]
            draft.reads.append(Read(node, len(draft.blocks[node]) - 1, choice.token_ids))
        draft.label_ids = tuple(names)

    def _ask_each(self, draft: _Draft, items: Sequence[Item]) -> None:
        t, encode = self.template, self.tokenizer.encode_control
        draft.add(BlockKind.LABEL, encode(t.items_head + "\n"))
        answers = self._answer_tokens()
        question = self.question_ids("pointwise")
        draft.isolate_slots()
        for slot, item in enumerate(items):
            draft.open_slot(slot)
            draft.add_item(item)
            echo = self.tokenizer.encode(render(t.pointwise_echo, item.fields))[: t.max_echo_tokens]
            asked = draft.add(BlockKind.QUESTION, echo + question)
            draft.reads.append(Read(asked, len(echo + question) - 1, answers, slot))

    def _answer_tokens(self) -> TokenIds:
        """The first token of each of pointwise_answers. Raises ConfigError where no score could tell them apart."""
        t = self.template
        begun = [self.tokenizer.encode_control(answer)[:1] for answer in t.pointwise_answers]
        if not all(begun) or begun[0] in begun[1:] or begun[0] == (self.tokenizer.unknown_id,):
            raise ConfigError(
                f"template {t.name!r}: with this tokenizer the first of pointwise_answers {t.pointwise_answers} begins "
                "with the same token as another, or with none that it knows, so that no score could tell them apart; "
                "choose other words"
            )
        return tuple(ids[0] for ids in begun)

    def _continue_each(self, draft: _Draft, items: Sequence[Item]) -> None:
        t = self.template
        head = draft.add(BlockKind.QUESTION, self.question_ids("likelihood"))
        draft.isolate_slots()
        for slot, item in enumerate(items):
            ids, _ = self._cut(render(t.likelihood_item, item.fields), t.max_item_tokens)
            draft.open_slot(slot)
            draft.reads.append(Read(head, len(draft.blocks[head]) - 1, ids[:1], slot))
            if len(ids) > 1:  # the last token is scored, never read from
                block = draft.add(BlockKind.LABEL, ids[:-1])
                draft.reads.extend(Read(block, i, (ids[i + 1],), slot) for i in range(len(ids) - 1))

    def item(self, item_id: ItemId, volatile: Mapping[str, str] | None = None) -> Item:
        """An entry of the catalogue, with a request's own volatile fields. Raises UnknownItemError."""
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


def _on_a_line(heading: str) -> str:
    """A heading that no item's text is glued to."""
    return heading if heading[-1:].isspace() else heading + "\n"


def _before_middle(prompt: Prompt, kind: BlockKind) -> TokenIds:
    blocks = [i for i, block in enumerate(prompt.blocks) if block.kind is kind]
    middle = blocks[len(blocks) // 2]
    return tuple(token for block in prompt.blocks[:middle] for token in block.token_ids)


class _Draft:
    """A prompt under construction: keeps positions, exact contexts and who sees whom."""

    def __init__(self, prompter: Prompter, request: RankRequest, options: RankOptions) -> None:
        self.prompter, self.request, self.options = prompter, request, options
        self.blocks: list[Block] = []
        self.reads: list[Read] = []
        self.notes: list[str] = []
        self.label_ids: tuple[TokenIds, ...] = ()
        self.end = 0  # one past the highest position so far
        self._base = 0  # where the next block starts
        self._slot: int | None = None
        self._slot_base: int | None = None  # where isolated slots start
        self._isolated = False
        self._branches: list[tuple[int, int]] = []  # (block, parent)
        self._context = blake3()  # of all tokens so far, while they form one chain
        self._chained = True

    def add(
        self,
        kind: BlockKind,
        ids: TokenIds,
        owner: str | None = None,
        *,
        key: ContentKey | None = None,
        private: bool = False,
    ) -> int:
        """Appends a block after the last one, and returns its index."""
        chain_key = None
        if self._chained and kind in (BlockKind.INSTRUCTION, BlockKind.HISTORY):
            chain_key = self._chain_key(kind, ids)
            key = chain_key if kind is BlockKind.INSTRUCTION else key
        self._chained = chain_key is not None
        self._context.update(token_bytes(ids))
        self.blocks.append(Block(kind, ids, self._base, owner, key, chain_key, self._slot, private))
        self._base += len(ids)
        self.end = max(self.end, self._base)
        return len(self.blocks) - 1

    def add_item(self, item: Item) -> None:
        ids, cut = self.prompter.item_ids(item)
        if cut:
            self.notes.append(f"item {item.item_id} cut to {len(ids)} tokens")
        self.add(BlockKind.ITEM, ids, item.item_id, key=self.prompter.key(BlockKind.ITEM, ids, self.options.layout))
        if item.volatile and (text := render(self.prompter.template.volatile, item.volatile)):
            self.add(BlockKind.LABEL, self.prompter.tokenizer.encode(text), item.item_id)

    def add_history(self) -> None:
        """Events one after another; a user's own words have KV of their own, and none where nobody is named."""
        user = self.request.user_id
        for event in self.request.history:
            ids, cut = self.prompter.event_ids(event)
            if cut:
                self.notes.append(f"event {event.item_id or 'text'} cut to {len(ids)} tokens")
            private = event.text is not None
            owner = user if private else event.item_id
            key = None
            if self.options.history == "shared" and owner is not None:
                key = self.prompter.key(BlockKind.HISTORY, ids, self.options.layout, owner if private else None)
            self.add(BlockKind.HISTORY, ids, owner, key=key, private=private)

    def add_branch(self, ids: TokenIds, parent: int) -> int:
        """A block that continues `parent`, beside other branches that do not see it."""
        self._base = self.blocks[parent].base + len(self.blocks[parent])
        index = self.add(BlockKind.LABEL, ids)
        self._branches.append((index, parent))
        return index

    def isolate_slots(self) -> None:
        """From here on, candidates do not see each other and start at one position."""
        self._isolated, self._slot_base = True, self._base

    def open_slot(self, slot: int) -> None:
        self._slot = slot
        if self._slot_base is not None:
            self._base = self._slot_base

    def close_slots(self) -> None:
        self._slot, self._slot_base, self._base = None, None, self.end

    def prompt(self, num_candidates: int) -> Prompt:
        request = self.request
        return Prompt(
            request.request_id,
            tuple(self.blocks),
            self._sees(),
            tuple(self.reads),
            num_candidates,
            self.label_ids,
            self.options,
            request.user_id,
            tuple(self.notes),
        )

    def _chain_key(self, kind: BlockKind, ids: TokenIds) -> ContentKey | None:
        """Names the KV of a block after exactly what precedes it; a user's history belongs to that user alone."""
        owner = None if kind is BlockKind.INSTRUCTION else self.request.user_id
        if owner is None and kind is not BlockKind.INSTRUCTION:
            return None
        return content_key(self.prompter.namespace, self._context.digest(), ids, owner)

    def _sees(self) -> BoolArray:
        count = len(self.blocks)
        sees = np.tri(count, k=-1, dtype=bool)
        if self._isolated:
            slots = np.array([-1 if block.slot is None else block.slot for block in self.blocks])
            apart = (slots[:, None] != slots[None, :]) & (slots[:, None] >= 0) & (slots[None, :] >= 0)
            sees &= ~apart
        first = self._branches[0][0] if self._branches else count
        for index, parent in self._branches:
            sees[index, first:] = False
            sees[index, : parent + 1] = sees[parent, : parent + 1]
            sees[index, parent] = True
        return sees
