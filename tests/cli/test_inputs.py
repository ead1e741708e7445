"""From options to catalogue and data set: layouts and columns as they are said, and what was guessed is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.cli.inputs import load_inputs
from rcllm.cli.options import ItemOptions
from rcllm.core.ranking import UserId
from rcllm.data import histories
from rcllm.errors import ConfigError, DataError
from tests.cli.conftest import Run, Shop


def test_books_in_latin_1_with_semicolons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "books.dat"
    path.write_bytes('"ISBN";"title"\n"1";"Caf\xe9, Noir"\n"2";"B"\n'.encode("latin-1"))
    with pytest.raises(DataError, match="--delimiter"):
        load_inputs(ItemOptions(items=path))
    path = path.rename(tmp_path / "books.csv")
    for options in (ItemOptions(items=path), ItemOptions(items=path, delimiter=";", encoding="latin-1")):
        catalogue = load_inputs(options).catalogue
        assert [item.fields["title"] for item in catalogue.values()] == ["Café, Noir", "B"]
        told = capsys.readouterr().err
        assert "note: " in told
        assert "from the column 'ISBN'" in told
        assert ("separated by a semicolon" in told) is (options.delimiter is None)


def test_a_tab_can_be_typed(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("item_id\ttitle\n1\ta, b\n")
    for word in ("\\t", "tab"):
        assert list(load_inputs(ItemOptions(items=path, delimiter=word)).catalogue) == ["1"]
    with pytest.raises(ConfigError, match="expected a delimiter of one character, got ';;'"):
        load_inputs(ItemOptions(items=path, delimiter=";;"))


def test_columns_of_a_data_set_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.inter").write_text("listener:token\tsong:token\twhen:float\nu\t7\t5\nu\t9\t3\n")
    with pytest.raises(DataError, match="--user-field"):
        load_inputs(ItemOptions(dataset=tmp_path))
    options = ItemOptions(dataset=tmp_path, user_field="listener", item_field="song", time_field="when")
    dataset = load_inputs(options).dataset
    assert dataset is not None
    assert [row.item_id for row in histories(dataset.interactions)[UserId("u")]] == ["9", "7"]
    assert "the folder was read as recbole, because of x.inter" in capsys.readouterr().err


def test_a_data_set_is_read_over_the_items_that_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A regression: requests that were made of it named items that the file lacks."""
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\t7\t5\nu\t9\t3\n")
    items = tmp_path / "items.jsonl"
    items.write_text('{"item_id": "7", "title": "Seven"}\n')
    dataset = load_inputs(ItemOptions(items=items, dataset=tmp_path)).dataset
    assert dataset is not None
    assert list(dataset.catalogue) == [row.item_id for row in dataset.interactions] == ["7"]
    assert "1 of 2 interactions are with items that the catalogue lacks" in capsys.readouterr().err
    items.write_text('{"item_id": "8", "title": "Eight"}\n')
    with pytest.raises(DataError, match=r"no interaction of .* is with an item of .*items\.jsonl, such as '7'"):
        load_inputs(ItemOptions(items=items, dataset=tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        ItemOptions(dataset=Path(), encoding="latin-1"),
        ItemOptions(dataset=Path(), volatile=("price",)),
        ItemOptions(dataset=Path(), field=("title=name",)),
        ItemOptions(dataset=Path(), id_field="code"),
        ItemOptions(items=Path("x.csv"), user_field="who"),
    ],
)
def test_options_about_what_is_not_given_are_refused(options: ItemOptions) -> None:
    with pytest.raises(ConfigError, match="or leave them out"):
        load_inputs(options)


def test_a_misspelt_volatile_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"item_id": "a", "price": 3}\n')
    with pytest.raises(DataError, match="Did you mean 'price'"):
        load_inputs(ItemOptions(items=path, volatile=("prise",)))


@pytest.mark.parametrize("words", ["rank --in", "explain --request", "bench ttft --in", "probe position --in"])
def test_a_template_that_ranks_nothing_is_said_before_the_model_is_loaded(run: Run, shop: Shop, words: str) -> None:
    shown = run(
        *words.split(), shop.requests, "--items", shop.items, "--model", "nowhere", "--template", "describe_user"
    )
    assert shown.exit_code == 2
    assert "template 'describe_user' is for open prompts and ranks no candidates" in shown.stderr


@pytest.mark.parametrize("command", ["calibrate", "tune"])
def test_the_same_of_commands_that_learn(run: Run, shop: Shop, tmp_path: Path, command: str) -> None:
    words = ("--dataset", shop.dataset, "--model", "nowhere", "--template", "describe_user", "--out")
    shown = run(command, *words, tmp_path / "out.json")
    assert shown.exit_code == 2
    assert "ranks no candidates" in shown.stderr
    assert not list(tmp_path.iterdir())


def test_more_candidates_than_there_are_items(run: Run, shop: Shop) -> None:
    shown = run("bench", "ttft", *shop.on_dataset, "--count", "2")
    assert shown.exit_code == 1
    assert "in a catalogue of 40; ask for fewer candidates" in shown.stderr
