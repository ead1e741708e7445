"""What accelerators can do by their data sheets, and the shapes of models that are planned for but not loaded.

Invariant: figures of a device are those of its maker, dense and for 16 bits; what is reached of them is the cost
model's concern.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcllm.errors import ConfigError
from rcllm.model.spec import ModelSpec
from rcllm.words import nearest

KV_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_WEIGHT_BYTES = 2  # weights are served in 16 bits


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, and the machine that it sits in."""

    flops_per_s: float  # dense, bf16
    memory_bytes: float
    memory_bytes_per_s: float
    host_bytes_per_s: float  # from host memory to the device, as reached: about 80 % of the link


GPUS = {
    "a100": Gpu(312e12, 80e9, 2.039e12, 25e9),  # SXM, 80 GB, PCIe 4
    "h100": Gpu(989e12, 80e9, 3.35e12, 50e9),  # SXM, PCIe 5
    "h200": Gpu(989e12, 141e9, 4.8e12, 50e9),
    "l4": Gpu(121e12, 24e9, 0.3e12, 25e9),
}

_QWEN = {"rope_theta": 1e6, "max_position_embeddings": 32768, "hidden_act": "silu"}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        **_QWEN,
    },
    "qwen2.5-72b": {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 29568,
        "vocab_size": 152064,
        **_QWEN,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        **_QWEN,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rope_theta": 1e5,
        "max_position_embeddings": 8192,
    },
}
MODELS = tuple(_CONFIGS)


def find_gpu(name: str) -> Gpu:
    """By its short name. Raises ConfigError."""
    if name.lower() not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; {nearest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def find_model(name: str) -> ModelSpec:
    """The shape of a known model, or of the one whose config.json lies in the folder `name`. Raises ConfigError."""
    config: Mapping[str, Any] | None = _CONFIGS.get(name.lower())
    if config is None and (path := Path(name) / "config.json").is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    if config is None:
        raise ConfigError(
            f"--model {name}: expected one of {', '.join(MODELS)}, or a folder with the config.json of a model"
        )
    return ModelSpec.from_hf(config)


def weight_bytes(spec: ModelSpec) -> int:
    return spec.num_weights * _WEIGHT_BYTES
