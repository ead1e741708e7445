"""Tiny random models of every supported family, written by transformers: the reference that rcllm is held against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from benchmarks.harness import transformers_model

VOCAB = 256
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA = {**_SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}

# name → config class and its fields; every name is one row of tests/model/test_families.py
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _LLAMA),
    "llama-tied": (LlamaConfig, {**_SHAPE, "tie_word_embeddings": True}),  # SmolLM2's shape: 3 query heads per KV head
    "llama-biased": (LlamaConfig, {**_LLAMA, "attention_bias": True}),
    "llama-head-dim": (LlamaConfig, {**_LLAMA, "head_dim": 32}),
    "llama-llama3": (LlamaConfig, {**_LLAMA, "rope_parameters": _LLAMA3}),
    "llama-linear": (LlamaConfig, {**_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (LlamaConfig, {**_LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-yarn": (LlamaConfig, {**_LLAMA, "rope_parameters": _YARN}),
    "mistral": (MistralConfig, {**_LLAMA, "sliding_window": 128}),
    "qwen2": (Qwen2Config, {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**_SHAPE, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biased": (Qwen3Config, {**_SHAPE, "head_dim": 32, "attention_bias": True}),
}

_GGUF_NAMES = {  # in this order
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(family: str, folder: Path, *, max_shard_size: str = "5GB", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random model of `family` (a name of FAMILIES) below `folder`; returns its folder."""
    config_class, fields = FAMILIES[family]
    config = config_class(**{**fields, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            # fresh models have unit norms, zero biases and near-zero weights: a mistake in any would go unseen
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.15)
    target = folder / f"{family}-{seed}"
    model.save_pretrained(target, max_shard_size=max_shard_size)
    return target


def their_model(folder: Path) -> Any:
    """What transformers makes of a model's folder, in fp32 with its plainest attention."""
    return transformers_model(folder, attn_implementation="eager")


@torch.inference_mode()
def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of transformers, in fp32 with its plainest attention."""
    logits = their_model(folder)(torch.tensor([token_ids])).logits
    assert isinstance(logits, torch.Tensor)
    return logits[0]


def tiny_gguf(
    model: Path,
    path: Path,
    *,
    arch: str | None = None,
    quantised: str = "",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    **meta: int | float | str,
) -> Path:
    """Writes the tiny `model` as llama.cpp's converter would: its names, its order of wq and wk, byte-level BPE.

    arch: instead of the model's own. quantised: how matrices are kept whose rows allow it, Q4_1 for example; else fp32.
    tokenizer, pre: what the file says of its tokenizer. meta: more metadata, by key of the architecture.
    """
    config = json.loads((model / "config.json").read_text())
    arch = arch or str(config["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    if config.get("head_dim"):
        numbers |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    for key, value in (numbers | meta).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, config["vocab_size"], tokenizer, pre)
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _permuted(values, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(_gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), values)
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permuted(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _llama3_divisors(config: dict[str, Any]) -> npt.NDArray[np.float32]:
    """`generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        smooth = (context / length - low) / (high - low)
        blended = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if length < context / high else factor if length > context / low else blended)
    return np.array(divisors, dtype=np.float32)


def _add_tokenizer(writer: Any, vocab_size: int, model: str, pre: str) -> None:
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*controls, *sorted(ByteLevel.alphabet()), "he", "ll", "hell"]
    tokens += [f"<|unused_{i}|>" for i in range(vocab_size - len(tokens))]
    assert len(tokens) == vocab_size, f"a tiny GGUF needs vocab_size ≥ {len(tokens)}"
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("<|im_start|>{{ role }}<|im_end|>")


def _gguf_name(name: str) -> str:
    for there, here in _GGUF_NAMES.items():
        name = name.replace(there, here)
    return name
