"""Loads a model folder (config.json and safetensors, whole or sharded, or a GGUF file) into fused matrices.

Knows nothing of how they are used. Invariant: every tensor in the files is either placed at its exact shape or
named in an error; only what follows from the rest is skipped (a tied head stored again, RoPE buffers). Peak memory is
the model and one tensor: files are mapped, and tensors are copied into their fused places one by one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from rcllm.errors import ModelError, UnsupportedModelError
from rcllm.model.gguf_tensors import GGUF, INDEX, GgufTensors
from rcllm.model.quantised import Matrix, Quantised, joined, wide
from rcllm.model.spec import ModelSpec
from rcllm.plain_json import read_json, read_json_if_there

_IGNORED = "rotary_emb.inv_freq"  # a buffer that old exports wrote; it follows from the config
_FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them
_IN_16_BITS = {"F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = {  # how the tensors of quantised models end
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "weight_scale": "fp8 or int8 with scales",
    "weight_scale_inv": "fp8 with scales",
    "weight_packed": "compressed-tensors",
}
_CLASSIFIER = {
    "score.weight",
    "classifier.weight",
    "classifier.dense.weight",
    "qa_outputs.weight",
    "v_head.summary.weight",
}
_SHOWN = 12  # problems that one message names
CATALOG_PREFIX = "catalog."  # of tensors that are no weights: the catalogue that a generative model was trained for


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. H query heads and KV key-value heads of size D, hidden size d."""

    input_norm: torch.Tensor  # [d]
    qkv: Matrix  # [(H + 2·KV)·D, d]; rows q, k, v
    qkv_bias: torch.Tensor | None  # [(H + 2·KV)·D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: Matrix  # [d, H·D]
    o_bias: torch.Tensor | None  # [d]
    post_norm: torch.Tensor  # [d]
    gate_up: Matrix  # [2·ffn, d]; rows gate, up
    down: Matrix  # [d, ffn]


Change = Callable[[int, LayerWeights], LayerWeights]  # of a layer, by its number


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, in one dtype on one device."""

    embed: Matrix  # [vocab, d]
    layers: Sequence[LayerWeights]  # read when asked for, each time anew, where the model is `streamed`
    final_norm: torch.Tensor  # [d]
    lm_head: Matrix  # [vocab, d]; the same tensor as `embed` where embeddings are tied


def load_spec(folder: Path) -> ModelSpec:
    """Reads `config.json`, and the end tokens that `generation_config.json` adds. Raises ModelError."""
    config = read_json(folder / "config.json")
    return ModelSpec.from_hf(config, read_json_if_there(folder / "generation_config.json"))


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises ModelError where a weight is NaN or infinite: no score of such a model means anything."""
    if tensor.numel() and not all(math.isfinite(end) for end in tensor.aminmax()):
        count = int((~torch.isfinite(tensor)).sum())
        larger = " Or use bf16 or fp32, which hold larger numbers than fp16." if tensor.dtype == torch.float16 else ""
        raise ModelError(
            f"{name}: {count:,} of {tensor.numel():,} values are NaN or infinite. "
            f"Fetch it again, or train it anew.{larger}"
        )


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[ModelSpec, Weights]:
    """Loads a model folder. Raises ModelError that names every tensor that is missing, extra or mis-shaped."""
    with streamed_model(folder, dtype, device) as (spec, weights):
        return spec, replace(weights, layers=tuple(weights.layers))


@contextlib.contextmanager
def streamed_model(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, change: Change | None = None
) -> Iterator[tuple[ModelSpec, Weights]]:
    """The same without its layers in memory: each is read when it is asked for, and changed. Files close with it.

    dtype: None for that of the files, in which every value is kept; what they have in levels stays in levels.
    """
    spec = load_spec(folder)
    with contextlib.ExitStack() as stack:
        source = _Source(folder, list(_open_all(folder, stack)), dtype, torch.device(device))
        _check(spec, source)
        yield spec, _assemble(spec, source, change)


def fingerprint(folder: Path) -> bytes:
    """32 bytes that change when the config or any weight does: blake3 over config.json and the weight files."""
    state = blake3(max_threads=blake3.AUTO)
    for path in (folder / "config.json", *_weight_files(folder)):
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        state.update(f"{path.name}:{path.stat().st_size}\n".encode())  # so that bytes cannot move between files
        state.update_mmap(path)
    return state.digest()


# ---- files ----------------------------------------------------------------------------------------------------------


