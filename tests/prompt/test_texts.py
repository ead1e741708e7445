"""Texts are cut to limits, in bounded time, and say so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from rcllm.core.ranking import Item, ItemId, RankRequest
from rcllm.errors import RequestError
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.template import Template, chat_format
from rcllm.prompt.texts import EMPTY_TEXT, TextCounts, Texts
from rcllm.prompt.tokenizer import Tokenizer
from tests.engine import tiny

TEMPLATE = Template.load(str(tiny.template_path()))


def item(name: str = "a", volatile: Mapping[str, str] | None = None, **fields: str) -> Item:
    return Item(ItemId(name), fields, volatile or {})


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(TEMPLATE, Tokenizer.load(tiny.model_folder()))


def prompter(*items: Item, template: Template = TEMPLATE) -> Prompter:
    catalogue = {each.item_id: each for each in items}
    return Prompter(template, chat_format("plain"), Tokenizer.load(tiny.model_folder()), catalogue, b"m", 8192, 500)


def asked(*names: str, **fields: object) -> RankRequest:
    return replace(tiny.request(1, (), level="exact"), candidates=tuple(map(ItemId, names)), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["very long words ", " ", "\n", "自転車", "x", "🪑 "])
@pytest.mark.parametrize("times", [1, 50, 5_000])
def test_the_start_of_a_long_text_is_that_of_the_whole(texts: Texts, unit: str, times: int) -> None:
    """exact, with texts on both sides of the length that is tokenised whole"""
    text = f"a lamp {unit * times} of steel"
    whole = texts.tokenizer.encode(f"\n- {text}")
    written = texts.own_words(text)
    assert written.ids == whole[: TEMPLATE.max_event_tokens]
    assert written.cut == (len(whole) > TEMPLATE.max_event_tokens)


def test_a_text_without_end_takes_no_time(texts: Texts) -> None:
    """A regression: 50 MB of an event were tokenised before all but 96 tokens were dropped (54 s)."""
    endless = "no end of words " * 3_000_000
    start = time.perf_counter()
    assert texts.own_words(endless).cut
    assert texts.item(item(title=endless)).cut
    assert texts.continued(item(title=endless)).cut
    assert texts.volatile(item(volatile={"price": endless})).cut
    assert len(texts.echo(item(title=endless))) <= TEMPLATE.max_echo_tokens
    assert time.perf_counter() - start < 5


def test_volatile_texts_have_a_limit_and_a_note(texts: Texts) -> None:
    """A regression: a style sheet in the price of an item made 888 fresh tokens of it, in every request."""
    css = ".a-box { color: red } " * 80
    made = prompter(item("a", {"price": css}, title="lamp"), item("b", {"price": "$2.99"}, title="tea"))
    prompt = made.build(asked("a", "b"))
    fresh = [len(block) for block in prompt.blocks if block.kind == "label" and block.owner == "a"]
    assert fresh == [TEMPLATE.max_volatile_tokens]
    assert prompt.notes == ("1 of 2 candidates with volatile text cut to 32 tokens: a",)


def test_an_ordinary_volatile_text_is_whole(texts: Texts) -> None:
    shown = texts.volatile(item(volatile={"price": "$1,299.99", "stock": "12 left"}))
    assert not shown.cut
    assert texts.tokenizer.decode(shown.ids) == " | price: $1,299.99 | stock: 12 left"
    assert texts.volatile(item(volatile={"unshown": "x"})).empty


def test_notes_count_each_kind_once() -> None:
    long = {f"i{i}": item(f"i{i}", title="word " * 100) for i in range(7)}
    made = prompter(*long.values(), item("none"), item("other", colour="red"), item("whole", title="tea"))
    prompt = made.build(asked(*long, "none", "other", "whole"))
    assert prompt.notes == (
        "7 of 10 candidates cut to 40 tokens: i0, i1, i2 and 4 more",
        f"2 of 10 candidates without a text that the template shows, so that they read {EMPTY_TEXT!r}: none, other",
    )


@pytest.mark.parametrize("readout", ["label", "pointwise", "likelihood"])
def test_every_read_out_notes_what_it_cuts(readout: str) -> None:
    """A regression: what `likelihood` scores was cut without a note."""
    request = asked("a", "b")
    assert request.options is not None
    made = prompter(item("a", title="word " * 100), item("b", title="tea"))
    options = replace(request.options, readout=readout)  # type: ignore[arg-type]
    assert made.build(replace(request, options=options)).notes == ("1 of 2 candidates cut to 40 tokens: a",)


def test_volatile_texts_that_no_prompt_shows_are_noted() -> None:
    made = prompter(item("a", title="lamp"), item("b", title="tea"))
    given = {ItemId("a"): {"price": "1", "prise": "2"}, ItemId("gone"): {"price": "3"}}
    assert made.build(asked("a", "b", volatile=given)).notes == (
        "1 of 2 volatile texts belong to no candidate: gone",
        "template tiny does not show the volatile fields prise",
    )
    likelihood = replace(tiny.request(1, (), level="exact", readout="likelihood"), candidates=(ItemId("a"),))
    [note] = made.build(replace(likelihood, volatile={ItemId("a"): {"price": "1"}})).notes
    assert note == "read-out likelihood does not show the volatile fields price"


def test_a_candidate_is_asked_once() -> None:
    made = prompter(item("a", title="lamp"), item("b", title="tea"), item("c", title="cup"))
    with pytest.raises(RequestError, match="each candidate once, got a, c more than once"):
        made.build(asked("a", "b", "c", "a", "c"))


def test_repeated_events_are_fine() -> None:
    made = prompter(item("a", title="lamp"), item("b", title="tea"))
    history = tiny.request(1, ("tea", "tea")).history
    assert made.build(asked("a", history=history)).notes == ()


def test_counts_of_a_catalogue() -> None:
    made = prompter(item("a", title="word " * 100), item("b", title="word " * 7), item("c"), item("d", title="tea"))
    counts = made.text_counts([*made.catalogue, ItemId("unknown")])
    assert counts == TextCounts(items=4, cut=1, cut_events=2, empty=1)
    assert counts.told(TEMPLATE) == (
        "of 4 items: 1 cut to 40 tokens as candidates (max_item_tokens), 2 cut to 24 tokens as events "
        "(max_event_tokens), 1 without a text that template tiny shows"
    )
    assert made.text_counts([ItemId("d")]).told(TEMPLATE) == ""
