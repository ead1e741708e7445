"""Codes of items from what they say and from who touched them together.

Knows nothing of files, never imports torch. Invariant: of interactions, only those of training users (of the common
split) are used, so that codes tell nothing of the users that a model is evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import Interaction, Item, ItemId
from rcllm.data import Split, histories, split_of
from rcllm.drafts.lightgcn import unit_rows
from rcllm.errors import DataError
from rcllm.sid.collaborative import FloatArray, collaborative_vectors
from rcllm.sid.config import BuildConfig
from rcllm.sid.quantise import Codes, quantise
from rcllm.sid.vocabulary import FIELD


def item_texts(items: Iterable[Item], fields: Collection[str] = ()) -> list[str]:
    """What is embedded of each item: its stable fields, or those named, in the order of the file."""
    return [
        ". ".join(text for name, text in item.fields.items() if (name in fields if fields else name != FIELD))
        for item in items
    ]


def split_histories(
    interactions: Iterable[Interaction], numbers: Mapping[ItemId, int], split: Split
) -> list[list[int]]:
    """Item numbers of each user of the split, oldest first; items that `numbers` lacks are left out."""
    return [
        [numbers[row.item_id] for row in rows if row.item_id in numbers]
        for user, rows in histories(interactions).items()
        if split_of(user) == split
    ]


def join_vectors(embeddings: FloatArray, training: Sequence[Sequence[int]], config: BuildConfig) -> FloatArray:
    """[items, d]: the embeddings' principal components beside the collaborative vectors. Raises DataError."""
    if not np.isfinite(embeddings).all():
        raise DataError("embeddings hold values that are not finite; compute them anew")
    text = unit_rows(_principal(embeddings, config.text_dimensions))
    if not training or config.collaborative_weight == 0.0:
        return text
    together = collaborative_vectors(
        training, len(text), config.collaborative_dimensions, config.window, config.codes.seed
    )
    return np.concatenate([text, np.float32(config.collaborative_weight) * together], axis=1)


def build_codes(
    embeddings: FloatArray,
    training: Sequence[Sequence[int]],
    config: BuildConfig,
    on_level: Callable[[int], None] | None = None,
) -> Codes:
    """`embeddings` [items, d]; `training`: histories of item numbers, or none. Raises ConfigError, DataError."""
    config.check()
    return quantise(join_vectors(embeddings, training, config), config.codes, on_level)


def code_index_of(codes: Codes, item_ids: Sequence[ItemId]) -> CodeIndex:
    """The codes as an index from which items can be recommended."""
    return CodeIndex.build(codes.codes, item_ids, codes.sizes)


def _principal(vectors: FloatArray, dimensions: int) -> FloatArray:
    """[items, min(dimensions, d)] by eigenvectors of the covariance, signs fixed."""
    if not 0 < dimensions < vectors.shape[1]:
        return vectors
    centred = (vectors - vectors.mean(axis=0)).astype(np.float64)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dimensions]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(dimensions)] < 0, -1.0, 1.0)
    return np.asarray(centred @ axes, dtype=np.float32)
