"""A toy set whose next item is certain: every user walks around a circle of items."""

from __future__ import annotations

import numpy as np

from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import IntArray, ItemId
from rcllm.sid.config import NetworkConfig, SequenceConfig, TrainConfig

NUM_ITEMS, SIZES = 12, (4, 4)
IDS = tuple(ItemId(f"item {n}, é") for n in range(NUM_ITEMS))
TRAIN = [[(start + step) % NUM_ITEMS for step in range(6)] for start in range(NUM_ITEMS)]
HELD_OUT = [[(start + step) % NUM_ITEMS for step in range(4)] for start in range(0, NUM_ITEMS, 2)]
QUICK = TrainConfig(
    NetworkConfig(hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, ffn_size=64, dropout=0.05),
    SequenceConfig(max_items=6, batch_tokens=64, skip=0.0, shuffle=0.0),
    epochs=24,
    learning_rate=1e-2,
    weight_decay=0.0,
    warm_up_steps=5,
)


def toy_codes() -> IntArray:
    return np.array([[n % SIZES[0], n // SIZES[0]] for n in range(NUM_ITEMS)], dtype=np.int32)


def toy_index() -> CodeIndex:
    return CodeIndex.build(toy_codes(), IDS, SIZES)
