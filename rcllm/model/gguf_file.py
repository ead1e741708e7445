"""Makes of a GGUF file, once, a folder with what a Hugging Face model has beside its weights, and an index of these.

Knows nothing of the decoder. Invariant: the folder appears whole, by one rename. Weights stay as they are, in a copy of
the file: a Q4_1 value d·q + m needs up to 15 bits of mantissa beside m, so that fp32 would take six times the room.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer

from rcllm.errors import ModelError, UnsupportedModelError
from rcllm.model.frequencies import inverse_frequencies
from rcllm.model.gguf_tensors import GGUF, INDEX, GgufTensors, Stored, gguf_package
from rcllm.model.spec import ModelSpec, RopeSpec
from rcllm.model.weights import check_finite, expected_shapes

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_TENSORS = {  # GGUF → Hugging Face, without `model.`; those of a layer follow `blk.N.` and `layers.N.`
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_UNDERSTOOD = {  # keys of an architecture that are read here, or that say what the tensors say as well
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_used_count",  # without experts
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",  # how the scale came about
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}
_ROPE_FACTORS = "rope_freqs.weight"  # how llama.cpp stores Llama 3.1's RoPE; becomes a field of the config
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class _Gguf:
    """What the `gguf` package read: metadata as plain values, tensors by GGUF name."""

    path: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, Any]  # gguf.ReaderTensor

    @property
    def arch(self) -> str:
        return str(self.meta.get("general.architecture", "none named"))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key` of this architecture."""
        return self.meta.get(f"{self.arch}.{key}", default)

    def need(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ModelError(f"{self.path} lacks {self.arch}.{key}; expected a complete GGUF model")
        return value


def convert_gguf(path: Path, folder: Path) -> Path:
    """Writes `folder` (config.json, tokenizer.json, tokenizer_config.json, model.gguf and its index) from `path`.

    Returns `folder`. Raises UnsupportedModelError for a variant that is not implemented, ModelError for a broken file
    or a folder that exists, ConfigError where the optional package is missing. Memory: the largest tensor.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists; remove it to convert {path.name} again")
    source = _read(path)
    config = _config(source)
    spec = ModelSpec.from_hf(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        partial = Path(scratch) / "model"
        partial.mkdir()
        try:
            _write_tokenizer(source, config, partial)
        except ModelError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception for what it cannot use
            raise ModelError(f"{path} has no whole tokenizer ({error!r}); fetch it again") from error
        _write_json(partial / INDEX, {"tensors": _index(source, spec)})
        shutil.copyfile(path, partial / GGUF)
        _check_values(source, partial)
        _write_json(partial / "config.json", config)
        try:
            partial.rename(folder)
        except OSError:  # another process converted the same file meanwhile: its folder is as good
            if not (folder / "config.json").is_file():
                raise
    return folder


def _read(path: Path) -> _Gguf:
    gguf = gguf_package()
    if not path.is_file():
        raise ModelError(f"{path} is missing; expected a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
    return _Gguf(path, meta, {tensor.name: tensor for tensor in reader.tensors})


# ---- config ---------------------------------------------------------------------------------------------------------


def _config(source: _Gguf) -> dict[str, Any]:
    if source.arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF architecture {source.arch} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    _refuse_variants(source)
    num_heads, hidden_size = source.need("attention.head_count"), source.need("embedding_length")
    head_dim = source.get("attention.key_length", hidden_size // num_heads)
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{source.path} lacks the tensor token_embd.weight")
    eos = [source.meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return {
        "architectures": [ARCHITECTURES[source.arch]],
        "model_type": source.arch,
        "vocab_size": int(embedding.shape[1]),  # GGUF lists the fastest axis first
        "hidden_size": hidden_size,
        "intermediate_size": source.need("feed_forward_length"),
        "num_hidden_layers": source.need("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": source.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.need("context_length"),
        "rms_norm_eps": _shortest(source.need("attention.layer_norm_rms_epsilon")),
        "attention_bias": source.arch != "qwen2" and "blk.0.attn_q.bias" in source.tensors,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "rope_parameters": _rope(source, head_dim),
        "bos_token_id": source.meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({token for token in eos if token is not None}) or None,
        "dtype": "float32",
    }


def _refuse_variants(source: _Gguf) -> None:
    if source.meta.get("split.count", 0) > 1:
        raise UnsupportedModelError(f"{source.path} is a split GGUF, which is not supported; merge it with gguf-split")
    for key in ("expert_count", "attention.sliding_window"):
        if value := source.get(key):
            raise UnsupportedModelError(f"GGUF with {key} = {value} is not supported; supported are dense, full models")
    if not source.get("attention.causal", True):
        raise UnsupportedModelError(f"{source.path} is an encoder (attention.causal is false), not a language model")
    for key, value in source.meta.items():
        if key.startswith(f"{source.arch}.") and key.removeprefix(f"{source.arch}.") not in _UNDERSTOOD and value:
            raise UnsupportedModelError(f"GGUF with {key} = {value} is not supported: it may change what is computed")
    whole = source.get("attention.key_length", source.get("rope.dimension_count"))
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if source.get(key, whole) != whole:
            raise UnsupportedModelError(
                f"GGUF with {key} = {source.get(key)} is not supported; expected {whole}, as wide as a head"
            )


def _rope(source: _Gguf, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _shortest(source.get("rope.freq_base", 10_000.0))}
    kind = source.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"GGUF RoPE scaling {kind!r} is not supported; supported are none, linear, yarn")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": _shortest(source.need("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = source.need("rope.scaling.original_context_length")
    if _ROPE_FACTORS in source.tensors:
        rope |= _llama3(source, rope["rope_theta"], head_dim)
    return rope


def _llama3(source: _Gguf, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's parameters from the divisors of the frequencies, accepted only if they give these divisors back."""
    tensor = source.tensors[_ROPE_FACTORS]
    divisors = torch.from_numpy(np.array(gguf_package().dequantize(tensor.data, tensor.tensor_type)))  # [head_dim / 2]
    rope = RopeSpec(theta, "llama3", float(divisors.max()), original_max_positions=8192)
    expected = inverse_frequencies(RopeSpec(theta), head_dim)[0] / inverse_frequencies(rope, head_dim)[0]
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{_ROPE_FACTORS} in {source.path} is not Llama 3.1's RoPE, which is what is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }


def _shortest(value: float) -> float:
    """The decimal that was meant by a number that GGUF keeps in fp32: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


# ---- weights --------------------------------------------------------------------------------------------------------


def _index(source: _Gguf, spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """Where each tensor of the model lies, by its name. Raises ModelError where they are not those of the metadata."""
    shapes = dict(expected_shapes(spec))
    names = {_hf_name(name): name for name in source.tensors if name != _ROPE_FACTORS}
    if names.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - names.keys()), sorted(names.keys() - shapes.keys())
        raise ModelError(f"{source.path} does not fit its metadata: missing {missing}, unexpected {extra}")
    index = {}
    for name, shape in shapes.items():
        tensor = source.tensors[names[name]]
        found = tuple(int(length) for length in reversed(tensor.shape))  # GGUF lists the fastest axis first
        if found != shape:
            raise ModelError(f"{source.path}: {names[name]} is {found}, expected {shape}")
        heads = 0
        if source.arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = spec.num_heads if "q_proj" in name else spec.num_kv_heads
        stored = Stored(tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes), heads)
        index[name] = asdict(stored)
    return index


def _check_values(source: _Gguf, folder: Path) -> None:
    """Raises ModelError where a tensor has values that are no numbers, by the name that the file has for it."""
    tensors = GgufTensors(folder)
    for name in source.tensors:
        if name != _ROPE_FACTORS:
            check_finite(tensors.values(_hf_name(name)), f"{source.path}: {name}")


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `layers.3.self_attn.q_proj.weight`; a name that is not known stays as it is."""
    *block, kind, suffix = name.split(".")
    prefix = f"layers.{block[1]}." if len(block) == 2 else ""
    return f"{prefix}{_TENSORS[kind]}.{suffix}" if kind in _TENSORS else name


# ---- tokenizer ------------------------------------------------------------------------------------------------------

_WORDS = (  # how Llama 3 and Qwen split text; they differ in how many digits make a group
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    def words(digits: str) -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(Regex(_WORDS.replace("{DIGITS}", digits)), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known: dict[str, pre_tokenizers.PreTokenizer] = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": words("{1,3}"),
        "qwen2": words(""),
        "gpt-2": gpt2,
        "default": gpt2,  # the converter did not know better; neither can we
    }
    if kind not in known:
        raise UnsupportedModelError(f"GGUF pre-tokenizer {kind!r} is not supported; supported are {', '.join(known)}")
    return known[kind]


def _write_tokenizer(source: _Gguf, config: Mapping[str, Any], folder: Path) -> None:
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in source.meta.items() if "tokenizer" in key}
    if (model := meta.get("model")) != "gpt2":
        raise UnsupportedModelError(f"GGUF tokenizer {model!r} is not supported; supported is 'gpt2' (byte-level BPE)")
    kind, tokens = meta.get("pre", "default"), meta["tokens"]
    backend = BackendTokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in meta["merges"]],
            ignore_merges=kind == "llama-bpe",
        )
    )
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(kind)
    backend.decoder = decoders.ByteLevel()
    types = meta.get("token_type", [])
    backend.add_special_tokens(list(_added(tokens, types, _CONTROL)))
    backend.add_tokens(list(_added(tokens, types, _USER_DEFINED)))
    named = {
        f"{role}_token": tokens[meta[key]]
        for role, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id"))
        if key in meta
    }
    add_bos = bool(meta.get("add_bos_token", kind == "llama-bpe")) and "bos_token" in named
    if add_bos:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, meta["bos_token_id"])]
        )
    backend.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    if template := source.meta.get("tokenizer.chat_template"):
        described["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", described)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _added(tokens: Iterable[str], types: Iterable[int], wanted: int) -> Iterable[AddedToken]:
    return (
        AddedToken(token, special=wanted == _CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ == wanted
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