class _Tensors(Protocol):
    """Those of one file, by name without the `model.` prefix that a bare backbone lacks."""

    def names(self) -> Iterable[tuple[str, str]]:
        """Of each tensor the name, and that by which errors tell of it."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """As safetensors names it: `F32`, `I8`."""

    def values(self, name: str) -> torch.Tensor: ...

    def levels(self, name: str) -> Quantised | None:
        """None: the file has none of it."""


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._named = dict(self.names())

    def names(self) -> Iterator[tuple[str, str]]:
        for stored in self._handle.keys():  # noqa: SIM118 - a handle is not a mapping
            yield stored.removeprefix("model."), stored

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(self._named[name]).get_shape())

    def dtype(self, name: str) -> str:
        return str(self._handle.get_slice(self._named[name]).get_dtype())

    def values(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(self._named[name])
        return tensor

    def levels(self, name: str) -> None:
        return None


class _Source:
    """Tensors by name over all files of a folder."""

    def __init__(
        self, folder: Path, files: Sequence[_Tensors], dtype: torch.dtype | None, device: torch.device
    ) -> None:
        self.folder, self.device = folder, device
        self._where: dict[str, tuple[_Tensors, str]] = {}
        for tensors in files:
            for name, told in tensors.names():
                if name in self._where:
                    raise ModelError(f"{folder}: {name} is stored twice; expected each tensor in one file")
                if not told.endswith(_IGNORED) and not told.startswith(CATALOG_PREFIX):
                    self._where[name] = (tensors, told)
        self._keeps_levels = dtype is None
        self.dtype = dtype or self._narrowest()

    def _narrowest(self) -> torch.dtype:
        """Which holds every value of the files."""
        kinds = {self.stored_dtype(name) for name in self._where}
        return _IN_16_BITS.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name][0].shape(name)

    def stored_dtype(self, name: str) -> str:
        return self._where[name][0].dtype(name)

    def matrix(self, *names: str) -> Matrix:
        """The named matrices stacked by rows: in levels where the files have all of them so, and these are kept."""
        if self._keeps_levels:
            levels = [self._where[name][0].levels(name) for name in names]
            stacked = [each for each in levels if each is not None]
            if len(stacked) == len(names) and len({each.bits for each in stacked}) == 1:
                for name, each in zip(names, stacked, strict=True):
                    for part in each.parts[1:]:
                        check_finite(part, self._told(name))
                return joined(stacked).map(lambda part: part.to(self.device))
        return self.read(*names)

    def read(self, *names: str) -> torch.Tensor:
        """The named tensors stacked by rows, in a memory of their own."""
        shapes = [self.shape(name) for name in names]
        out = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=self.dtype, device=self.device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            part = out[start : start + shape[0]].copy_(self._where[name][0].values(name))
            check_finite(part, self._told(name))
            start += shape[0]
        return out

    def _told(self, name: str) -> str:
        return f"{self.folder}: {self._where[name][1]}"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    whole, gguf = folder / "model.safetensors", (folder / GGUF, folder / INDEX)
    if not whole.exists() and gguf[0].exists():
        return list(gguf)
    if whole.exists() or not index.exists():
        return [whole]
    try:
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} has no weight_map from tensors to files; fetch it again") from error


def _open_all(folder: Path, stack: contextlib.ExitStack) -> Iterator[_Tensors]:
    paths = _weight_files(folder)
    if paths[0].name == GGUF:
        yield GgufTensors(folder)
        return
    for path in paths:
        if not path.is_file():
            raise ModelError(
                f"{path} is missing; expected model.safetensors or the shards that its index names. Other formats "
                "(pytorch_model.bin) are converted by transformers: load the model and call save_pretrained"
            )
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
        yield _Safetensors(handle)


# ---- names and shapes -----------------------------------------------------------------------------------------------


def expected_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, as transformers writes them but without `model.`, and shapes of all tensors of a model."""
    d, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
    yield "embed_tokens.weight", (spec.vocab_size, d)
    yield "norm.weight", (d,)
    if not spec.tied_embeddings:
        yield "lm_head.weight", (spec.vocab_size, d)
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        yield at + "input_layernorm.weight", (d,)
        yield at + "post_attention_layernorm.weight", (d,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{part}_proj.weight", (rows, d)
            if spec.qkv_bias:
                yield f"{at}self_attn.{part}_proj.bias", (rows,)
        yield at + "self_attn.o_proj.weight", (d, q)
        if spec.o_bias:
            yield at + "self_attn.o_proj.bias", (d,)
        if spec.qk_norm:
            yield at + "self_attn.q_norm.weight", (spec.head_dim,)
            yield at + "self_attn.k_norm.weight", (spec.head_dim,)
        yield at + "mlp.gate_proj.weight", (spec.ffn_size, d)
        yield at + "mlp.up_proj.weight", (spec.ffn_size, d)
        yield at + "mlp.down_proj.weight", (d, spec.ffn_size)


def _check(spec: ModelSpec, source: _Source) -> None:
    expected = dict(expected_shapes(spec))
    allowed = {"lm_head.weight"} if spec.tied_embeddings else set()  # some exports store the tied head again
    present = source.names & (expected.keys() | allowed)
    _refuse_quantised(source, present)
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in source.names]
    problems += [f"unexpected {name}" for name in sorted(source.names - present)]
    problems += [
        f"{name} is {source.shape(name)}, expected {shape}"
        for name, shape in expected.items()
        if name in present and source.shape(name) != shape
    ]
    if problems:
        hint = "; it is a classifier, not a language model" if source.names & _CLASSIFIER else ""
        raise ModelError(f"{source.folder}: the tensors do not fit config.json{hint}: {_told(problems)}")


