"""A tiny model folder, a catalogue, a data set and requests, for commands to work on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner, Result

from rcllm.cli.app import app
from rcllm.prompt.template import Template
from tests.tiny_models import tiny_model

_VOCAB = 512
TITLES = [f"{kind} number {number}" for kind in ("lamp", "kettle", "chair", "[bold] rug") for number in range(10)]


@dataclass(frozen=True)
class Shop:
    """Paths of everything that a command needs."""

    model: Path
    items: Path
    dataset: Path
    requests: Path

    @property
    def on_items(self) -> list[str]:
        return ["--model", str(self.model), "--items", str(self.items), "--memory-mb", "6000"]

    @property
    def on_dataset(self) -> list[str]:
        return ["--model", str(self.model), "--dataset", str(self.dataset), "--memory-mb", "6000"]


Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Runs `rcllm` with these words."""
    return lambda *words, stdin=None: CliRunner().invoke(app, [str(word) for word in words], input=stdin)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    dataset = folder / "dataset"
    dataset.mkdir()
    items = [{"item_id": f"i{n}", "title": title, "price": n} for n, title in enumerate(TITLES)]
    users = [{"user_id": f"u{n}", "items": [f"i{(n * 7 + step * 3) % 40}" for step in range(6)]} for n in range(60)]
    requests: list[dict[str, Any]] = [
        {"request_id": f"r{n}", "history": ["i1", "i2"], "candidates": ["i5", "i30", f"i{10 + n}"], "positive": "i5"}
        for n in range(3)
    ]
    write_lines(folder / "items.jsonl", items)
    write_lines(dataset / "items.jsonl", items)
    write_lines(dataset / "users.jsonl", users)
    write_lines(folder / "requests.jsonl", requests)
    return Shop(_model(folder), folder / "items.jsonl", dataset, folder / "requests.jsonl")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _model(folder: Path) -> Path:
    """A random Llama with a tokenizer that was trained on the template and the titles."""
    model = tiny_model("llama", folder, vocab_size=_VOCAB, max_position_embeddings=2048)
    template = Template.load("shopping")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([template.system, template.instruction, template.question, *TITLES], trainer)
    tokenizer.save(str(model / "tokenizer.json"))
    return model
