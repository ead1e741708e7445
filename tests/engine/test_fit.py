"""A catalogue and a configuration are held against the template and the adapter's record."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rcllm.config import Config, ModelConfig, PromptConfig
from rcllm.core.ranking import Interaction, Item, ItemId, RankOptions, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.data.popularity import with_chosen, with_popularity
from rcllm.engine.engine import Engine
from rcllm.engine.fit import fit
from rcllm.errors import ConfigError, DataError, ModelError, TextWarning
from rcllm.model.adapter import save_adapter
from rcllm.tune.examples import ExampleConfig
from rcllm.tune.setup import make_trainer
from rcllm.tune.train import TuneConfig
from tests.engine import tiny

TUNING = TuneConfig(rank=2, losses=1, validation_requests=2, examples=ExampleConfig(num_candidates=4, num_history=3))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny template, which also shows how often an item was chosen."""
    path = tmp_path_factory.mktemp("template") / "counted.toml"
    text = tiny.TEMPLATE.replace('item = ["{title}"', 'item = ["{chosen}+ | ", "{title}"')
    path.write_text(text.replace('name = "tiny"', 'name = "counted"'), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `rcllm tune` saves one, for pointwise, before its first step."""
    folder = tmp_path_factory.mktemp("adapter")
    prompt = PromptConfig(template=str(template))
    trainer = make_trainer(ModelConfig(path=str(tiny.model_folder()), device="cpu"), prompt, [shop()], TUNING, folder)
    save_adapter(folder, trainer.network.adapter(), tiny.model_folder().name, trainer.record())
    return folder


def shop() -> Dataset:
    """Users who walk through the catalogue in steps of one."""
    rows = [
        Interaction(UserId(f"u{user}"), tiny.IDS[(user + step) % 58], float(step))
        for user in range(60)
        for step in range(6)
    ]
    return Dataset("shop", Catalogue(list(tiny.catalogue().values())[:58]), tuple(rows))


def config(template: Path, adapter: Path | None = None, **prompt: Any) -> Config:
    base = tiny.config()
    model = replace(base.model, adapter=str(adapter) if adapter else "")
    return replace(base, model=model, prompt=PromptConfig(template=str(template), **prompt))


def receipt_notes(engine: Engine, readout: str = "pointwise") -> tuple[str, ...]:
    return engine.rank(tiny.request(3, (30,), level="exact", readout=readout)).receipt.notes


def texts(engine: Engine, items: Mapping[ItemId, Item]) -> list[str]:
    prompter = engine.prompter
    return [prompter.tokenizer.decode(prompter.texts.item(prompter.item(item_id)).ids) for item_id in items]


def test_a_ranker_is_fed_what_it_learnt_from_whatever_builds_the_engine(template: Path, adapter: Path) -> None:
    """A regression: `chosen`, which `rcllm tune` and the command line added, was missing in Python, silently."""
    data = shop()
    plain = Engine.build(data.catalogue, config(template, adapter))
    enriched = Engine.build(with_popularity(data).catalogue, config(template, adapter))
    assert texts(plain, data.catalogue) == texts(enriched, data.catalogue)
    assert all("+ | " in text for text in texts(plain, data.catalogue))
    assert receipt_notes(plain) == ()


def test_what_cannot_be_made_is_said_when_building_and_in_every_receipt(template: Path, adapter: Path) -> None:
    with pytest.warns(TextWarning) as told:
        engine = Engine.build(dict(shop().catalogue), config(template, adapter))
    said = [str(warning.message) for warning in told]
    assert said[0] == "the adapter was tuned with 'chosen' in 100% of the items or more, here 0% have it"
    assert "give --dataset FOLDER" in said[1]
    assert receipt_notes(engine) == tuple(said)


def test_interactions_from_elsewhere_make_it_as_well(template: Path, adapter: Path) -> None:
    data = shop()
    items = Catalogue(data.catalogue.values())
    made = fit(items.knowing(data.interactions), config(template, adapter))
    assert made.notes == ()
    assert dict(made.catalogue) == dict(with_chosen(items, data.interactions))


def test_interactions_with_items_that_are_not_there_are_left_out_and_told(tmp_path: Path) -> None:
    """A regression: a log that names an item which the catalogue lacks ended in a KeyError."""
    data, path = shop(), tmp_path / "enriched.toml"
    shown = 'item = ["{neighbours} | ", "{title}"'
    text = tiny.TEMPLATE.replace('item = ["{title}"', shown).replace("volatile = [", 'volatile = [" {rank} {match}", ')
    path.write_text(text, encoding="utf-8")
    fewer = Catalogue(list(data.catalogue.values())[:-1])
    fitted = fit(fewer.knowing(data.interactions), config(path))
    assert fitted.scores is not None
    assert any("neighbours" in item.fields for item in fitted.catalogue.values())
    gone = sum(row.item_id not in fewer for row in data.interactions)
    [told] = fitted.remarks()
    assert told.startswith(f"{gone} of {len(data.interactions)} interactions are with items that the catalogue lacks")
    assert fitted.notes == (), "receipts do not repeat it"
    assert fit(fewer.knowing(data.interactions), tiny.config()).remarks() == (), "nothing is made of them"


def test_counts_are_those_of_training_users_and_the_catalogues_own_stay(template: Path) -> None:
    data = shop()
    made = fit(data.catalogue, config(template)).catalogue
    counts = {item_id: int(item.fields["chosen"]) for item_id, item in made.items()}
    trained = [row.item_id for row in data.interactions if split_of(row.user_id) == "train"]
    assert set(counts.values()) <= {0, 1, 2, 4, 8}
    assert all(count <= trained.count(item_id) < 2 * max(count, 1) for item_id, count in counts.items())
    own = Dataset("own", Catalogue([Item(tiny.IDS[0], {"title": "a", "chosen": "7"})]), data.interactions[:1])
    assert fit(own.catalogue, config(template)).catalogue[tiny.IDS[0]].fields["chosen"] == "7"


def test_a_template_that_does_not_show_it_leaves_the_catalogue_as_it_is() -> None:
    items = shop().catalogue
    assert fit(items, tiny.config()).catalogue is items
    live = tiny.catalogue()
    assert fit(live, tiny.config()).catalogue is live, "what a user may still change"


def test_another_template_limits_or_read_out_than_the_recorded_ones(template: Path, adapter: Path) -> None:
    items = shop().catalogue
    notes = fit(items, config(tiny.template_path(), adapter)).notes
    assert notes == ("the adapter was tuned with template counted, this is tiny",)
    assert "items cut at 40 tokens, here at 9" in fit(items, config(template, adapter, max_item_tokens=9)).notes[0]
    assert "chat format" in fit(items, config(template, adapter, chat="mistral")).notes[0]
    fitted = fit(items, config(template, adapter))
    assert fitted.remarks() == ()
    assert fitted.remarks([RankOptions(readout="label"), RankOptions(readout="pointwise")]) == (
        "the adapter was tuned for read-out pointwise, this is label",
    )
    engine = Engine.build(items, config(template, adapter))
    assert receipt_notes(engine, "label") == fitted.remarks([RankOptions()])


def test_an_adapter_from_elsewhere_is_taken_as_it_is(template: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    assert fit(dict(shop().catalogue), config(template, tmp_path)).notes == ()
    (tmp_path / "rcllm.json").write_text(json.dumps({"fields": []}), encoding="utf-8")
    with pytest.raises(ModelError, match="expected 'fields'"):
        fit(shop().catalogue, config(template, tmp_path))


def test_items_of_which_the_template_shows_nothing_are_refused_before_the_model_is_loaded() -> None:
    """A regression: every candidate read «(no text)», and the ranking was the labels' bias."""
    books = Catalogue([Item(ItemId("1"), {"Author": "Woolf", "Book-Title": "Orlando"})])
    with pytest.raises(DataError) as refused:
        fit(books, Config(prompt=PromptConfig(template="shopping")))
    assert str(refused.value) == (
        "no item has any of title, brand, categories, description, which template shopping shows; the items have "
        "Author, Book-Title: name the column that holds one with --field title=Book-Title, or give a --template that "
        "shows what there is"
    )
    with pytest.raises(DataError, match="the items have no text at all: give a --template"):
        fit(Catalogue([Item(ItemId("1"), {})]), Config())


def test_open_prompts_and_empty_catalogues_may_do_without_texts() -> None:
    config = Config(prompt=PromptConfig(template="describe_user"))
    assert fit({}, Config()).notes == ()
    [note] = fit(Catalogue([Item(ItemId("1"), {"Book-Title": "Orlando"})]), config).notes
    assert note.startswith("no item has any of title, year, brand")


def test_limits_are_part_of_keys_and_of_what_a_calibration_belongs_to() -> None:
    whole, cut = tiny.fresh(), tiny.build(max_item_tokens=12)
    assert cut.prompter.namespace != whole.prompter.namespace
    assert cut.identity.template != whole.identity.template
    assert tiny.build(max_item_tokens=40).identity == whole.identity, "the template's own limit"
    notes = cut.rank(tiny.request((0, 1, 59))).receipt.notes
    assert any("cut to 12 tokens" in note for note in notes)


@pytest.mark.parametrize("name", ["max_item_tokens", "max_event_tokens", "max_volatile_tokens"])
def test_limits_below_zero_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"prompt\.{name}.*-1"):
        Engine.build(tiny.catalogue(), Config(prompt=PromptConfig(**{name: -1})))


