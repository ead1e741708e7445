"""Configs become specs, or are refused by name; frequencies equal those of transformers to the last bit."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rcllm.errors import ModelError, UnsupportedModelError
from rcllm.model.frequencies import inverse_frequencies
from rcllm.model.spec import ModelSpec, RopeSpec

SMOLLM2: dict[str, Any] = {  # as published, by transformers 4
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
QWEN3: dict[str, Any] = SMOLLM2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "vocab_size": 151_936,
    "eos_token_id": [151645, 151643],
    "bos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


def test_smollm2_has_its_published_size() -> None:
    spec = ModelSpec.from_hf(SMOLLM2)
    assert (spec.family, spec.head_dim, spec.max_positions, spec.eos_ids) == ("llama", 64, 8192, (2,))
    assert spec.rope.theta == 100_000
    assert spec.num_weights == 134_515_008
    assert [spec.kv_bytes_per_token(size) for size in (4, 2)] == [46_080, 23_040]
    assert spec.kv_bytes_per_token(1) == 12_960, "a scale of two bytes for every 16 values"
    assert spec.linear_flops_per_token == 2 * 30 * 576 * (576 + 2 * 192 + 576 + 3 * 1536)
    assert spec.head_flops_per_read == 2 * 576 * 49_152
    assert spec.attention_flops(10) == 10 * 4 * 576 * 30


def test_families_differ_by_fields() -> None:
    qwen3 = ModelSpec.from_hf(QWEN3)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim, qwen3.bos_id) == (True, False, 128, None)
    assert qwen3.eos_ids == (151645, 151643)
    qwen2 = ModelSpec.from_hf(SMOLLM2 | {"architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    biased = ModelSpec.from_hf(SMOLLM2 | {"attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias) == (True, True)
    mistral = ModelSpec.from_hf(SMOLLM2 | {"architectures": ["MistralForCausalLM"], "sliding_window": None})
    assert (mistral.family, mistral.max_positions) == ("mistral", 8192)


def test_both_ways_of_writing_rope_give_the_same_spec() -> None:
    old = ModelSpec.from_hf(SMOLLM2 | {"rope_scaling": LLAMA3})
    new = {key: value for key, value in SMOLLM2.items() if key not in ("rope_theta", "rope_scaling")}
    assert ModelSpec.from_hf(new | {"rope_parameters": LLAMA3 | {"rope_theta": 100_000}}) == old
    assert old.rope.original_max_positions == 2048
    legacy = ModelSpec.from_hf(SMOLLM2 | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (legacy.rope.kind, legacy.rope.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 1000}, 1000),
        ({"architectures": ["MistralForCausalLM"]}, 4096),  # as transformers reads a missing field
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 1000}, 8192),  # Llama has no such thing
        (QWEN3, 8192),
        (QWEN3 | {"use_sliding_window": True}, 4096),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 30}, 8192),  # no layer beyond the 30th
        (QWEN3 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 30}, 8192),
        (QWEN3 | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 30}, 4096),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}, 32768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 8192),
    ],
)
def test_max_positions_end_where_the_decoder_stops_being_exact(fields: dict[str, Any], longest: int) -> None:
    assert ModelSpec.from_hf(SMOLLM2 | fields).max_positions == longest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["Gemma3ForCausalLM"]},
            r"Gemma3ForCausalLM is not supported; supported are LlamaForCausalLM",
        ),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": None, "model_type": "phi3"}, "phi3"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported; supported is 'silu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "'longrope' is not supported; supported are default",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"partial_rotary_factor": 0.5}, "partial RoPE"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}}, "brings its own code"),
        ({"is_causal": False}, "the model is an encoder"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50\.0 is not understood"),
        ({"attention_multiplier": 0.015}, "attention_multiplier"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"logits_scaling": 8}, "logits_scaling"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"clip_qkv": 8}, "clip_qkv"),
    ],
)
def test_a_variant_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ModelSpec.from_hf(SMOLLM2 | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "positive integer hidden_size, got None"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers, got '30'"),
        ({"num_key_value_heads": 2}, "multiple of num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_a_broken_config_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ModelSpec.from_hf(SMOLLM2 | fields)
    assert not isinstance(caught.value, UnsupportedModelError)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_logit_softcapping": None, "use_qk_norm": False, "residual_multiplier": 1.0, "embedding_multiplier": 1},
        {"is_causal": True, "attention_dropout": 0.1, "_attn_implementation": "sdpa", "pretraining_tp": 2},
        {
            "unsloth_version": "2026.1",
            "auto_map": {"AutoConfig": "x.Y"},
            "use_cache": True,
            "transformers.js_config": {},
        },
    ],
    ids=["switched off", "without effect", "remarks"],
)
def test_settings_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert ModelSpec.from_hf(SMOLLM2 | fields) == ModelSpec.from_hf(SMOLLM2)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_whatever_transformers_writes_by_itself_is_understood(config_class: type[PreTrainedConfig]) -> None:
    config = config_class(architectures=[config_class.__name__.removesuffix("Config") + "ForCausalLM"])
    assert ModelSpec.from_hf(config.to_dict()).family == config.model_type


@pytest.mark.parametrize(
    ("config", "generation", "eos_ids"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}, (2, 7)),
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": None}, (3, 4)),
        ({"eos_token_id": None}, {"eos_token_id": [0, 7]}, (0, 7)),
    ],
)
def test_end_tokens_of_both_files_count(
    config: dict[str, Any], generation: dict[str, Any], eos_ids: tuple[int, ...]
) -> None:
    assert ModelSpec.from_hf(SMOLLM2 | config, generation).eos_ids == eos_ids


@pytest.mark.parametrize("token", [-1, 49_152, "</s>", 2.0, True, [[2]]])
def test_an_end_token_that_is_none_is_named(token: object) -> None:
    for config, generation in (({"eos_token_id": token}, {}), ({}, {"eos_token_id": token})):
        with pytest.raises(ModelError, match="is not a token of the model, which has 49,152"):
            ModelSpec.from_hf(SMOLLM2 | config, generation)


WRONG: list[Any] = [
    True,
    -1,
    0,
    2.5,
    math.nan,
    math.inf,
    "x",
    [],
    [1],
    {},
    {"a": 1},
    {"factor": "x"},
    {"type": [1]},
    10**30,
]


@pytest.mark.parametrize(
    "key", [*SMOLLM2, "rope_parameters", "head_dim", "layer_types", "quantization_config", "auto_map"]
)
@pytest.mark.parametrize("base", [SMOLLM2, QWEN3 | {"use_sliding_window": True}], ids=["llama", "qwen3"])
def test_no_value_of_a_config_ends_in_another_error(base: dict[str, Any], key: str) -> None:
    for value in WRONG:
        with contextlib.suppress(ModelError):
            ModelSpec.from_hf(base | {key: value})


def test_the_deciding_plane_needs_no_torch() -> None:
    code = "import sys, rcllm.model.spec, rcllm.prompt.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 4.0},
        LLAMA3,
        YARN,
        YARN | {"attention_factor": 0.8},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"beta_fast": 20, "beta_slow": 2, "truncate": False},
        YARN | {"factor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (1e6, 128), (500.0, 16)])
def test_frequencies_equal_those_of_transformers(rope: dict[str, Any], theta: float, head_dim: int) -> None:
    parameters = rope | {"rope_theta": theta}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=8192, rope_parameters=dict(parameters))
    expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=8192)
    spec = ModelSpec.from_hf(SMOLLM2 | {"head_dim": head_dim, "rope_parameters": parameters, "rope_scaling": None})
    got, got_scale = inverse_frequencies(spec.rope, head_dim)
    assert torch.equal(got, expected)
    assert got_scale == scale


def test_default_frequencies() -> None:
    got, scale = inverse_frequencies(RopeSpec(theta=10_000.0), 4)
    assert torch.allclose(got, torch.tensor([1.0, 0.01]))
    assert scale == 1.0
