"""Loads a Hugging Face model folder (config.json and safetensors, whole or sharded) into fused matrices.

Knows nothing of how they are used. Invariant: every tensor in the files is either placed at its exact shape or
named in an error; only what follows from the rest is skipped (a tied head stored again, RoPE buffers). Peak memory is
the model and one tensor: files are mapped, and tensors are copied into their fused places one by one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from rcllm.errors import ModelError
from rcllm.model.spec import ModelSpec

_IGNORED = "rotary_emb.inv_freq"  # a buffer that old exports wrote; it follows from the config
CATALOG_PREFIX = "catalog."  # of tensors that are no weights: the catalogue that a generative model was trained for


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. H query heads and KV key-value heads of size D, hidden size d."""

    input_norm: torch.Tensor  # [d]
    qkv: torch.Tensor  # [(H + 2·KV)·D, d]; rows q, k, v
    qkv_bias: torch.Tensor | None  # [(H + 2·KV)·D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: torch.Tensor  # [d, H·D]
    o_bias: torch.Tensor | None  # [d]
    post_norm: torch.Tensor  # [d]
    gate_up: torch.Tensor  # [2·ffn, d]; rows gate, up
    down: torch.Tensor  # [d, ffn]


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, in one dtype on one device."""

    embed: torch.Tensor  # [vocab, d]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [d]
    lm_head: torch.Tensor  # [vocab, d]; the same tensor as `embed` where embeddings are tied


def load_spec(folder: Path) -> ModelSpec:
    """Reads `folder/config.json`. Raises ModelError."""
    return ModelSpec.from_hf(_read_json(folder / "config.json"))


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[ModelSpec, Weights]:
    """Loads a model folder. Raises ModelError that names every tensor that is missing, extra or mis-shaped."""
    spec = load_spec(folder)
    with contextlib.ExitStack() as stack:
        source = _Source(_open_all(folder, stack), dtype, torch.device(device))
        _check(spec, source, folder)
        return spec, _assemble(spec, source)


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


class _Source:
    """Tensors by name over all shards, without the `model.` prefix that a bare backbone lacks."""

    def __init__(self, files: dict[Path, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._where = {
            name.removeprefix("model."): (handle, name)
            for handle in files.values()
            for name in handle.keys()  # noqa: SIM118 - a handle is not a mapping
            if not name.endswith(_IGNORED) and not name.startswith(CATALOG_PREFIX)
        }

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self._where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def read(self, *names: str) -> torch.Tensor:
        """The named tensors stacked by rows, in a memory of their own."""
        shapes = [self.shape(name) for name in names]
        out = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=self.dtype, device=self.device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            handle, stored = self._where[name]
            out[start : start + shape[0]].copy_(handle.get_tensor(stored))
            start += shape[0]
        return out


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (whole := folder / "model.safetensors").exists() or not index.exists():
        return [whole]
    try:
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError) as error:
        raise ModelError(f"{index} has no weight_map") from error


def _open_all(folder: Path, stack: contextlib.ExitStack) -> dict[Path, Any]:
    files = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise ModelError(f"{path} is missing; expected model.safetensors or the shards that its index names")
        try:
            files[path] = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing; expected a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


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


def _check(spec: ModelSpec, source: _Source, folder: Path) -> None:
    expected = dict(expected_shapes(spec))
    allowed = {"lm_head.weight"} if spec.tied_embeddings else set()  # some exports store the tied head again
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in source.names]
    problems += [f"unexpected {name}" for name in sorted(source.names - expected.keys() - allowed)]
    problems += [
        f"{name} is {source.shape(name)}, expected {shape}"
        for name, shape in expected.items()
        if name in source.names and source.shape(name) != shape
    ]
    if problems:
        raise ModelError(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")


def _assemble(spec: ModelSpec, source: _Source) -> Weights:
    embed = source.read("embed_tokens.weight")
    return Weights(
        embed=embed,
        layers=tuple(_layer(spec, source, f"layers.{layer}.") for layer in range(spec.num_layers)),
        final_norm=source.read("norm.weight"),
        lm_head=embed if spec.tied_embeddings else source.read("lm_head.weight"),
    )


def _layer(spec: ModelSpec, source: _Source, at: str) -> LayerWeights:
    def optional(present: bool, *names: str) -> torch.Tensor | None:
        return source.read(*names) if present else None

    attention = at + "self_attn."
    return LayerWeights(
        input_norm=source.read(at + "input_layernorm.weight"),
        qkv=source.read(*(f"{attention}{part}_proj.weight" for part in "qkv")),
        qkv_bias=optional(spec.qkv_bias, *(f"{attention}{part}_proj.bias" for part in "qkv")),
        q_norm=optional(spec.qk_norm, attention + "q_norm.weight"),
        k_norm=optional(spec.qk_norm, attention + "k_norm.weight"),
        o=source.read(attention + "o_proj.weight"),
        o_bias=optional(spec.o_bias, attention + "o_proj.bias"),
        post_norm=source.read(at + "post_attention_layernorm.weight"),
        gate_up=source.read(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
        down=source.read(at + "mlp.down_proj.weight"),
    )
