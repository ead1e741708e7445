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
        return LowRank(*(0.1 * part.half().float() for part in parts), 6.0 / rank)

    return Adapter(rank, 6.0, {(layer, m): low_rank(m) for layer in range(spec.num_layers) for m in MODULES})


def logits(family: str, adapter: Path | None) -> torch.Tensor:
    spec, weights = load_model(tiny.model_folder(family))
    if adapter is not None:
        weights = merge(weights, load_adapter(adapter, spec))
    return Decoder(spec, weights).full_logits(TOKENS)


def save_random_peft(folder: Path, settings: LoraConfig, family: str = tiny.NATIVE) -> torch.Tensor:
    """Saves an adapter of peft that changes something; returns peft's own logits of TOKENS."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny.model_folder(family), dtype=torch.float32)
    theirs = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        expected: torch.Tensor = theirs(torch.tensor([TOKENS])).logits[0]
    theirs.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_adapters_are_merged_to_the_same_model(tmp_path: Path, family: str, rank_stabilised: bool) -> None:
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rank_stabilised
    )
    expected = save_random_peft(tmp_path, settings, family)
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


def test_settings_that_are_off_or_without_effect_are_accepted(saved: Path) -> None:
    spec = load_model(tiny.model_folder())[0]
    before = load_adapter(saved, spec)
    for value in LoraConfig().to_dict().items():
        change(
            saved,
            **dict([value]) if value[0] not in ("peft_type", "r", "lora_alpha", "base_model_name_or_path") else {},
        )
    change(
        saved, revision="main", lora_dropout=0.3, init_lora_weights="gaussian", a_setting_of_2027=None, another=False
    )
    assert load_adapter(saved, spec).layers.keys() == before.layers.keys()


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_ranks_and_scales_by_module_are_those_of_peft(tmp_path: Path, rank_stabilised: bool) -> None:
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7},
        alpha_pattern={"v_proj": 5, r"model\.layers\.[02]\.mlp\.down_proj": 3},
        use_rslora=rank_stabilised,
    )
    expected = save_random_peft(tmp_path, settings)
    torch.testing.assert_close(logits(tiny.NATIVE, tmp_path), expected, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_converts_to_plain_lora_is_merged_to_the_same_model(tmp_path: Path, init: str) -> None:
    """Trained with an initialisation that changes the base model: refused as saved, right once converted."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny.model_folder(), dtype=torch.float32)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    theirs = get_peft_model(base, settings).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as peft's guide says, so that the start is loaded as it is
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(ModelError, match="path_initial_model_for_weight_conversion"):
        logits(tiny.NATIVE, tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(logits(tiny.NATIVE, tmp_path / "whole"), expected, atol=5e-5, rtol=0)


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
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported: only LoRA"),
        ({"peft_type": None}, "peft_type = None is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
        ({"use_dora": True}, "use_dora = True is not supported.*merge_and_unload"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"modules_to_save": ["lm_head"]}, "whole modules are stored beside it"),
        ({"trainable_token_indices": [3]}, "it changes embeddings"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": 1}, "init_lora_weights = 1"),
        ({"alora_invocation_tokens": [9, 88]}, "acts only after its invocation tokens"),
        ({"a_setting_of_2027": 0.5}, r"a_setting_of_2027 = 0\.5 is not supported"),
        ({"a_setting_of_2027": 0}, "a_setting_of_2027 = 0 is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"expected \(2, "),
        ({"rank_pattern": {"q_proj(": 2}}, "expected numbers r and lora_alpha"),
        ({"rank_pattern": [2]}, "expected numbers r and lora_alpha"),
        ({"alpha_pattern": {"q_proj": "much"}}, "expected numbers r and lora_alpha"),
        ({"r": 5}, r"expected \(5, .*made for another model \(tiny\)"),
        ({"r": 0}, "0 is not above 0"),
        ({"r": "many"}, "expected numbers r and lora_alpha"),
        ({"lora_alpha": float("nan")}, "nan is not a number to scale by"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(saved: Path, value: float) -> None:
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    tensors[name][3, 1] = value
    save_file(tensors, path)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight: 1 of [0-9,]+ values are NaN or infinite"
    ):
        load_adapter(saved, load_model(tiny.model_folder())[0])


def test_tensors_of_another_type_are_named(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="expected fp32, fp16 or bf16"):
        load_adapter(saved, load_model(tiny.model_folder())[0])


def test_an_adapter_that_overflows_the_dtype_of_its_model_is_named(saved: Path) -> None:
    change(saved, lora_alpha=1e9)
    spec, weights = load_model(tiny.model_folder(), torch.float16)
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.q_proj with the adapter added.*larger numbers than fp16"
    ):
        merge(weights, load_adapter(saved, spec))


def test_a_record_with_an_unknown_mask_is_refused(saved: Path) -> None:
    (saved / "rcllm.json").write_text('{"mask": "sideways"}')
    with pytest.raises(ModelError, match="expected mask causal or blocks"):
        adapter_mask(saved)


def test_the_fingerprint_changes_with_weights_and_settings(saved: Path) -> None:
    before = adapter_fingerprint(saved)
    change(saved, lora_alpha=7.0)
    assert adapter_fingerprint(saved) != before
