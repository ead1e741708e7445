"""Items, events and the template's own texts as token ids: rendered by the template, tokenised, cut to the limits.

Knows nothing of prompts. Invariant: a text has at least one token and at most its limit, and what was cut or had
nothing to show is said beside it; the time that a text takes is bounded, however long it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from rcllm.core.ranking import Item, LabelPlace, TokenIds
from rcllm.prompt.labels import check_told_apart, label_names
from rcllm.prompt.remembered import Remembered, Written
from rcllm.prompt.template import Parts, Template, render
from rcllm.prompt.tokenizer import Tokenizer

EMPTY_TEXT = "(no text)"  # an item none of whose template fields is known still needs a block
_REMEMBERED_BYTES = 64 << 20  # an item's text and ids are ~3 KB
_OWN_TEXTS = 64  # of a template and its chat format, that are remembered: headings, questions
_LABELLED = 32  # lengths of lists whose labels are remembered
_WHOLE_CHARS = 1 << 14  # what is longer is tokenised from its start, only as far as its limit reaches


@dataclass(frozen=True, slots=True)
class Labels:
    """Of the candidates of a list, in their order."""

    names: tuple[TokenIds, ...]  # what is scored
    written: tuple[TokenIds, ...]  # with what stands around the name in the list


@dataclass(frozen=True, slots=True)
class TextCounts:
    """What befell the texts of some items."""

    items: int
    cut: int  # as candidates
    cut_events: int  # as events
    empty: int  # as candidates

    def told(self, template: Template) -> str:
        """One line for people; empty where every text is whole."""
        pairs = (
            (self.cut, f"cut to {template.max_item_tokens} tokens as candidates (max_item_tokens)"),
            (self.cut_events, f"cut to {template.max_event_tokens} tokens as events (max_event_tokens)"),
            (self.empty, f"without a text that template {template.name} shows"),
        )
        told = ", ".join(f"{count:,} {what}" for count, what in pairs if count)
        return f"of {self.items:,} items: {told}" if told else ""


class Texts:
    """Writes as one template and tokenizer do. Safe to share."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self._remembered = Remembered(self._start, _REMEMBERED_BYTES)
        self.own = lru_cache(_OWN_TEXTS)(tokenizer.encode_control)  # ids of a text that the template or its chat brings
        self.labels = lru_cache(_LABELLED)(self._labels)

    def _labels(self, count: int, place: LabelPlace) -> Labels:
        """Of so many candidates. Raises ConfigError where no score could tell them apart."""
        t, encode = self.template, self.tokenizer.encode_control
        texts = label_names(count)
        names = tuple(map(encode, texts))
        check_told_apart(texts, names, self.tokenizer.unknown_id)
        before, after = map(encode, t.label_before if place == "before" else t.label_after)
        return Labels(names, tuple(before + name + after for name in names))

    def item(self, item: Item) -> Written:
        """The cached text of a candidate."""
        return self._of(self.template.item, item, self.template.max_item_tokens)

    def continued(self, item: Item) -> Written:
        """What read-out `likelihood` scores of a candidate."""
        return self._of(self.template.likelihood_item, item, self.template.max_item_tokens)

    def event(self, item: Item) -> Written:
        """An item as something that a user chose."""
        return self._of(self.template.event, item, self.template.max_event_tokens, f"\n- {EMPTY_TEXT}")

    def own_words(self, text: str) -> Written:
        """An event in a user's words, of which no copy is kept: they may have to be erased."""
        t = self.template
        rendered = t.event_text.replace("{text}", text or EMPTY_TEXT)
        written = self._shown(self._start(rendered, t.max_event_tokens), t.max_event_tokens)
        return written if text.strip() else replace(written, empty=True)

    def volatile(self, item: Item) -> Written:
        """The fresh text after a candidate; `empty`, without a token, where it shows nothing."""
        written = self._remembered(render(self.template.volatile, item.volatile), self.template.max_volatile_tokens)
        return written if written.ids else replace(written, empty=True)

    def echo(self, item: Item) -> TokenIds:
        """The candidate's first words, to stand before its question."""
        return self._remembered(render(self.template.pointwise_echo, item.fields), self.template.max_echo_tokens).ids

    def counts(self, items: Iterable[Item]) -> TextCounts:
        """What befalls the texts of `items`."""
        written = [(self.item(item), self.event(item)) for item in items]
        return TextCounts(
            items=len(written),
            cut=sum(candidate.cut for candidate, _ in written),
            cut_events=sum(event.cut for _, event in written),
            empty=sum(candidate.empty for candidate, _ in written),
        )

    def _of(self, parts: Parts, item: Item, max_tokens: int, instead: str = EMPTY_TEXT) -> Written:
        if text := render(parts, item.fields):
            return self._shown(self._remembered(text, max_tokens), max_tokens)
        return replace(self._remembered(instead, max_tokens), empty=True)

    def _shown(self, written: Written, max_tokens: int) -> Written:
        """At least one token: a tokenizer may make nothing of white space or of what its normaliser drops."""
        return written if written.ids else Written(self._remembered(EMPTY_TEXT, max_tokens).ids, empty=True)

    def _start(self, text: str, max_tokens: int) -> Written:
        """The first `max_tokens` ids of a text, and whether there are more."""
        size = max(_WHOLE_CHARS, 16 * max_tokens)
        while size < len(text):  # tokens are that long in no language, but white space and what is dropped may be
            if len(ids := self.tokenizer.encode(text[:size])) > max_tokens:
                return Written(ids[:max_tokens], cut=True)
            size *= 8
        ids = self.tokenizer.encode(text)
        return Written(ids[:max_tokens], len(ids) > max_tokens)
