"""Looks at queries, keys and values inside a pass, for level `corrected`: who attends to what, what differs from the
cached KV. Decides nothing (`select.py` does).

Computed apart from the attention of the pass, for the few rows whose attention is asked for, block by block under the
prompt's mask. Invariant: a token's attention is the softmax weight that the model itself gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rcllm.core.ranking import BoolArray, ContentKey, IntArray, Reduction
from rcllm.model.arrivals import Arrivals
from rcllm.model.decoder import Decoder
from rcllm.model.kv_int8 import widen
from rcllm.reuse.assemble import assemble
from rcllm.reuse.plan import Planned
from rcllm.reuse.select import FloatArray, Signals, Tokens, questions

KV = Mapping[ContentKey, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Heads:
    """Rows of a pass at one layer, by head; turned to their positions."""

    q: torch.Tensor  # [rows, H, D]
    k: torch.Tensor  # [rows, KV, D]
    v: torch.Tensor  # [rows, KV, D]

    @classmethod
    def of(cls, decoder: Decoder, qkv: torch.Tensor) -> Heads:
        spec = decoder.spec
        heads = qkv.unflatten(1, (-1, spec.head_dim))
        return cls(*heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1))

    def rows(self, start: int, stop: int) -> Heads:
        return Heads(self.q[start:stop], self.k[start:stop], self.v[start:stop])


@torch.inference_mode()
def attention_received(
    sees: BoolArray, block: IntArray, q: torch.Tensor, q_tokens: IntArray, k: torch.Tensor, reduction: Reduction
) -> FloatArray:
    """What attention each token of the prompt receives, as a mean over heads; [tokens], fp64.

    sees [blocks, blocks] and block [tokens] say who sees whom; q [rows, H, D] are the queries of the tokens `q_tokens`
    [rows]; k [tokens, KV, D]. `question` and `mean` divide by the number of queries that see the token, where `mean`
    counts only those that come later; `sum` is the column sum of the attention map.
    """
    total, count = np.zeros(len(block)), np.zeros(len(block))
    for index in dict.fromkeys(block[q_tokens].tolist()):
        rows = np.flatnonzero(block[q_tokens] == index)
        own = q_tokens[rows]
        columns = np.flatnonzero(sees[index][block] | (block == index))
        mask = (block[columns] != index) | (columns <= own[:, None])
        weights = _weights(q[torch.from_numpy(rows)], k[torch.from_numpy(columns)], mask)
        later = mask & (columns != own[:, None]) if reduction == "mean" else mask
        total[columns] += (weights * later).sum(axis=0)
        count[columns] += later.sum(axis=0)
    return total if reduction == "sum" else total / np.maximum(count, 1)


def _weights(q: torch.Tensor, k: torch.Tensor, mask: BoolArray) -> FloatArray:
    """Softmax weights [rows, keys], a mean over heads; q [rows, H, D], k [keys, KV, D]."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # [rows, KV, H / KV, D]
    scores = torch.einsum("rgsd,kgd->rgsk", grouped, k.float()) / math.sqrt(q.shape[2])
    hidden = torch.from_numpy(~mask).to(q.device)[:, None, None]
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    return weights.mean(dim=(1, 2)).double().cpu().numpy()


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found out about one prompt, and the cached KV that it took."""

    signals: Signals
    bytes_read: int
    bytes_copied: int


# ---- the check layer ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def check_layer(decoder: Decoder, planned: Planned, rows: Heads, layer: int, kv: KV) -> Seen:
    """`rows`: all tokens of the prompt at `layer`; `planned`: what would be reused of it, read from `kv`."""
    prompt, selection = planned.prompt, planned.prompt.options.selection
    tokens = Tokens.of(prompt, planned.plan)
    compared = {"rcllm": tokens.history, "k_difference": tokens.history | tokens.item}.get(selection.policy)
    seen = Seen(Signals.zeros(len(tokens)), 0, 0)
    if compared is not None and compared.any():
        seen = _differences(decoder, planned, tokens, rows, layer, kv, compared)
    if selection.policy == "k_difference":
        return seen
    reduction = selection.reduction if selection.policy == "rcllm" else "question"
    asked = np.arange(len(tokens), dtype=np.int32)
    if reduction == "question":
        asked = asked[np.isin(tokens.block, questions(prompt))]
    attention = attention_received(prompt.sees, tokens.block, rows.q[torch.from_numpy(asked)], asked, rows.k, reduction)
    return replace(seen, signals=replace(seen.signals, attention=attention))


def _differences(
    decoder: Decoder, planned: Planned, tokens: Tokens, rows: Heads, layer: int, kv: KV, compared: BoolArray
) -> Seen:
    """How far K and V of whole reused pieces, the tokens `compared`, are from the cached ones, at their positions."""
    starts = np.cumsum([0, *map(len, planned.plan.pieces)]).tolist()
    kept = [
        kv[piece.key][layer, :, :, piece.start : piece.stop]
        for piece, start in zip(planned.plan.pieces, starts, strict=False)
        if piece.key is not None and compared[start]
    ]
    num_bytes = sum(some.numel() * some.element_size() for some in kept)
    cached = torch.cat([widen(some) for some in kept], dim=2)  # [2, KV, compared, D]
    bases = np.array([block.base for block in planned.prompt.blocks])[tokens.block[compared]]
    at = torch.from_numpy(np.flatnonzero(compared))
    k, v = rows.k[at].float(), rows.v[at].float()
    cached_k, cached_v = cached.to(rows.k.dtype).transpose(1, 2)  # as `rows`
    delta_k = k - decoder.rope.shift(cached_k, torch.from_numpy(bases).to(decoder.device)).float()
    columns = (_l1(delta_k) + _l1(v - cached_v.float()), _l1(k) + _l1(v), delta_k.square().sum(dim=(1, 2)))
    found = np.zeros((3, len(tokens)))
    found[:, compared] = torch.stack(columns).double().cpu().numpy()
    return Seen(Signals(np.zeros(len(tokens)), *found), num_bytes, num_bytes)


def _l1(x: torch.Tensor) -> torch.Tensor:
    return x.abs().sum(dim=(1, 2))


# ---- a pass over blocks ---------------------------------------------------------------------------------------------


def blocks_pass(decoder: Decoder, batch: Sequence[Planned], kv: KV, arrivals: Sequence[Arrivals] = ()) -> list[Seen]:
    """Runs prompts with what their plans reuse; the attention of each one's question, a mean over all layers.

    `arrivals`: of blocks in `kv` that are still on their way; what watches a layer reads no other.
    """
    work = assemble(batch, kv, decoder.device, arrivals=arrivals).work
    watchers = [_Watcher(decoder, planned, kv) for planned in batch]
    ends = np.cumsum([planned.plan.num_fresh for planned in batch]).tolist()

    def observe(layer: int, qkv: torch.Tensor) -> None:
        heads = Heads.of(decoder, qkv)
        for watcher, start, stop in zip(watchers, [0, *ends[:-1]], ends, strict=True):
            watcher.look(layer, heads.rows(start, stop))

    copied = decoder.forward(work, observe=observe).bytes_copied > 0  # then every segment once
    read = [sum(segment.num_bytes for segment in group.segments) for group in work.groups]
    return [
        Seen(watcher.signals(), num_bytes + watcher.num_bytes, watcher.num_bytes + num_bytes * copied)
        for watcher, num_bytes in zip(watchers, read, strict=True)
    ]


class _Watcher:
    """Adds up, layer by layer, the attention that one prompt's question gives to each of its tokens."""

    def __init__(self, decoder: Decoder, planned: Planned, kv: KV) -> None:
        tokens = Tokens.of(planned.prompt, planned.plan)
        self._decoder, self._sees, self._block = decoder, planned.prompt.sees, tokens.block
        self.num_bytes = 0  # of cached keys, each copied to where it is read
        fresh = np.concatenate([np.full(len(piece), piece.key is None) for piece in planned.plan.pieces])
        self._cached = [
            (kv[piece.key], piece.start, piece.stop) for piece in planned.plan.pieces if piece.key is not None
        ]
        bases = np.array([block.base for block in planned.prompt.blocks])[tokens.block]
        self._bases = torch.from_numpy(bases[~fresh]).to(decoder.device)
        self._order = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(~fresh), np.flatnonzero(fresh)])))
        self._asked = np.flatnonzero(np.isin(tokens.block, questions(planned.prompt))).astype(np.int32)
        self._rows = torch.from_numpy(np.searchsorted(np.flatnonzero(fresh), self._asked))
        self._total = np.zeros(len(tokens))

    def look(self, layer: int, rows: Heads) -> None:
        k = rows.k
        if self._cached:
            kept = [kv[layer, 0, :, start:stop] for kv, start, stop in self._cached]
            self.num_bytes += sum(some.numel() * some.element_size() for some in kept)
            cached = torch.cat([widen(some) for some in kept], dim=1)
            cached = self._decoder.rope.shift(cached.to(k.dtype).transpose(0, 1), self._bases)
            k = torch.cat((cached, k))[self._order]
        self._total += attention_received(self._sees, self._block, rows.q[self._rows], self._asked, k, "question")

    def signals(self) -> Signals:
        return replace(Signals.zeros(len(self._total)), attention=self._total / self._decoder.spec.num_layers)
