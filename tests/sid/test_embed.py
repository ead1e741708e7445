"""The sentence encoder equals transformers' BERT with mean pooling."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
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
    with pytest.raises(ModelError, match="is not a folder with a sentence encoder"):
        SentenceEncoder.load(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = (folder / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace('"bert"', '"roberta"'), encoding="utf-8")
    with pytest.raises(ModelError, match="expected a BERT encoder with gelu, got 'roberta'"):
        SentenceEncoder.load(tmp_path)