def _refuse_quantised(source: _Source, present: set[str]) -> None:
    kinds = {_QUANTISED[end] for name in source.names if (end := name.rpartition(".")[2]) in _QUANTISED}
    kinds |= {source.stored_dtype(name) for name in present} - _FLOATS
    if kinds:
        raise UnsupportedModelError(
            f"{source.folder} holds quantised weights ({', '.join(sorted(kinds))}) though config.json names none; "
            "supported are fp32, fp16 and bf16, and GGUF files"
        )


def _told(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


def _same_head(source: _Source, embed: Matrix) -> Matrix:
    """`embed`, which is the head as well. Raises ModelError where the files hold another head."""
    if "lm_head.weight" in source.names and not torch.equal(source.read("lm_head.weight"), wide(embed)):
        raise ModelError(
            f"{source.folder}: config.json says that embeddings and head are one (tie_word_embeddings), but "
            "lm_head.weight differs from embed_tokens.weight; set it to false if the head was trained apart"
        )
    return embed


class _Layers(Sequence[LayerWeights]):
    def __init__(self, spec: ModelSpec, source: _Source, change: Change | None) -> None:
        self._spec, self._source, self._change = spec, source, change

    def __len__(self) -> int:
        return self._spec.num_layers

    @overload
    def __getitem__(self, at: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[LayerWeights, ...]: ...
    def __getitem__(self, at: int | slice) -> LayerWeights | tuple[LayerWeights, ...]:
        numbers = range(len(self))[at]
        if isinstance(numbers, range):
            return tuple(self[number] for number in numbers)
        layer = _layer(self._spec, self._source, f"layers.{numbers}.")
        return self._change(numbers, layer) if self._change else layer


def _assemble(spec: ModelSpec, source: _Source, change: Change | None) -> Weights:
    embed = source.matrix("embed_tokens.weight")
    return Weights(
        embed=embed,
        layers=_Layers(spec, source, change),
        final_norm=source.read("norm.weight"),
        lm_head=_same_head(source, embed) if spec.tied_embeddings else source.matrix("lm_head.weight"),
    )


def _layer(spec: ModelSpec, source: _Source, at: str) -> LayerWeights:
    def optional(present: bool, *names: str) -> torch.Tensor | None:
        return source.read(*names) if present else None

    attention = at + "self_attn."
    return LayerWeights(
        input_norm=source.read(at + "input_layernorm.weight"),
        qkv=source.matrix(*(f"{attention}{part}_proj.weight" for part in "qkv")),
        qkv_bias=optional(spec.qkv_bias, *(f"{attention}{part}_proj.bias" for part in "qkv")),
        q_norm=optional(spec.qk_norm, attention + "q_norm.weight"),
        k_norm=optional(spec.qk_norm, attention + "k_norm.weight"),
        o=source.matrix(attention + "o_proj.weight"),
        o_bias=optional(spec.o_bias, attention + "o_proj.bias"),
        post_norm=source.read(at + "post_attention_layernorm.weight"),
        gate_up=source.matrix(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
        down=source.matrix(at + "mlp.down_proj.weight"),
    )
