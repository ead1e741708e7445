"""What a ranker was asked in training, held against what it is about to be asked.

The record is that of `rcllm tune`, beside the adapter. Knows nothing of models or files. Invariant: a difference that
can change an answer becomes one sentence; what a record does not say is not held against anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rcllm.core.ranking import RankOptions
from rcllm.errors import ModelError
from rcllm.prompt.template import ChatFormat, Template

_COMMON = 0.5  # a field that at least this share of the items of every training set had is missed where it lacks
_TEXTS = ("template", "template_fingerprint", "readout", "layout", "label_place", "chat", "context", "mask")
_COMPARED_LIMITS = {"max_item_tokens": "items", "max_event_tokens": "events"}


@dataclass(frozen=True, slots=True)
class Learnt:
    """Empty: the record does not say."""

    template: str = ""
    template_fingerprint: str = ""  # 64 hex digits, of the template's text
    readout: str = ""
    layout: str = ""
    label_place: str = ""
    chat: str = ""  # fingerprint of the chat format
    context: str = ""  # the canonical context of items and events, which a `blocks` model saw
    mask: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)  # in tokens, by name in the template
    fresh: tuple[str, ...] = ()  # fresh fields that every candidate had
    fields: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # data set → field → share of its items

    @classmethod
    def of(cls, record: Mapping[str, Any], where: str) -> Learnt:
        """Reads a record, of which other keys are left alone. Raises ModelError, naming `where` it came from."""
        texts = {name: record[name] for name in _TEXTS if name in record}
        limits, shares = record.get("limits", {}), record.get("fields", {})
        if not all(isinstance(text, str) for text in texts.values()):
            raise ModelError(f"{where}: expected texts in {', '.join(texts)}, got {texts}")
        if not _numbers(limits):
            raise ModelError(f"{where}: expected 'limits' to hold numbers of tokens by name, got {limits!r}")
        if not isinstance(shares, Mapping) or not all(map(_numbers, shares.values())):
            raise ModelError(f"{where}: expected 'fields' to hold shares by data set and field, got {shares!r}")
        fresh = record.get("fresh", [])
        if not isinstance(fresh, list | tuple) or not all(isinstance(name, str) for name in fresh):
            raise ModelError(f"{where}: expected 'fresh' to list names of fields, got {fresh!r}")
        return cls(**texts, limits=limits, fresh=tuple(fresh), fields=shares)

    def text_differences(
        self, template: Template, chat: ChatFormat | None, context: str, mask: str = "auto"
    ) -> tuple[str, ...]:
        """How a prompt differs, whatever is asked in it. `chat`: None where the tokenizer decides."""
        told = [*self._template_differences(template)]
        if self.chat and chat is not None and chat.fingerprint != self.chat:
            told.append("the adapter was tuned in another chat format than the one that prompt.chat names")
        if self.mask and mask not in ("auto", self.mask):
            told.append(f"the adapter was tuned under mask {self.mask}, model.mask is {mask}")
        if self.mask == "blocks" and self.context and context != self.context:
            told.append(f"the adapter was tuned with canonical context {self.context}, this is {context}")
        return tuple(told)

    def _template_differences(self, template: Template) -> list[str]:
        if self.template and template.name != self.template:
            return [f"the adapter was tuned with template {self.template}, this is {template.name}"]
        if self.template_fingerprint and template.text_fingerprint.hex() != self.template_fingerprint:
            return [f"template {template.name} has another text than the one that the adapter was tuned with"]
        return [
            f"the adapter was tuned with {what} cut at {self.limits[name]} tokens, here at {now} ({name})"
            for name, what in _COMPARED_LIMITS.items()
            if self.limits.get(name, now := template.limits[name]) != now
        ]

    def missing(self, shares: Mapping[str, float]) -> tuple[str, ...]:
        """Fields that most items had in training and few have now.

        `shares`: of the fields that the template shows, the share of the catalogue's items that have each.
        """
        return tuple(name for name, now in shares.items() if now < self._least(name) / 2 >= _COMMON / 2)

    def field_differences(self, shares: Mapping[str, float]) -> tuple[str, ...]:
        """How the fields of a catalogue's items differ from those in training; `shares` as in `missing`."""
        new = [name for name, now in shares.items() if self.fields and now >= _COMMON and not self._most(name)]
        return (
            *(
                f"the adapter was tuned with {name!r} in {self._least(name):.0%} of the items or more, "
                f"here {shares[name]:.0%} have it"
                for name in self.missing(shares)
            ),
            *(f"the adapter was tuned without {name!r}, here {shares[name]:.0%} of the items have it" for name in new),
        )

    def _least(self, name: str) -> float:
        return min((of.get(name, 0.0) for of in self.fields.values()), default=0.0)

    def _most(self, name: str) -> float:
        return max((of.get(name, 0.0) for of in self.fields.values()), default=0.0)

    def option_differences(self, options: RankOptions) -> tuple[str, ...]:
        """How one request asks otherwise."""
        if self.readout and options.readout != self.readout:
            return (f"the adapter was tuned for read-out {self.readout}, this is {options.readout}",)
        asked = {"layout": options.layout} | ({"label_place": options.label_place} if self.readout == "label" else {})
        return tuple(
            f"the adapter was tuned with {name} {getattr(self, name)}, this is {value}"
            for name, value in asked.items()
            if getattr(self, name) not in ("", value)
        )


def _numbers(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(number, int | float) and not isinstance(number, bool)
        for name, number in value.items()
    )
