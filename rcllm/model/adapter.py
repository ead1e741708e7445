"""Low-rank adapters (LoRA, arXiv 2106.09685) in the files that `peft` reads and writes, merged into a model's weights.

Knows nothing of training. Invariant: a merged model is an ordinary model, W + (alpha / rank) · up · down, with a
fingerprint of its own; every tensor in the file is used or named in an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rcllm.core.ranking import Mask
from rcllm.durable import renamed, write
from rcllm.errors import ModelError
from rcllm.model.adapter_config import CONFIG, LoraConfig, load_config
from rcllm.model.quantised import wide
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import LayerWeights, Weights, check_finite
from rcllm.plain_json import read_json, to_json, without_nan

_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MODULES = tuple(_NAMES)
_PREFIX = "base_model.model.model."
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TENSORS, _RECORD = "adapter_model.safetensors", "rcllm.json"


@dataclass(frozen=True, slots=True)
class LowRank:
    down: torch.Tensor  # A, [rank, in]
    up: torch.Tensor  # B, [out, rank]
    scale: float  # alpha / rank, of this module


@dataclass(frozen=True, slots=True)
class Adapter:
    rank: int  # of the modules that have none of their own
    alpha: float
    layers: Mapping[tuple[int, str], LowRank]  # by layer and module


def module_shape(spec: ModelSpec, module: str) -> tuple[int, int]:
    """(out, in) of one of MODULES."""
    d, ffn = spec.hidden_size, spec.ffn_size
    outputs = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size, "o": d, "gate": ffn, "up": ffn, "down": d}
    inputs = {"o": spec.q_size, "down": ffn}
    return outputs[module], inputs.get(module, d)


def save_adapter(folder: Path, adapter: Adapter, base: str, record: Mapping[str, Any]) -> None:
    """Writes what `peft` loads, tensors in fp16, and `record` (which holds the mask) beside it.

    The tensors come last: a folder that has them is whole.
    """
    tensors = {}
    for (layer, module), low_rank in adapter.layers.items():
        at = f"{_PREFIX}layers.{layer}.{_NAMES[module]}"
        tensors[f"{at}.lora_A.weight"] = low_rank.down.half().contiguous()
        tensors[f"{at}.lora_B.weight"] = low_rank.up.half().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(name.rpartition(".")[2] for name in _NAMES.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    for name, value in ((CONFIG, config), (_RECORD, record)):
        write(folder / name, (to_json(without_nan(value), indent=1) + "\n").encode())
    with renamed(folder / _TENSORS) as partial:
        save_file(tensors, partial)


def load_adapter(folder: Path, spec: ModelSpec) -> Adapter:
    """Reads a LoRA adapter as `peft` writes it. Raises ModelError for what does not fit or is not plain LoRA."""
    config = load_config(folder)
    try:
        tensors = load_file(folder / _TENSORS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / _TENSORS} is not a whole safetensors file ({error}); fetch it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{folder / _TENSORS}: {name} is {tensor.dtype}; expected fp32, fp16 or bf16")
        check_finite(tensor, f"{folder / _TENSORS}: {name}")
    layers = {}
    for layer in range(spec.num_layers):
        for module, name in _NAMES.items():
            low_rank = _take(tensors, f"layers.{layer}.{name}", config, module_shape(spec, module), folder)
            if low_rank is not None:
                layers[layer, module] = low_rank
    if tensors or not layers:
        raise ModelError(f"{folder}: the model has no place for {', '.join(sorted(tensors)[:4]) or 'an empty adapter'}")
    return Adapter(config.rank, config.alpha, layers)


def _take(
    tensors: dict[str, torch.Tensor], name: str, config: LoraConfig, shape: tuple[int, int], folder: Path
) -> LowRank | None:
    """Moves the two matrices of a module out of `tensors`; None where it is not adapted. Raises ModelError."""
    at = f"{_PREFIX}{name}"
    down, up = tensors.pop(f"{at}.lora_A.weight", None), tensors.pop(f"{at}.lora_B.weight", None)
    if down is None and up is None:
        return None
    (rows, columns), rank = shape, config.rank_of(f"model.{name}")
    if down is None or up is None or down.shape != (rank, columns) or up.shape != (rows, rank):
        found = [None if tensor is None else tuple(tensor.shape) for tensor in (down, up)]
        raise ModelError(
            f"{folder}: {at} has A, B of {found}, expected {(rank, columns)}, {(rows, rank)}: it was made for another "
            f"model{f' ({config.base})' if config.base else ''}, or its {CONFIG} is that of another adapter"
        )
    return LowRank(down.float(), up.float(), config.scale_of(f"model.{name}"))


def adapter_mask(folder: Path) -> Mask:
    """The mask that the adapter was tuned under, as its record says; `causal` for adapters from elsewhere."""
    mask: Mask = adapter_record(folder).get("mask", "causal")
    if mask not in list(get_args(Mask)):
        raise ModelError(f"{folder / _RECORD}: expected mask causal or blocks, got {mask!r}")
    return mask


def adapter_record(folder: Path) -> dict[str, Any]:
    """What `rcllm tune` wrote of how the adapter was made; empty for adapters from elsewhere. Raises ModelError."""
    return read_json(folder / _RECORD, "the record of `rcllm tune`") if (folder / _RECORD).exists() else {}


def adapter_fingerprint(folder: Path) -> bytes:
    """32 bytes that change with any weight or setting of the adapter."""
    state = blake3()
    for name in (CONFIG, _TENSORS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing; expected the folder of a LoRA adapter, as peft saves it")
        state.update((folder / name).read_bytes())
    return state.digest()


def merge(weights: Weights, adapter: Adapter) -> Weights:
    """The adapted model. Changes the given weights in place: a model is never in memory twice. Raises ModelError."""
    return replace(weights, layers=tuple(merge_layer(adapter, i, layer) for i, layer in enumerate(weights.layers)))


def merge_layer(adapter: Adapter, number: int, layer: LayerWeights) -> LayerWeights:
    """The adapted layer: the given one, changed in place but for what is in levels. Raises ModelError."""
    qkv, o, gate_up, down = map(wide, (layer.qkv, layer.o, layer.gate_up, layer.down))
    parts = _parts(qkv, o, gate_up, down)
    for module in MODULES:
        if low_rank := adapter.layers.get((number, module)):
            delta = (low_rank.up @ low_rank.down) * low_rank.scale
            part = parts[module].add_(delta.to(qkv.dtype).to(qkv.device))
            check_finite(part, f"layers.{number}.{_NAMES[module]} with the adapter added")
    return replace(layer, qkv=qkv, o=o, gate_up=gate_up, down=down)


def _parts(qkv: torch.Tensor, o: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """By module, its rows of a fused matrix, as views."""
    q, ffn = o.shape[1], down.shape[1]
    kv = (qkv.shape[0] - q) // 2
    return {
        "q": qkv[:q],
        "k": qkv[q : q + kv],
        "v": qkv[q + kv :],
        "o": o,
        "gate": gate_up[:ffn],
        "up": gate_up[ffn:],
        "down": down,
    }
