"""What a decoding pass costs on this machine at each number of rows: measured once, with the real model.

Knows nothing of requests. Invariant: it changes nothing, in the model or in the cache.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from rcllm.drafts.draft import EMPTY, DraftTree
from rcllm.engine.jobs.sequences import SequenceKV, next_pass
from rcllm.metrics import Clock
from rcllm.model.decoder import Decoder
from rcllm.schedule.draft_budget import PassCosts

ROWS = (1, 2, 4, 8, 16, 32, 64)
_ROUNDS = 4  # the quickest counts; the first prepares what a row count needs


def measure(decoder: Decoder, context_len: int = 256, *, clock: Clock = time.perf_counter) -> PassCosts:
    """Times passes, with the choice of their tokens, after a context of `context_len` tokens; seconds of work."""
    context_len = min(context_len, decoder.max_positions - 2)
    kv = SequenceKV(decoder, context_len)
    kv.kv.zero_()
    kv.length = context_len
    passes = {rows: next_pass([kv.segment], [0], [context_len], [_flat(rows - 1)]) for rows in ROWS}
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(_ROUNDS):  # in rounds, so that other load on the machine meets every row count
        for rows, work in passes.items():
            start = clock()
            passed = decoder.forward(work)
            with torch.inference_mode():
                decoder.logits(passed.hidden).argmax(dim=-1).tolist()
            times[rows].append((clock() - start) * 1e3)
    return PassCosts({rows: min(several) for rows, several in times.items()})


def _flat(num_nodes: int) -> DraftTree:
    """A tree whose nodes are all children of the root."""
    if not num_nodes:
        return EMPTY
    weights = np.ones(num_nodes, np.float32)
    return DraftTree(np.arange(num_nodes, dtype=np.int32), np.zeros(num_nodes, np.int32), weights)
