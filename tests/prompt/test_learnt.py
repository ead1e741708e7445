"""What a ranker was tuned on, held against what it is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rcllm.core.ranking import RankOptions
from rcllm.errors import ModelError
from rcllm.prompt.learnt import Learnt
from rcllm.prompt.template import Template, chat_format

TITLES = Template.load("titles")
RECORD: dict[str, Any] = {
    "mask": "blocks",
    "template": "titles",
    "template_fingerprint": TITLES.text_fingerprint.hex(),
    "limits": {"max_item_tokens": 18, "max_event_tokens": 16},
    "fields": {"shop": {"title": 1.0, "chosen": 1.0, "genres": 0.0}, "books": {"title": 1.0, "chosen": 0.8}},
    "chat": chat_format("chatml").fingerprint,
    "context": "instruction",
    "readout": "pointwise",
    "layout": "history_first",
    "label_place": "after",
    "curve": [],
}
LEARNT = Learnt.of(RECORD, "here")


def differences(template: Template = TITLES, chat: str | None = None, context: str = "instruction") -> tuple[str, ...]:
    return LEARNT.text_differences(template, chat_format(chat) if chat else None, context)


def test_what_is_asked_as_it_was_learnt_is_not_told_of() -> None:
    assert differences(chat="chatml") == ()
    assert LEARNT.field_differences({"title": 1.0, "chosen": 1.0, "genres": 0.0, "categories": 0.0}) == ()
    assert LEARNT.option_differences(RankOptions(readout="pointwise", label_place="before")) == ()


def test_another_template_is_told_of_once() -> None:
    assert differences(Template.load("shopping")) == ("the adapter was tuned with template titles, this is shopping",)
    other = replace(TITLES, text_fingerprint=b"x" * 32)
    assert "another text than the one" in differences(other)[0]


def test_limits_chat_and_context_are_told_of() -> None:
    [told] = differences(TITLES.limited({"max_item_tokens": 96}))
    assert told == "the adapter was tuned with items cut at 18 tokens, here at 96 (max_item_tokens)"
    assert "chat format" in differences(chat="plain")[0]
    assert differences(context="bos") == ("the adapter was tuned with canonical context instruction, this is bos",)
    told = LEARNT.text_differences(TITLES, None, "instruction", "causal")
    assert told == ("the adapter was tuned under mask blocks, model.mask is causal",)
    assert LEARNT.text_differences(TITLES, None, "instruction", "blocks") == ()
    causal = Learnt.of({**RECORD, "mask": "causal"}, "here")
    assert causal.text_differences(TITLES, None, "bos") == (), "under the causal mask a context is a way to reuse"


def test_fields_that_lack_and_fields_that_are_new() -> None:
    shares = {"title": 1.0, "chosen": 0.1, "genres": 0.9}
    assert LEARNT.missing(shares) == ("chosen",)
    lacking, new = LEARNT.field_differences(shares)
    assert lacking == "the adapter was tuned with 'chosen' in 80% of the items or more, here 10% have it"
    assert new == "the adapter was tuned without 'genres', here 90% of the items have it"
    assert LEARNT.missing({"chosen": 0.5}) == (), "more than half as many as in training"


def test_a_field_that_few_items_of_one_training_set_had_is_not_missed() -> None:
    learnt = Learnt.of({"fields": {"shop": {"genres": 1.0}, "books": {"genres": 0.4}}}, "here")
    assert learnt.field_differences({"genres": 0.0}) == ()


def test_options_of_a_request_are_told_of() -> None:
    [told] = LEARNT.option_differences(RankOptions(readout="label"))
    assert told == "the adapter was tuned for read-out pointwise, this is label"
    label = Learnt.of({**RECORD, "readout": "label"}, "here")
    told_of = label.option_differences(RankOptions(readout="label", layout="items_first", label_place="before"))
    assert told_of == (
        "the adapter was tuned with layout history_first, this is items_first",
        "the adapter was tuned with label_place after, this is before",
    )


def test_an_empty_record_holds_nothing_against_anything() -> None:
    nothing = Learnt.of({"mask": "causal", "curve": []}, "here")
    assert nothing.text_differences(Template.load("movies"), chat_format("plain"), "bos") == ()
    assert nothing.field_differences({"title": 0.0, "genres": 1.0}) == ()
    assert nothing.option_differences(RankOptions()) == ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"template": 3}, "expected texts in template"),
        ({"limits": [1]}, "expected 'limits'"),
        ({"limits": {"max_item_tokens": "many"}}, "expected 'limits'"),
        ({"fields": {"title": 1.0}}, "expected 'fields'"),
        ({"fields": 7}, "expected 'fields'"),
    ],
)
def test_a_broken_record_is_named(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Learnt.of(broken, "rcllm.json")