def test_nothing_is_warned_of_where_all_is_as_it_should_be() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.build()


def test_a_score_field_is_made_of_interactions_and_its_lack_is_told(tmp_path: Path) -> None:
    """A ranker that learnt to read scores gets them where interactions are known, and says so where they are not."""
    path = tmp_path / "scored.toml"
    lines = [
        'volatile = [" {rank} {match}"]' if line.startswith("volatile =") else line
        for line in tiny.TEMPLATE.splitlines()
    ]
    path.write_text("\n".join(lines).replace('name = "tiny"', 'name = "scored"'), encoding="utf-8")
    prompt, folder = PromptConfig(template=str(path)), tmp_path / "adapter"
    model = ModelConfig(path=str(tiny.model_folder()), device="cpu")
    trainer = make_trainer(model, prompt, [shop()], TUNING, folder)
    save_adapter(folder, trainer.network.adapter(), tiny.model_folder().name, trainer.record())
    asked = replace(tiny.request(), user_id=UserId("somebody"), options=RankOptions(readout="pointwise"), volatile={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        knows = Engine.build(shop().catalogue, config(path, folder))
        knows_not = Engine.build(Catalogue(shop().catalogue.values()), config(path, folder))
    with_scores, without = knows.prompter.build(asked), knows_not.prompter.build(asked)
    assert with_scores.num_tokens > without.num_tokens
    assert not any("come without" in note for note in with_scores.notes)
    twice = fit(fit(shop().catalogue, config(path, folder)).catalogue, config(path, folder))
    assert twice.scores is not None, "as the command line does"
    assert any("come without match, rank, which the adapter was tuned with" in note for note in without.notes)
