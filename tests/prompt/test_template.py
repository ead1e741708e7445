"""Templates: what is read, what is refused and with which words, how parts are rendered."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from rcllm.config import PromptConfig
from rcllm.errors import ConfigError
from rcllm.prompt.template import Template, bundled, chat_format, placeholders, render
from tests.engine.tiny import TEMPLATE


def write(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return str(folder / "mine.toml")


def changed(folder: Path, key: str, line: str) -> str:
    """The tiny template with the line of `key` replaced."""
    lines = [line if before.startswith(f"{key} =") else before for before in TEMPLATE.splitlines()]
    assert lines != TEMPLATE.splitlines()
    return write(folder, "\n".join(lines))


@pytest.mark.parametrize("name", bundled())
def test_bundled_templates_load(name: str) -> None:
    template = Template.load(name)
    assert template.name == name
    assert len(template.fingerprint) == 32
    assert template.open or render(template.item, {"title": "a lamp"}) == "a lamp"


def test_a_file_on_disk_loads_and_any_byte_changes_its_fingerprint(tmp_path: Path) -> None:
    first = Template.load(write(tmp_path, TEMPLATE))
    assert first.item == tuple(tomllib.loads(TEMPLATE)["item"])
    assert Template.load(write(tmp_path, TEMPLATE)) == first
    assert Template.load(write(tmp_path, TEMPLATE + "\n")).fingerprint != first.fingerprint


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no template 'shoping'; did you mean 'shopping'.*\.toml"):
        Template.load("shoping")


def test_an_unknown_key_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'questoin'; did you mean 'question'"):
        Template.load(write(tmp_path, TEMPLATE + '\nquestoin = "x"'))


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing answer, question$"):
        Template.load(write(tmp_path, "\n".join(x for x in TEMPLATE.splitlines() if x[:4] not in ("ques", "answ"))))


@pytest.mark.parametrize(
    ("key", "line", "message"),
    [
        ("system", "system = 3", "system must be a text, got 3"),
        ("version", "version = true", "version must be a whole number, got true"),
        ("item", 'item = "{title}"', "item must be a list"),
        ("item", "item = [3]", r"item\[0\] must be a text, got 3"),
        ("item", 'item = ["{title"]', "not a plain {field}"),
        ("item", 'item = ["{}"]', "not a plain {field}"),
        ("item", 'item = ["{title.upper}"]', "not a plain {field}"),
        ("event", 'event = ["}"]', "not a plain {field}"),
        ("max_item_tokens", "max_item_tokens = 0", "max_item_tokens must be at least 1"),
        ("max_event_tokens", "max_event_tokens = -3", "max_event_tokens must be at least 1"),
        ("label_before", 'label_before = ["("]', "label_before and label_after are"),
        ("pointwise_answers", 'pointwise_answers = ["yes"]', "an answer for the item and one against it"),
        ("pointwise_answers", 'pointwise_answers = ["yes", ""]', "is empty"),
        ("pointwise_question", 'pointwise_question = ""', "pointwise_question must not be empty"),
        ("likelihood_head", 'likelihood_head = ""', "likelihood_head must not be empty"),
        ("event_text", 'event_text = "- text"', "event_text must hold {text}"),
        ("item", 'item = ["a thing"]', "item shows no {field}"),
        ("likelihood_item", "likelihood_item = []", "likelihood_item shows no {field}"),
        ("name", "name = ", r"mine\.toml"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, key: str, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        Template.load(changed(tmp_path, key, line))


def test_question_and_answer_must_not_both_be_empty(tmp_path: Path) -> None:
    path = changed(tmp_path, "question", 'question = ""')
    assert Template.load(path).question == ""
    text = Path(path).read_text(encoding="utf-8").replace('answer = "Answer: ("', 'answer = ""')
    with pytest.raises(ConfigError, match="question and answer must not be empty"):
        Template.load(write(tmp_path, text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        Template.load(str(tmp_path / "mine.toml"))


def test_braces_in_labels_and_answers_are_text(tmp_path: Path) -> None:
    assert Template.load(changed(tmp_path, "label_before", 'label_before = ["{", "}"]')).label_before == ("{", "}")


def test_parts_without_all_their_fields_are_left_out() -> None:
    parts = ("{title}", " by {brand} for {price}", "!")
    assert render(parts, {"title": "a", "brand": "b"}) == "a!"
    assert render(parts, {"title": "a", "brand": "b", "price": "1"}) == "a by b for 1!"
    assert render(parts, {"title": "", "brand": "b"}) == "!"
    assert placeholders("{a} and {b}") == ("a", "b")


def test_values_are_never_templates_themselves() -> None:
    assert render(("{title}",), {"title": "{brand} {0} {{"}) == "{brand} {0} {{"


@pytest.mark.parametrize("name", ["plain", "chatml", "llama3", "mistral"])
def test_chat_formats(name: str) -> None:
    chat = chat_format(name)
    assert chat.user
    assert chat.assistant


def test_an_unknown_chat_format_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no chat format 'lama3'; did you mean 'llama3'"):
        chat_format("lama3")


def test_templates_for_open_prompts_leave_out_what_rankings_have(tmp_path: Path) -> None:
    kept = ("name", "version", "system", "instruction", "history_head", "event", "event_text", "question")
    lines = [line for line in TEMPLATE.splitlines() if line.split(" = ")[0] in (*kept, "max_event_tokens")]
    with pytest.raises(ConfigError, match="missing answer, item"):
        Template.load(write(tmp_path, "\n".join(lines)))
    assert Template.load(write(tmp_path, "\n".join([*lines, "open = true"]))).open


def test_limits_of_a_configuration_stand_over_those_of_the_template() -> None:
    plain = Template.load("shopping")
    assert Template.of(PromptConfig()) == plain
    assert plain.limits == {"max_item_tokens": 96, "max_event_tokens": 96, "max_volatile_tokens": 32}
    longer = Template.of(PromptConfig(max_item_tokens=200, max_event_tokens=96))
    assert longer.limits == {"max_item_tokens": 200, "max_event_tokens": 96, "max_volatile_tokens": 32}
    assert longer.text_fingerprint == plain.text_fingerprint == plain.fingerprint != longer.fingerprint
    assert Template.of(PromptConfig(max_item_tokens=96)) == plain, "its own limit is no other"


def test_the_fields_that_are_shown() -> None:
    assert Template.load("titles").shown == ("chosen", "title", "genres", "categories")
    assert Template.load("shopping").shown_fresh == ("price", "stock")
    assert Template.load("describe_user").shown == ("title", "year", "brand", "genres", "categories"), "open: of events"
