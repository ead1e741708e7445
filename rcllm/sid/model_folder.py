"""A decoder of semantic IDs as a folder: a Hugging Face model with its catalogue in the weights file.

Beside it may lie an item-kNN in a file of its own. Knows nothing of training. Invariant: a folder with
`model.safetensors` is whole, because that file is renamed into place last; what stands under `CATALOG_PREFIX` is no
weight, and loaders of models skip it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import sparse

from rcllm.codes.index import CodeIndex
from rcllm.codes.knn import Knn
from rcllm.codes.updates import Update
from rcllm.core.ranking import ItemId
from rcllm.durable import renamed, write
from rcllm.errors import DataError, ModelError
from rcllm.model.weights import CATALOG_PREFIX
from rcllm.plain_json import read_json_if_there, to_json, without_nan
from rcllm.sid.vocabulary import Vocabulary
from rcllm.words import brief

WEIGHTS, KNN, RECORD = "model.safetensors", "knn.safetensors", "training.json"
TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json")
_CODES, _SIZES, _ITEMS, _ENABLED = (CATALOG_PREFIX + part for part in ("codes", "sizes", "item_ids", "enabled"))
_STARTS, _NEAR, _LIKENESS, _SHARE = (CATALOG_PREFIX + "knn." + part for part in ("starts", "near", "likeness", "share"))
_NO_CATALOGUE = "catalogue; only models of `rcllm sid train` do. For another model give its codes as a file"
_AGAIN = "train or copy the model again"
_LEAVE_OUT = f"{_AGAIN}, or remove this file to recommend without it"


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
    tensors = {"model." + name: tensor.detach().float().contiguous() for name, tensor in weights.items()} | {
        _CODES: torch.from_numpy(np.array(code_index.codes, dtype=np.int32)),
        _SIZES: torch.tensor(code_index.sizes, dtype=torch.int32),
        _ITEMS: _texts(code_index.item_ids),
    }
    if not code_index.enabled.all():  # a file without it offers all
        tensors[_ENABLED] = torch.from_numpy(code_index.enabled)
    with renamed(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def save_knn(folder: Path, knn: Knn) -> None:
    """Beside the model, whose recommendations it takes part in."""
    rows = sparse.csr_array(knn.likeness)
    tensors = {
        _STARTS: torch.from_numpy(rows.indptr.astype(np.int64)),
        _NEAR: torch.from_numpy(rows.indices.astype(np.int32)),
        _LIKENESS: torch.from_numpy(rows.data.astype(np.float32)),
        _SHARE: torch.tensor(knn.share, dtype=torch.float64),
        _ITEMS: _texts(knn.item_ids),
    }
    with renamed(folder / KNN) as partial:
        save_file(tensors, partial)


def load_knn(folder: Path) -> Knn | None:
    """The item-kNN that a model of `rcllm sid train` carries; None where it has none. Raises ModelError."""
    path = folder / KNN
    if not path.exists():
        return None
    found = _read(path, (_STARTS, _NEAR, _LIKENESS, _SHARE, _ITEMS), f"item-kNN; {_LEAVE_OUT}", _LEAVE_OUT)
    try:
        return _checked_knn(found)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); {_LEAVE_OUT}") from error


def load_codes(folder: Path) -> CodeIndex:
    """The catalogue that a model of `rcllm sid train` carries, with what of it is on offer. Raises ModelError."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{path} is missing; expected a model of `rcllm sid train`")
    found = _read(path, (_CODES, _SIZES, _ITEMS), _NO_CATALOGUE, _AGAIN, (_ENABLED,))
    sizes, names = found[_SIZES], found[_ITEMS]
    try:
        code_index = _checked(found[_CODES], [int(size) for size in sizes], _names(names.tobytes()))
        return _offering(code_index, found[_ENABLED]) if _ENABLED in found else code_index
    except (ValueError, TypeError, DataError) as error:
        raise ModelError(f"{path}: its catalogue is damaged ({error}); {_AGAIN}") from error


def load_max_items(folder: Path) -> int | None:
    """How much of a history the model was trained on; None where its folder does not say. Raises ModelError."""
    found: object = read_json_if_there(folder / RECORD, "a model of `rcllm sid train`")
    for name in ("settings", "sequences", "max_items"):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None or (isinstance(found, int) and found >= 1):
        return found
    raise ModelError(f"{folder / RECORD}: expected max_items of 1 or more, got {brief(found)}; {_AGAIN}")


def _texts(item_ids: Sequence[ItemId]) -> torch.Tensor:
    """A JSON list of texts in UTF-8, as bytes."""
    return torch.from_numpy(np.frombuffer(json.dumps(list(item_ids)).encode(), dtype=np.uint8).copy())


def _read(
    path: Path, names: Sequence[str], lacking: str, advice: str, others: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """These tensors of a file, and `others` where it has them.

    Raises ModelError, which says what a file without the first lacks, or what to do.
    """
    try:
        with safe_open(path, framework="np") as file:
            there = set(file.keys())
            if not there.issuperset(names):
                raise ModelError(f"{path} holds no {lacking}")
            return {name: file.get_tensor(name) for name in (*names, *others) if name in there}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); {advice}") from error


def _names(text: bytes) -> list[ItemId]:
    """Raises ValueError."""
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("expected the items' ids as a list of texts")
    return [ItemId(name) for name in names]


def _checked_knn(found: Mapping[str, npt.NDArray[Any]]) -> Knn:
    """Raises ValueError, TypeError for what no training writes."""
    item_ids = _names(found[_ITEMS].tobytes())
    shape = (len(item_ids), len(item_ids))
    likeness = sparse.csr_array((found[_LIKENESS], found[_NEAR], found[_STARTS]), shape=shape)
    likeness.check_format(full_check=True)
    share = float(found[_SHARE])
    if not np.isfinite(likeness.data).all() or (likeness.data <= 0).any() or not 0 <= share < 1:
        raise ValueError(f"expected likeness above 0 and a share from 0 to below 1, got the share {share}")
    return Knn(tuple(item_ids), likeness, share)


def _checked(codes: npt.NDArray[Any], sizes: list[int], names: list[ItemId]) -> CodeIndex:
    """Raises ValueError for codes and names that no training writes."""
    if codes.shape != (len(names), len(sizes)) or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"expected codes {[len(names), len(sizes)]}, got {list(codes.shape)} of {codes.dtype}")
    if not len(codes) or (codes < 0).any() or (codes >= np.array(sizes)).any():
        raise ValueError(f"expected codes of each level from 0 to below {sizes}")
    return CodeIndex.build(codes.astype(np.int32), names, tuple(sizes))


def _offering(code_index: CodeIndex, enabled: npt.NDArray[Any]) -> CodeIndex:
    """Raises ValueError for what no training writes."""
    if enabled.shape != (code_index.num_items,) or enabled.dtype != np.bool_:
        raise ValueError(f"expected enabled as {code_index.num_items} booleans, got {enabled.dtype} {enabled.shape}")
    disabled = compress(code_index.item_ids, ~enabled)
    return code_index.changed(Update(enabled=dict.fromkeys(disabled, False)))
