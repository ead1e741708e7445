"""The sentence encoder equals transformers' BERT with mean pooling."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from rcllm.errors import ModelError
from rcllm.sid.embed import SentenceEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "lamp", "chair", "old", "new"]
TEXTS = ["red lamp", "new green chair", "old", "old red lamp", "", "green lamp sofa", "red lamp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(path)
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(path / "tokenizer.json"))
    return path


def test_equals_transformers(folder: Path) -> None:
    found = SentenceEncoder.load(folder).encode(TEXTS)
    model = BertModel.from_pretrained(folder).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        for text, vector in zip(TEXTS, found, strict=True):
            hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(dim=0)
            expected = torch.nn.functional.normalize(hidden, dim=0).numpy()
            assert np.abs(vector - expected).max() < 1e-5


def test_texts_do_not_depend_on_each_other_and_are_cut(folder: Path) -> None:
    encoder = SentenceEncoder.load(folder, max_tokens=4)
    told: list[int] = []
    together = encoder.encode(TEXTS, told.append)
    assert told == sorted(told)
    assert told[-1] == len(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    assert encoder.encode(["red lamp old new"])[0] == pytest.approx(encoder.encode(["red lamp"])[0])


def test_folders_that_hold_no_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json is missing; expected a folder with a sentence encoder"):
        SentenceEncoder.load(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = (folder / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace('"bert"', '"roberta"'), encoding="utf-8")
    with pytest.raises(ModelError, match="expected a BERT encoder with gelu, got 'roberta'"):
        SentenceEncoder.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("config.json", '{"model_type": "bert", "hidden_act": "gelu"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "junk"),
        ("model.safetensors", "junk"),
    ],
)
def test_junk_is_named_before_anything_is_embedded(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=str(tmp_path)):
        SentenceEncoder.load(tmp_path)


def test_weights_that_are_missing_of_another_shape_or_no_numbers(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = load_file(folder / "model.safetensors")
    name = next(name for name in whole if name.endswith("layer.1.output.dense.weight"))
    for changed in (
        {key: tensor for key, tensor in whole.items() if key != name},
        whole | {name: torch.ones(3, 3)},
        whole | {name: torch.full_like(whole[name], float("nan"))},
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=str(tmp_path)):
            SentenceEncoder.load(tmp_path)
