"""`rcllm rank` and `rcllm explain` on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run, Shop, read_lines, write_lines

GOOD: dict[str, Any] = {"request_id": "good", "history": ["i1"], "candidates": ["i3", "i4", "i5"]}


def test_answers_come_in_order_with_what_they_cost(run: Run, shop: Shop) -> None:
    shown = run("rank", *shop.on_items, "--in", shop.requests)
    assert shown.exit_code == 0, shown.stderr
    answers = read_lines(shown.stdout)
    assert [answer["request_id"] for answer in answers] == ["r0", "r1", "r2"]
    first = answers[0]
    assert sorted(first["ranking"]) == ["i10", "i30", "i5"]
    assert list(first["scores"]) == first["ranking"]
    assert sorted(first["scores"].values(), reverse=True) == list(first["scores"].values())
    assert first["tokens_reused"] > 0
    assert first["tokens_computed"] == 0, "warmed before"
    assert "receipt" not in first


def test_without_warming_blocks_are_computed_with_the_request(run: Run, shop: Shop) -> None:
    [first, *_] = read_lines(run("rank", *shop.on_items, "--in", shop.requests, "--no-warm").stdout)
    assert first["tokens_computed"] > 0


@pytest.mark.parametrize("level", ["full", "exact", "tail(0.5)"])
def test_levels(run: Run, shop: Shop, level: str) -> None:
    words = ("rank", *shop.on_items, "--in", shop.requests, "--allow-uncalibrated")
    [first, *_] = read_lines(run(*words, "--level", level).stdout)
    assert first["level"] == level


def test_batches_give_the_same_ranking(run: Run, shop: Shop) -> None:
    words = ("rank", *shop.on_items, "--in", shop.requests, "--readout", "likelihood")
    one, three = (read_lines(run(*words, "--batch", size).stdout) for size in (1, 3))
    assert [answer["ranking"] for answer in one] == [answer["ranking"] for answer in three]
    assert three[0]["batch_size"] == 3


def test_receipts_and_a_file_in_a_new_folder(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    shown = run("rank", *shop.on_items, "--in", shop.requests, "--out", out, "--receipts", "--label-place", "before")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout == ""
    answers = read_lines(out.read_text(encoding="utf-8"))
    assert answers[0]["receipt"]["label_place"] == "before"
    assert {block["kind"] for block in answers[0]["receipt"]["blocks"]} >= {"instruction", "history", "item"}
    assert sorted(out.parent.iterdir()) == [out, out.with_name("answers.jsonl.job.json")]


def test_requests_from_stdin(run: Run, shop: Shop) -> None:
    shown = run("rank", *shop.on_items, "--in", "-", stdin=shop.requests.read_text(encoding="utf-8"))
    assert len(read_lines(shown.stdout)) == 3


@pytest.mark.parametrize("batch", [1, 4])
def test_bad_rows_and_requests_become_lines(run: Run, shop: Shop, tmp_path: Path, batch: int) -> None:
    path = tmp_path / "requests.jsonl"
    write_lines(path, [GOOD, {**GOOD, "request_id": "unknown", "candidates": ["i3", "nope"]}, GOOD])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"request_id": "cut"\n\n{"request_id": "empty", "candidates": []}\n')
    shown = run("rank", *shop.on_items, "--in", path, "--batch", batch)
    assert shown.exit_code == 1
    answers = read_lines(shown.stdout)
    assert [answer["request_id"] for answer in answers] == ["good", "unknown", "good", None, "empty"]
    assert "nope" in answers[1]["error"]
    assert answers[3]["line"] == 4
    assert answers[4]["line"] == 6
    assert f"{path}, line 4: expected a JSON object" in shown.stderr
    assert "3 of 5 requests failed" in shown.stderr


def test_strict_stops_and_keeps_what_was_answered(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    path = write_lines(tmp_path / "requests.jsonl", [GOOD, {**GOOD, "candidates": ["nope"]}])
    shown = run("rank", *shop.on_items, "--in", path, "--strict", "--out", out)
    assert shown.exit_code == 1
    assert "line 2" in shown.stderr
    good, failed = read_lines(out.read_text(encoding="utf-8"))
    assert good["ranking"]
    assert "nope" in failed["error"]


def test_scores_that_are_not_numbers_are_a_failure(run: Run, shop: Shop, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in shop.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for level in ("full", "blocks"):
        words = ("--items", shop.items, "--in", shop.requests, "--level", level, "--allow-uncalibrated")
        shown = run("rank", "--model", model, "--memory-mb", 6000, *words)
        assert shown.exit_code == 1
        for answer in read_lines(shown.stdout):
            assert "ranking" not in answer
            assert "the model gave scores that are not numbers" in answer["error"]


def test_an_empty_file_is_an_error(run: Run, shop: Shop, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "requests.jsonl", [])
    shown = run("rank", *shop.on_items, "--in", path)
    assert shown.exit_code == 1
    assert "empty file" in shown.stderr


def test_an_output_that_cannot_be_written(run: Run, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = run("rank", *shop.on_items, "--in", shop.requests, "--out", tmp_path / "file" / "answers.jsonl")
    assert shown.exit_code == 1
    assert "cannot be written" in shown.stderr


def test_volatile_columns_and_sampled_context(run: Run, shop: Shop) -> None:
    words = ("rank", *shop.on_dataset, "--items", shop.items, "--in", shop.requests, "--receipts")
    reusing = ("--level", "blocks", "--allow-uncalibrated")
    [first, *_] = read_lines(run(*words, *reusing, "--context", "mean(2)", "--volatile", "price").stdout)
    assert first["receipt"]["context"] == "mean(2)"
    fresh = [block for block in first["receipt"]["blocks"] if block["kind"] == "label" and block["owner"] == "i5"]
    assert fresh, "the price is a fresh block of its item"


def test_explain_shows_every_block(run: Run, shop: Shop) -> None:
    words = ("explain", *shop.on_items, "--request", f"{shop.requests}:2", "--allow-uncalibrated")
    shown = run(*words, "--level", "linked(2)")
    assert shown.exit_code == 0, shown.stderr
    for words in (
        "Request r1",
        "instruction",
        "lamp number 5",
        "position-free block",
        "[bold] rug number 0",
        "MB read",
    ):
        assert words in shown.stdout
    assert "corrected by the level's budget" in shown.stdout
    assert "what the user chose next" in shown.stdout


def test_explain_on_a_cold_cache(run: Run, shop: Shop) -> None:
    assert "computed" in run("explain", *shop.on_items, "--request", shop.requests, "--no-warm").stdout


@pytest.mark.parametrize(("where", "said"), [(":9", "no"), (":0", "line 0")])
def test_explain_needs_a_line_that_exists(run: Run, shop: Shop, where: str, said: str) -> None:
    shown = run("explain", *shop.on_items, "--request", f"{shop.requests}{where}")
    assert shown.exit_code == 1
    assert said in shown.stderr


# ---- what text is asked ---------------------------------------------------------------------------------------------


def books(folder: Path) -> tuple[str, Path, str, Path]:
    """Options for a catalogue whose titles stand in a column of another name, and requests for it."""
    items, requests = folder / "books.csv", folder / "books.jsonl"
    items.write_text("item_id,Book-Title,Author,Cost\n1,Orlando,Woolf,7.50\n2,Emma,Austen,5\n", encoding="utf-8")
    write_lines(requests, [{"request_id": "r", "candidates": ["1", "2"]}])
    return "--items", items, "--in", requests


def test_items_of_which_the_template_shows_nothing_are_said_before_the_model_is_loaded(
    run: Run, tmp_path: Path
) -> None:
    """A regression: exit 0, and every candidate read «(no text)»."""
    shown = run("rank", *books(tmp_path), "--model", tmp_path / "no such model")
    assert shown.exit_code == 1
    assert "no item has any of title, brand, categories, description" in shown.stderr
    assert "--field title=Book-Title" in shown.stderr
    assert "no such model" not in shown.stderr


def test_a_field_may_stand_in_a_column_of_another_name(run: Run, shop: Shop, tmp_path: Path) -> None:
    words = ("rank", *books(tmp_path), "--model", shop.model, "--receipts")
    shown = run(*words, "--field", "title=Book-Title", "--field", "price=Cost", "--volatile", "price")
    assert shown.exit_code == 0, shown.stderr
    [answer] = read_lines(shown.stdout)
    assert answer["receipt"]["notes"] == ["level auto: exact, " + answer["receipt"]["notes"][0].split("exact, ")[1]]
    labels = [block for block in answer["receipt"]["blocks"] if block["kind"] == "label" and block["owner"]]
    assert {block["owner"] for block in labels} == {"1", "2"}, "prices are shown"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--field", "title=Book-Titel"), "no row has a column 'Book-Titel'"),
        (("--field", "title=Book-Titel"), "Did you mean 'Book-Title'"),
        (("--field", "title"), "expected NAME=COLUMN, such as title=Book-Title"),
        (("--volatile", "Kost"), "no row has a column 'Kost'"),
    ],
)
def test_columns_that_are_not_there_are_said(run: Run, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    shown = run("rank", *books(tmp_path), *words)
    assert shown.exit_code in (1, 2)
    assert message in shown.stderr.replace("\n", " ")


def test_a_run_says_what_is_cut(run: Run, shop: Shop) -> None:
    words = ("rank", *shop.on_items, "--in", shop.requests, "--receipts")
    whole = run(*words)
    assert "cut to" not in whole.stderr
    shown = run(*words, "--max-item-tokens", "2", "--max-event-tokens", "3")
    assert "cut to 2 tokens as candidates (max_item_tokens)" in shown.stderr
    assert "cut to 3 tokens as events (max_event_tokens)" in shown.stderr
    notes = read_lines(shown.stdout)[0]["receipt"]["notes"]
    assert any("candidates cut to 2 tokens" in note for note in notes)


def test_a_candidate_that_is_asked_twice_is_an_error(run: Run, shop: Shop, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "requests.jsonl", [{**GOOD, "candidates": ["i3", "i4", "i3"]}, GOOD])
    shown = run("rank", *shop.on_items, "--in", path)
    assert shown.exit_code == 1
    first, second = read_lines(shown.stdout)
    assert "expected each candidate once, got i3 more than once" in first["error"]
    assert second["ranking"]


def test_an_adapter_is_held_against_what_it_is_asked(run: Run, shop: Shop, tmp_path: Path) -> None:
    tuning = ("--losses", "16", "--rank", "2", "--candidates", "4", "--history", "3", "--validation-requests", "3")
    made = run("tune", "--model", shop.model, "--dataset", shop.dataset, "--out", tmp_path, *tuning)
    assert made.exit_code == 0, made.stderr
    asked = ("--in", shop.requests, "--adapter", tmp_path / "best", "--template", "titles", "--receipts")
    good = run("rank", *shop.on_dataset, *asked, "--readout", "pointwise")
    assert "warning" not in good.stderr
    both = run("rank", *shop.on_dataset, "--items", shop.items, *asked, "--readout", "pointwise")
    assert "warning" not in both.stderr, "interactions make `chosen` for a file of items as well"
    assert read_lines(both.stdout)[0]["scores"] == read_lines(good.stdout)[0]["scores"]
    shown = run("rank", *shop.on_items, *asked, "--max-item-tokens", "5")
    for message in (
        "warning: the adapter was tuned with 'chosen' in 100% of the items or more, here 0% have it",
        "warning: the adapter was tuned with items cut at 18 tokens, here at 5",
        "warning: the adapter was tuned for read-out pointwise, this is label",
    ):
        assert message in shown.stderr
        assert message.removeprefix("warning: ") in str(read_lines(shown.stdout)[0]["receipt"]["notes"]).replace(
            '"', ""
        )
