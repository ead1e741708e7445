"""Adapters against peft: what it saves we merge to the same model, and what we save it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rcllm.errors import ModelError
from rcllm.model.adapter import (
    MODULES,
    Adapter,
    LowRank,
    adapter_fingerprint,
    adapter_mask,
    load_adapter,
    merge,
    module_shape,
    save_adapter,
)
from rcllm.model.decoder import Decoder
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import load_model
from tests.engine import tiny

# peft asks transformers for a property that transformers has deprecated; theirs to settle
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = [5, 17, 301, 44, 9, 88, 230]
FAMILIES = [tiny.NATIVE, tiny.TORCH]


def random_adapter(spec: ModelSpec, rank: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(0)

    def low_rank(module: str) -> LowRank:
        rows, columns = module_shape(spec, module)
        parts = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        return LowRank(*(0.1 * part.half().float() for part in parts))

    return Adapter(rank, 6.0, {(layer, m): low_rank(m) for layer in range(spec.num_layers) for m in MODULES})


def logits(family: str, adapter: Path | None) -> torch.Tensor:
    spec, weights = load_model(tiny.model_folder(family))
    if adapter is not None:
        weights = merge(weights, load_adapter(adapter, spec))
    return Decoder(spec, weights).full_logits(TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_adapters_are_merged_to_the_same_model(tmp_path: Path, family: str, rank_stabilised: bool) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny.model_folder(family), dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rank_stabilised
    )
    theirs = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    theirs.save_pretrained(tmp_path)
    assert (expected - logits(family, None)).abs().max() > 1e-2, "the adapter changes something"
    torch.testing.assert_close(logits(family, tmp_path), expected, atol=2e-5, rtol=0)
    assert adapter_mask(tmp_path) == "causal"


@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapters_are_loaded_by_peft(tmp_path: Path, family: str) -> None:
    spec, _ = load_model(tiny.model_folder(family))
    save_adapter(tmp_path, random_adapter(spec), "tiny", {"mask": "blocks"})
    base = AutoModelForCausalLM.from_pretrained(tiny.model_folder(family), dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(family, tmp_path), expected, atol=2e-5, rtol=0)
    assert adapter_mask(tmp_path) == "blocks"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    spec, _ = load_model(tiny.model_folder())
    save_adapter(tmp_path, random_adapter(spec), "tiny", {"mask": "causal"})
    return tmp_path


def change(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "expected plain LoRA"),
        ({"use_dora": True}, "expected plain LoRA"),
        ({"bias": "all"}, "expected plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks that differ"),
        ({"modules_to_save": ["lm_head"]}, "saved modules"),
        ({"r": 5}, r"expected \(5, "),
        ({"r": "many"}, "not a whole LoRA adapter"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(saved: Path, values: dict[str, object], message: str) -> None:
    change(saved, **values)
    with pytest.raises(ModelError, match=message):
        load_adapter(saved, load_model(tiny.model_folder())[0])


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="expected"):
        load_adapter(saved, load_model(tiny.model_folder(tiny.TORCH))[0])


def test_a_tensor_without_a_place_is_named(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    save_file(load_file(path) | {"somewhere.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"no place for somewhere\.lora_A"):
        load_adapter(saved, load_model(tiny.model_folder())[0])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_and_missing_files_are_named(saved: Path, name: str) -> None:
    spec = load_model(tiny.model_folder())[0]
    (saved / name).write_bytes((saved / name).read_bytes()[:50])
    with pytest.raises(ModelError):
        load_adapter(saved, spec)
    (saved / name).unlink()
    with pytest.raises(ModelError):
        load_adapter(saved, spec)
    with pytest.raises(ModelError, match="is missing"):
        adapter_fingerprint(saved)


def test_a_record_with_an_unknown_mask_is_refused(saved: Path) -> None:
    (saved / "rcllm.json").write_text('{"mask": "sideways"}')
    with pytest.raises(ModelError, match="expected mask causal or blocks"):
        adapter_mask(saved)


def test_the_fingerprint_changes_with_weights_and_settings(saved: Path) -> None:
    before = adapter_fingerprint(saved)
    change(saved, lora_alpha=7.0)
    assert adapter_fingerprint(saved) != before
