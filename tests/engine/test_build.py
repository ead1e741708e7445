"""What is checked while an engine is made: parts that do not belong together, and text that a model cannot be asked."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers

from rcllm.config import Config
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, ModelError, ModelWarning
from rcllm.model.adapter import MODULES, Adapter, LowRank, module_shape, save_adapter
from rcllm.model.attend.native import INSTRUCTIONS, kernels
from rcllm.model.weights import load_spec
from tests.engine import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny.model_folder(), tmp_path / "qwen3-tiny")


def configured(folder: Path, adapter: Path | None = None, **prompt: str) -> Config:
    config = tiny.config()
    model = replace(config.model, path=str(folder), adapter=str(adapter or ""))
    return replace(config, model=model, prompt=replace(config.prompt, **prompt))  # type: ignore[arg-type]


def test_a_chat_template_that_nobody_knows_asks_to_choose(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'USER: ' + messages[0]['content'] + ' ASSISTANT:' }}")
    with pytest.raises(ConfigError, match=r"chat template of .*set prompt\.chat to the nearest of plain, chatml"):
        Engine.build(tiny.catalogue(), configured(folder))
    chosen = Engine.build(tiny.catalogue(), configured(folder, chat="plain"))
    assert chosen.prompter.chat.system == ""


def test_the_models_own_chat_template_counts_more_than_its_vocabulary(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}")
    assert Engine.build(tiny.catalogue(), configured(folder)).prompter.chat.system == "[INST] "


def test_the_tokenizers_end_token_ends_texts_too(folder: Path) -> None:
    """As in models tuned for a chat format, whose config.json still names the end of a document."""
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Engine.build(tiny.catalogue(), configured(folder)).decoder.spec.eos_ids == (5, 2)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    words = models.WordLevel({"[UNK]": 0, "hello": tiny.VOCAB}, unk_token="[UNK]")
    BackendTokenizer(words).save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"has 513 tokens, the model 512; they do not belong together"):
        Engine.build(tiny.catalogue(), configured(folder))


def test_labels_that_the_tokenizer_cannot_write_are_refused(folder: Path) -> None:
    """Every candidate would get 0.0, in the order asked."""
    backend = BackendTokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2, "lamp": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    engine = Engine.build(tiny.catalogue(), configured(folder))
    with pytest.raises(ConfigError, match="cannot write the labels A, B, C, D and 1 more"):
        engine.rank(tiny.request())
    engine.rank(tiny.request(readout="pointwise"))  # its answers are in the vocabulary


def adapter_for(folder: Path, base: str, target: Path) -> Path:
    spec = load_spec(folder)

    def empty(module: str) -> LowRank:
        rows, columns = module_shape(spec, module)
        return LowRank(torch.zeros(2, columns), torch.zeros(rows, 2), 1.0)

    layers = {(layer, module): empty(module) for layer in range(spec.num_layers) for module in MODULES}
    save_adapter(target, Adapter(2, 2.0, layers), base, {"mask": "causal"})
    return target


@pytest.mark.parametrize("base", ["owner/Other-135M", "/models/other-135m/", "C:\\models\\other-135m"])
def test_an_adapter_that_names_another_base_model_is_told_of(folder: Path, tmp_path: Path, base: str) -> None:
    adapter = adapter_for(folder, base, tmp_path / "adapter")
    with pytest.warns(ModelWarning, match=r"trained for .*ther-135.*their shapes fit, their names differ"):
        Engine.build(tiny.catalogue(), configured(folder, adapter))


@pytest.mark.parametrize(
    "base",
    [
        "",
        "qwen3-tiny",
        "Owner/Qwen3_Tiny",
        "/elsewhere/qwen3-tiny/",
        "unsloth/qwen3-tiny-bnb-4bit",
        "/root/.cache/huggingface/hub/models--Owner--Qwen3-Tiny/snapshots/0123456789abcdef",
    ],
)
def test_names_of_one_model_may_be_written_in_many_ways(folder: Path, tmp_path: Path, base: str) -> None:
    Engine.build(tiny.catalogue(), configured(folder, adapter_for(folder, base, tmp_path / "adapter")))


def test_the_name_in_the_configuration_counts_too(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "owner/Other-135M"}))
    Engine.build(tiny.catalogue(), configured(folder, adapter_for(folder, "owner/other-135m", tmp_path / "adapter")))


def test_an_adapter_of_other_shapes_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_for(tiny.model_folder(tiny.TORCH), "qwen3-tiny", tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"made for another model \(qwen3-tiny\)"):
        Engine.build(tiny.catalogue(), configured(folder, adapter))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_products_that_are_imitated_say_what_they_cost(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch alone imitates them, and so do kernels without the instruction, with a warning."""
    model = tiny.computing_in(dtype)
    with pytest.warns(
        ModelWarning, match=rf"{dtype}, but torch alone .* imitated, .* at \d+\.\d\d times the speed of fp32 \(measured"
    ):
        slow = tiny.build(tiny.TORCH, **model)
    assert slow.decoder.dtype == torch.float32
    assert dtype == "int8" or slow.decoder.embed.dtype == torch.bfloat16
    if (compiled := kernels()) is not None:
        monkeypatch.setattr(compiled, "products", {"fp32"})
        with pytest.warns(ModelWarning, match=rf"no {INSTRUCTIONS[dtype]}: products are imitated"):
            tiny.build(tiny.NATIVE, **model)
        monkeypatch.setattr(compiled, "products", {"fp32", dtype})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.build(tiny.NATIVE, **model)
