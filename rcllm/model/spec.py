"""What a decoder-only model is, as numbers: shapes, RoPE, biases, context length.

Read from a Hugging Face `config.json`. Knows nothing of tensors, files or devices and never imports torch, so that
planning and simulation can size a model that is not loaded. Invariant: a ModelSpec describes a model that the decoder
computes exactly; every variant that it cannot is refused by name, never approximated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from rcllm.errors import ModelError, UnsupportedModelError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_UNDERSTOOD = {  # keys of a config.json that is read here, or whose value changes nothing in a forward pass
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attention_bias",
    "attention_dropout",
    "attn_implementation",
    "head_dim",
    "hidden_act",
    "is_causal",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "original_max_position_embeddings",
    "output_attentions",
    "partial_rotary_factor",
    "pretraining_tp",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
}
_COMPUTES = re.compile(  # words by which a key speaks of the computation; other keys are remarks, and there are many
    "attn|attention|rope|rotary|scal|multipl|softcap|norm|bias|window|expert|causal|bidirectional|alibi|clip|residual"
    "|embedding|position|cross|encoder"
)
INT8_GROUP = 16  # values of KV in int8 that share one scale, which has 2 bytes (`kv_int8.py`)
WEIGHT_GROUP = 32  # inputs of a quantised matrix that share a scale
_DEFAULT_BOS_EOS: dict[str, tuple[int | None, int | None]] = {"llama": (1, 2), "mistral": (1, 2)}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding; the fields after `factor` matter to the kinds named beside them."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0  # all kinds but default
    original_max_positions: int = 0  # llama3, yarn: context length before the extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: from factor and the two mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A Llama-shaped decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU, no bias but those named.

    `max_positions` is how far the decoder is exact:
    - A sliding window W lets a query see W keys, itself included, so full attention equals it for W positions;
      where a window is in force, W caps the context.
    - `dynamic` RoPE changes theta once a sequence outgrows the original context, and keys cached under one theta
      cannot serve another, so the original context is the limit.
    - `yarn` with a stated original context reaches factor · original, also where the config was not raised to it.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rms_eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before RoPE
    tied_embeddings: bool
    rope: RopeSpec
    max_positions: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
        """Reads a `config.json`, written by transformers 4 or 5; `generation`: the `generation_config.json` beside it.

        Raises UnsupportedModelError for a variant that is not implemented, ModelError for a config that is broken.
        """
        try:
            return cls._read(config, generation or {})
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
            raise ModelError(f"config.json has a value of the wrong kind ({error}); fetch it again") from error

    @classmethod
    def _read(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
        family = _family(config)
        _refuse_variants(config, family)
        num_heads = _int(config, "num_attention_heads")
        # Llama 1 had no grouped queries and its configs no such field; in the other families its absence is an error
        num_kv_heads = _int(config, "num_key_value_heads", num_heads if family == "llama" else None)
        hidden_size = _int(config, "hidden_size")
        head_dim = _int(config, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
        if num_heads % num_kv_heads or head_dim % 2:
            raise ModelError(
                f"config.json: expected num_attention_heads to be a multiple of num_key_value_heads and an even "
                f"head_dim, got {num_heads}, {num_kv_heads} and {head_dim}"
            )
        attention_bias = family in ("llama", "qwen3") and bool(config.get("attention_bias"))
        bos, eos = _DEFAULT_BOS_EOS.get(family, (None, None))
        bos = config.get("bos_token_id", bos)
        vocab_size = _int(config, "vocab_size")
        eos_ids = [
            *_ids(config.get("eos_token_id", eos), vocab_size),
            *_ids(generation.get("eos_token_id"), vocab_size),
        ]
        rope = _rope(config)
        return cls(
            family=family,
            num_layers=_int(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn_size=_int(config, "intermediate_size"),
            vocab_size=vocab_size,
            rms_eps=_number(config, "rms_norm_eps", 1e-6),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            qk_norm=family == "qwen3",
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope=rope,
            max_positions=_max_positions(config, family, rope),
            bos_id=bos[0] if isinstance(bos, list) else bos,
            eos_ids=tuple(dict.fromkeys(eos_ids)),
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V of one token in all layers, kept in values of 4, 2 or 1 bytes (int8, with its scales)."""
        return 2 * self.num_layers * self.num_kv_heads * kv_row_bytes(self.head_dim, dtype_bytes)

    @property
    def linear_flops_per_token(self) -> int:
        """FLOPs of the layers' matrices for one fresh token, without the head: that runs only where logits are read."""
        return 2 * self.num_layers * self._layer_matrix_weights

    @property
    def head_flops_per_read(self) -> int:
        """FLOPs of the logits over the whole vocabulary at one position."""
        return 2 * self.vocab_size * self.hidden_size

    def attention_flops(self, num_queries_times_keys: int) -> int:
        """FLOPs of QKᵀ and PV in all layers for that many (query, visible key) pairs."""
        return 4 * self.num_layers * self.q_size * num_queries_times_keys

    @property
    def num_weights(self) -> int:
        """Weights in memory; tied embeddings count once."""
        biases = self.qkv_bias * (self.q_size + 2 * self.kv_size) + self.o_bias * self.hidden_size
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * (self._layer_matrix_weights + biases + norms) + self.hidden_size + embeddings

    @property
    def _layer_matrix_weights(self) -> int:
        return self.hidden_size * (2 * self.q_size + 2 * self.kv_size + 3 * self.ffn_size)


