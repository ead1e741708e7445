"""The tensors of a GGUF file that lies in a model's folder, beside an index that says where each of them is.

Knows nothing of metadata, which `gguf_file.py` reads once, when it writes the index. Invariant: values are exactly
those that the file stands for, and levels are those of the file itself, which are never made of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rcllm.errors import ConfigError, ModelError, UnsupportedModelError
from rcllm.model.quantised import Quantised
from rcllm.model.spec import WEIGHT_GROUP as GROUP
from rcllm.plain_json import read_json

GGUF, INDEX = "model.gguf", "model.gguf.json"
_Bytes = npt.NDArray[np.uint8]
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies, as the index tells it."""

    kind: str  # as GGUF names it: F32, Q4_1
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    heads: int = 0  # whose rows llama.cpp put in another order; 0: in none


def gguf_package() -> Any:
    """Raises ConfigError where it is missing."""
    try:
        import gguf  # noqa: PLC0415 - optional: only those who read GGUF need it
    except ImportError as error:
        raise ConfigError("reading GGUF needs the gguf package: pip install 'rcllm[gguf]'") from error
    return gguf


class GgufTensors:
    """By the names of Hugging Face, without `model.`. The file is mapped: a tensor is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError where the two files do not belong together."""
        self._path = folder / GGUF
        index = read_json(folder / INDEX)
        try:
            self._stored = {name: _stored(told) for name, told in index["tensors"].items()}
            self._bytes: _Bytes = np.memmap(self._path, np.uint8, "r")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder / INDEX} does not index {GGUF} ({error!r}); pull the model again") from error
        except OSError as error:
            raise ModelError(f"{self._path} cannot be read ({error}); pull the model again") from error
        end = max((each.offset + each.num_bytes for each in self._stored.values()), default=0)
        if end > len(self._bytes):
            raise ModelError(f"{self._path} has {len(self._bytes):,} bytes of {end:,}; pull the model again")

    def names(self) -> Iterator[tuple[str, str]]:
        """Of each tensor the name, and that by which errors tell of it."""
        for name in self._stored:
            yield name, name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """The narrowest that holds its values, as safetensors names it."""
        kind = self._stored[name].kind
        return kind if kind in _FLOATS else "F32"

    def values(self, name: str) -> torch.Tensor:
        """In that dtype. Raises UnsupportedModelError for a kind that the `gguf` package names and cannot read."""
        stored, raw = self._stored[name], self._raw(name)
        if levels := self.levels(name):
            return levels.widen()
        if dtype := _FLOATS.get(stored.kind):
            values = torch.from_numpy(raw.copy()).view(dtype).reshape(stored.shape)
        else:
            gguf = gguf_package()
            rows = raw.reshape(*stored.shape[:-1], -1)
            try:
                values = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[stored.kind]))
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"tensor {name} is kept as {stored.kind}, which the gguf package cannot read; use a file of "
                    "another quantisation, such as Q8_0"
                ) from error
        return _in_order(values.reshape(stored.shape), stored.heads)

    def levels(self, name: str) -> Quantised | None:
        """As the file has them; None for a kind that `Quantised` has no place for."""
        stored = self._stored[name]
        if (read := _LEVELS.get(stored.kind)) is None:
            return None
        blocks = torch.from_numpy(self._raw(name).reshape(stored.shape[0], stored.shape[1] // GROUP, -1).copy())
        levels, scales, least = read(blocks)
        if least is None and (levels == -128).any():
            return None
        found = Quantised(stored.shape[1], levels, scales, least, is_exact=True)
        return found.map(lambda part: _in_order(part, stored.heads))

    def _raw(self, name: str) -> _Bytes:
        stored = self._stored[name]
        return self._bytes[stored.offset : stored.offset + stored.num_bytes]


def _stored(told: Mapping[str, Any]) -> Stored:
    stored = Stored(**{**told, "shape": tuple(map(int, told["shape"]))})
    if stored.kind in _BLOCK_BYTES and stored.num_bytes != math.prod(stored.shape) // GROUP * _BLOCK_BYTES[stored.kind]:
        raise ValueError(f"{stored.num_bytes} bytes of {stored.kind}")
    return stored


def _in_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's row order of Llama's wq and wk: it rotates rows 2i and 2i + 1 of a head, we i and i + D/2."""
    if not heads:
        return rows
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


# ---- blocks of 32 values of a row: [rows, blocks, bytes] ------------------------------------------------------------

_Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # levels, scales, least


def _q8_0(blocks: torch.Tensor) -> _Read:
    """fp16 scale, 32 levels."""
    return blocks[..., 2:].view(torch.int8).flatten(1), _half(blocks, 0), None


def _q4_0(blocks: torch.Tensor) -> _Read:
    """fp16 scale, 32 levels in 16 bytes, from 8 steps below zero on."""
    scales = _half(blocks, 0)
    return _nibbles(blocks[..., 2:]), scales, scales * -8


def _q4_1(blocks: torch.Tensor) -> _Read:
    """fp16 scale, fp16 least value, 32 levels in 16 bytes."""
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Byte i of a block has its values i and i + 16; of `Quantised` the values 2i and 2i + 1."""
    values = torch.cat((packed & 15, packed >> 4), dim=-1).unflatten(-1, (-1, 2))
    pairs: torch.Tensor = values[..., 0] | values[..., 1] << 4
    return pairs.flatten(1)


_LEVELS: dict[str, Callable[[torch.Tensor], _Read]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
_BLOCK_BYTES = {"Q8_0": 2 + GROUP, "Q4_0": 2 + GROUP // 2, "Q4_1": 4 + GROUP // 2}
