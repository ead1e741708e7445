"""`rcllm enrich`: what stands in the items, what changes, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcllm.cli import enrich
from tests.cli.conftest import Run, Shop, read_lines, write_lines

ALONE = ("--interactions-only", "--min-users", "2")


def _fields(path: Path) -> dict[str, dict[str, str]]:
    return {row["item_id"]: row for row in read_lines(path.read_text(encoding="utf-8"))}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A data set in which i0 and i1 go together, and nobody chose i39."""
    folder = tmp_path / "log"
    folder.mkdir()
    write_lines(folder / "items.jsonl", [{"item_id": f"i{n}", "title": f"Thing {n}, fine"} for n in range(40)])
    write_lines(folder / "users.jsonl", [{"user_id": f"u{n}", "items": ["i0", "i1", f"i{2 + n}"]} for n in range(30)])
    return folder


def test_items_get_what_interactions_and_descriptions_know(run: Run, log: Path, tmp_path: Path) -> None:
    described = {"name": ["i0", "i7", "gone"], "text": ["Good for rain.", "Rare.", "Old."]}
    pq.write_table(pa.table(described), tmp_path / "knowledge.parquet")
    out = tmp_path / "enriched.jsonl"
    shown = run("enrich", "--dataset", log, "--out", out, *ALONE, "--knowledge", tmp_path / "knowledge.parquet")
    assert shown.exit_code == 0, shown.stderr
    assert "1 described items are not in the catalogue, such as 'gone'" in shown.stderr
    items = _fields(out)
    assert len(items) == 40
    assert items["i0"]["neighbours"] == "Thing 1, fine"
    assert items["i0"]["knowledge"] == "Good for rain."
    assert items["i39"] == {"item_id": "i39", "title": "Thing 39, fine", "chosen": "0"}


def test_a_second_run_changes_nothing_without_new_interactions(run: Run, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "enriched.jsonl"
    assert run("enrich", "--dataset", log, "--out", out, *ALONE).exit_code == 0
    first = out.read_bytes()
    again = run("enrich", "--dataset", log, "--out", out, *ALONE)
    assert "0 of 40 lists" in again.stdout
    assert out.read_bytes() == first
    other = run("enrich", "--dataset", log, "--out", out, *ALONE, "--neighbours", "2")
    assert "made with other settings" in other.stderr


def test_items_without_interactions_get_the_nearest_in_text(
    run: Run, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Encoder:
        @classmethod
        def load(cls, folder: Path, max_tokens: int) -> Encoder:
            return cls()

        def encode(self, texts: list[str]) -> np.ndarray:
            calls.append(len(texts))
            return np.eye(40, dtype=np.float32)[: len(texts)]

    monkeypatch.setattr(enrich, "SentenceEncoder", Encoder)
    monkeypatch.setattr(enrich, "_CHUNK", 16)
    out = tmp_path / "enriched.jsonl"
    words = ("enrich", "--dataset", log, "--out", out, "--encoder", tmp_path)
    shown = run(*words)
    assert shown.exit_code == 0, shown.stderr
    assert _fields(out)["i39"]["neighbours"]
    assert calls == [16, 16, 8]
    again = run(*words)
    assert calls == [16, 16, 8], "each text is embedded once"
    told = re.search(r"[\d,]+ by text alone", shown.stdout)
    assert told is not None
    assert told[0] in again.stdout
    assert not told[0].startswith("0 ")
    alone = run(*words, "--interactions-only")
    assert "0 by text alone" in alone.stdout
    assert "neighbours" not in _fields(out)["i39"]


def test_interactions_with_items_that_are_not_there_are_told(run: Run, log: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "items.jsonl", [{"item_id": f"i{n}", "title": f"Thing {n}"} for n in range(1, 40)])
    given = ("--dataset", log, "--items", tmp_path / "items.jsonl", "--out", tmp_path / "enriched.jsonl")
    shown = run("enrich", *given, *ALONE)
    assert shown.exit_code == 0, shown.stderr
    assert "30 of 90 interactions are with items that the catalogue lacks" in " ".join(shown.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--items", "{items}"), "give --dataset FOLDER"),
        (("--dataset", "{log}", "--neighbours", "0"), "--neighbours must be at least 1"),
        (("--dataset", "{log}", "--knowledge", "{items}"), "name"),
    ],
)
def test_what_cannot_be_used_is_said(
    run: Run, shop: Shop, log: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    given = [word.format(items=shop.items, log=log) for word in words]
    shown = run("enrich", "--out", tmp_path / "out.jsonl", *ALONE, *given)
    assert shown.exit_code in (1, 2)
    assert message in shown.stderr, shown.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_the_output_may_not_be_what_is_read(run: Run, log: Path) -> None:
    shown = run("enrich", "--dataset", log, "--out", log / "items.jsonl", *ALONE)
    assert shown.exit_code == 2
    assert "would overwrite" in shown.stderr


def test_rank_reads_the_enriched_items(run: Run, shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "enriched.jsonl"
    assert run("enrich", "--dataset", shop.dataset, "--out", out, *ALONE).exit_code == 0
    given = ("--model", shop.model, "--items", out, "--dataset", shop.dataset, "--memory-mb", "6000")
    asked = ("--template", "echo_enriched", "--readout", "pointwise", "--in", shop.requests, "--level", "exact")
    shown = run("rank", *given, *asked)
    assert shown.exit_code == 0, shown.stderr
    assert [json.loads(line)["request_id"] for line in shown.stdout.splitlines()] == ["r0", "r1", "r2"]