def kv_row_bytes(head_dim: int, dtype_bytes: int) -> int:
    """Of K or V of one token and head; one byte a value is int8, whose rows end in their scales."""
    return head_dim * dtype_bytes + (2 * -(-head_dim // INT8_GROUP) if dtype_bytes == 1 else 0)


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or [None]
    family = FAMILIES.get(named[0]) if named[0] else None
    if named[0] is None and config.get("model_type") in FAMILIES.values():
        family = config["model_type"]
    if family is None:
        name = named[0] or config.get("model_type") or "none named"
        raise UnsupportedModelError(f"architecture {name} is not supported; supported are {', '.join(FAMILIES)}")
    return family


def _refuse_variants(config: Mapping[str, Any], family: str) -> None:
    if any(str(name).startswith("AutoModel") for name in config.get("auto_map") or ()):
        raise UnsupportedModelError(
            "config.json says that the model brings its own code (auto_map), which is not run. If it computes what "
            f"transformers' own {family} does, take auto_map out of config.json"
        )
    if not config.get("is_causal", True):
        raise UnsupportedModelError("is_causal is false: the model is an encoder; supported are causal language models")
    for key, value in config.items():
        if key not in _UNDERSTOOD and _COMPUTES.search(key) and not _is_off(value):
            raise UnsupportedModelError(
                f"config.json: {key} = {value!r} is not understood, and by its name it may change what the model "
                "computes; take it out if it does not"
            )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(f"activation {activation!r} is not supported; supported is 'silu'")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "of unknown method") if isinstance(quantised, Mapping) else quantised
        raise UnsupportedModelError(
            f"quantised weights ({method}) are not supported; supported are fp32, fp16 and bf16, and GGUF files"
        )
    if family == "llama" and config.get("mlp_bias"):
        raise UnsupportedModelError("mlp_bias is not supported; supported are biases of the attention (attention_bias)")
    for key in ("num_local_experts", "num_experts"):
        if (config.get(key) or 0) > 1:
            raise UnsupportedModelError(f"mixture of experts ({key}) is not supported; supported are dense models")
    if other := set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"layer type {', '.join(sorted(other))} is not supported; supported are full_attention, and "
            "sliding_attention within its window"
        )


def _is_off(value: object) -> bool:
    """Whether a setting that is not understood changes nothing: absent, off, empty, or a factor of one."""
    return value is None or value is False or (type(value) in (int, float) and value in (0, 1)) or value in ("", [], {})


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    # transformers 4: rope_theta beside rope_scaling; 5: everything in rope_parameters
    given: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedModelError("RoPE that differs by layer type is not supported; supported is one for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "mrope" if "mrope_section" in given else kind
    if kind not in get_args(RopeKind):
        raise UnsupportedModelError(
            f"RoPE kind {kind!r} is not supported; supported are {', '.join(get_args(RopeKind))}"
        )
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"partial RoPE (factor {partial}) is not supported; supported is the whole head")
    if kind != "default" and given.get("factor") is None:
        raise ModelError(f"config.json: RoPE kind {kind!r} needs a factor")
    if kind == "llama3" and not {"low_freq_factor", "high_freq_factor"} <= given.keys():
        raise ModelError("config.json: RoPE kind 'llama3' needs low_freq_factor and high_freq_factor")
    return RopeSpec(
        theta=float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        kind=cast(RopeKind, kind),
        factor=float(given.get("factor") or 1.0),
        original_max_positions=_original_positions(config, given) or _int(config, "max_position_embeddings"),
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=bool(given.get("truncate", True)),
    )


def _original_positions(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int | None:
    key = "original_max_position_embeddings"
    value: int | None = config.get(key, rope.get(key))
    return value


def _max_positions(config: Mapping[str, Any], family: str, rope: RopeSpec) -> int:
    longest = _int(config, "max_position_embeddings")
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.kind == "yarn" and _original_positions(config, stated):
        longest = max(longest, int(rope.factor * rope.original_max_positions))
    window = _window_in_force(config, family)
    return longest if window is None else min(longest, window)


def _window_in_force(config: Mapping[str, Any], family: str) -> int | None:
    """The sliding window of the layers that have one, or None where every layer sees everything."""
    if family == "mistral":
        window: int | None = config.get("sliding_window", 4096)  # transformers reads a missing field as 4096
        return window
    if family == "llama" or not config.get("use_sliding_window"):
        return None
    num_layers = _int(config, "num_hidden_layers")
    first = config.get("max_window_layers", 28)
    sliding = (
        "sliding_attention" in (config.get("layer_types") or ()) if "layer_types" in config else first < num_layers
    )
    return config.get("sliding_window", 4096) if sliding else None


def _ids(value: Any, vocab_size: int) -> Iterator[int]:
    """The token ids of a field that holds none, one or a list."""
    for token in value if isinstance(value, list) else [] if value is None else [value]:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ModelError(f"eos_token_id {token!r} is not a token of the model, which has {vocab_size:,}")
        yield token


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    number = default if value is None else float(value)
    if not math.isfinite(number) or number <= 0:
        raise ModelError(f"config.json: expected a number above 0 for {key}, got {value!r}")
    return number


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise ModelError(f"config.json: expected a positive integer {key}, got {value!r}")
    return value
