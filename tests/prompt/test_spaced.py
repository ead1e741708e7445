"""Prompts of tokenizers that begin texts with a space: read as the template says, with one space at the very start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcllm.core.decoding import OpenRequest
from rcllm.core.ranking import Event, Item, ItemId, Prompt, RankOptions, RankRequest
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.template import Template, bundled, chat_format
from rcllm.prompt.tokenizer import Tokenizer
from tests.prompt.spaced import KINDS, save_spaced, spaced

CATALOGUE = {ItemId(i): Item(ItemId(i), {"title": title}) for i, title in (("a", "The Matrix"), ("b", "Toy Story"))}
ASKED = RankRequest("r", tuple(CATALOGUE), (Event(ItemId("a")), Event(text="The end")))
all_kinds = pytest.mark.parametrize("kind", KINDS)


def prompter(folder: Path, kind: str, chat: str = "plain", template: str = "movies") -> Prompter:
    tokenizer = Tokenizer.load(save_spaced(folder, kind))
    return Prompter(Template.load(template), chat_format(chat), tokenizer, CATALOGUE, b"model", 8192, 500)


def text(made: Prompter, prompt: Prompt) -> str:
    return made.tokenizer.decode([token for block in prompt.blocks for token in block.token_ids])


@all_kinds
@pytest.mark.parametrize("chat", ["plain", "mistral", "llama2", "zephyr"])
def test_a_prompt_reads_as_the_template_says(tmp_path: Path, kind: str, chat: str) -> None:
    made = prompter(tmp_path, kind, chat)
    t, c = made.template, made.chat
    prompt = made.build(ASKED)
    assert text(made, prompt) == (
        f"<s>{c.system}{t.system}{c.user}{t.instruction}{t.history_head}\n- The Matrix\n- The end{t.items_head}"
        f"\nThe Matrix (A)\nToy Story (B)\n{t.question}{c.assistant}{t.answer}"
    )


@all_kinds
def test_only_the_very_first_text_has_the_space(tmp_path: Path, kind: str) -> None:
    made = prompter(tmp_path, kind)
    ids = [token for block in made.build(ASKED).blocks for token in block.token_ids]
    whole = spaced(kind).encode(made.tokenizer.decode(ids).removeprefix("<s>")).ids
    assert ids[:2] == whole[:2] == [1, spaced(kind).token_to_id("▁You")]
    assert ids == whole, "these merges cross no block, so the blocks are what the whole text is"


@all_kinds
def test_answers_of_one_word_are_one_token(tmp_path: Path, kind: str) -> None:
    made = prompter(tmp_path, kind)
    prompt = made.build(replace(ASKED, options=RankOptions(readout="pointwise")))
    answers = tuple(spaced(kind).token_to_id(answer) for answer in ("▁yes", "▁no"))
    assert [read.token_ids for read in prompt.reads] == [answers, answers]


@all_kinds
@pytest.mark.parametrize("name", [name for name in bundled() if name.startswith("describe")])
def test_open_prompts_read_so_too(tmp_path: Path, kind: str, name: str) -> None:
    made = prompter(tmp_path, kind, template=name)
    t = made.template
    said = text(made, made.build_open(OpenRequest("r", (Event(ItemId("a")),))))
    assert said.startswith(f"<s>{t.system}\n\n{t.instruction}{t.history_head}\n")
    assert said.endswith(f"The Matrix{t.question}\n{t.answer}")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(save_spaced(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


parts = st.lists(st.one_of(st.text(max_size=6), st.sampled_from([" ", " yes", "The ", "\n- ", "  "])), max_size=6)


@all_kinds
@given(parts=parts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_join_to_their_text(loaded: dict[str, Tokenizer], kind: str, parts: list[str]) -> None:
    tokenizer, parts = loaded[kind], [part.replace("▁", "_") for part in parts]
    first, *others = [part.encode("utf-8", "replace").decode() for part in ["You", *parts]]
    ids = tokenizer.bos_ids + tokenizer.encode_opening(first)
    for part in others:
        ids += tokenizer.encode(part)
        assert tokenizer.decode(tokenizer.encode(part)) == part
    assert tokenizer.decode(ids) == "<s>" + first + "".join(others)


def test_tokenizers_without_such_a_space_open_as_they_go_on(tmp_path: Path) -> None:
    backend = spaced("metaspace")
    backend.pre_tokenizer = None
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_opening("The") == tokenizer.encode("The")
