"""A decoder of semantic IDs as a folder: a Hugging Face model with its catalogue in the weights file.

Knows nothing of training. Invariant: a folder with `model.safetensors` is whole, because that file is renamed into
place last; what stands in it under `code_index.` is no weight, and loaders of models skip it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import ItemId
from rcllm.durable import renamed, write
from rcllm.errors import ModelError
from rcllm.model.weights import CATALOG_PREFIX
from rcllm.plain_json import to_json, without_nan
from rcllm.sid.vocabulary import Vocabulary

WEIGHTS = "model.safetensors"
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
    texts = {
        "config.json": to_json(hf_config, indent=2),
        "tokenizer.json": vocabulary.tokenizer().to_str(pretty=True),
        "tokenizer_config.json": vocabulary.tokenizer_config(),
        "training.json": to_json(without_nan(record), indent=2),
    }
    for name, text in texts.items():
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
    item_ids = tuple(ItemId(name) for name in json.loads(names.tobytes()))
    return CodeIndex.build(codes, item_ids, tuple(int(size) for size in sizes))
