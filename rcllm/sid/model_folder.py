"""A decoder of semantic IDs as a folder: a Hugging Face model with its catalogue in the weights file.

Knows nothing of training. Invariant: a folder with `model.safetensors` is whole, because that file is renamed into
place last; what stands in it under `CATALOG_PREFIX` is no weight, and loaders of models skip it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import ItemId
from rcllm.durable import renamed, write
from rcllm.errors import DataError, ModelError
from rcllm.model.weights import CATALOG_PREFIX
from rcllm.plain_json import to_json, without_nan
from rcllm.sid.vocabulary import Vocabulary

WEIGHTS, RECORD = "model.safetensors", "training.json"
TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json")
_CODES, _SIZES, _ITEMS = (CATALOG_PREFIX + part for part in ("codes", "sizes", "item_ids"))


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    hf_config: Mapping[str, Any],
    code_index: CodeIndex,
    record: Mapping[str, Any],
) -> None:
    """`weights`: named as transformers names them, without `model.`; `record`: how the model was made."""
    vocabulary = Vocabulary(code_index.sizes)
    texts = (to_json(hf_config, indent=2), vocabulary.tokenizer().to_str(pretty=True), vocabulary.tokenizer_config())
    write(folder / RECORD, to_json(without_nan(record), indent=2).encode())  # first: it says whose the others are
    for name, text in zip(TEXTS, texts, strict=True):
        write(folder / name, text.encode())
    names = json.dumps(list(code_index.item_ids)).encode()
    tensors = {"model." + name: tensor.detach().float().contiguous() for name, tensor in weights.items()} | {
        _CODES: torch.from_numpy(np.array(code_index.codes, dtype=np.int32)),
        _SIZES: torch.tensor(code_index.sizes, dtype=torch.int32),
        _ITEMS: torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy()),  # a JSON list of texts in UTF-8
    }
    with renamed(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_codes(folder: Path) -> CodeIndex:
    """The catalogue that a model of `rcllm sid train` carries. Raises ModelError."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{path} is missing; expected a model of `rcllm sid train`")
    try:
        with safe_open(path, framework="np") as file:
            if _CODES not in file.keys():  # noqa: SIM118 - a handle is not a mapping
                raise ModelError(
                    f"{path} holds no catalogue; only models of `rcllm sid train` do. For another model give its codes "
                    "as a file"
                )
            codes, sizes, names = (file.get_tensor(name) for name in (_CODES, _SIZES, _ITEMS))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error})") from error
    try:
        return _checked(codes, [int(size) for size in sizes], json.loads(names.tobytes()))
    except (ValueError, TypeError, DataError) as error:
        raise ModelError(f"{path}: its catalogue is damaged ({error}); train or copy the model again") from error


def _checked(codes: npt.NDArray[Any], sizes: list[int], names: object) -> CodeIndex:
    """Raises ValueError for codes and names that no training writes."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("expected the items' ids as a list of texts")
    if codes.shape != (len(names), len(sizes)) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"expected codes {[len(names), len(sizes)]}, got {list(codes.shape)} of {codes.dtype}")
    if not len(codes) or (codes < 0).any() or (codes >= np.array(sizes)).any():
        raise ValueError(f"expected codes of each level from 0 to below {sizes}")
    return CodeIndex.build(codes.astype(np.int32), [ItemId(name) for name in names], tuple(sizes))
