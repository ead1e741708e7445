"""The slow, obvious twin of the request path: one dense computation over all tokens of a prompt, in fp64.

Every token is a row; who sees whom is written out pair by pair; RoPE is applied to unrotated keys at each position.
Reused tokens are rows whose K and V come from a dense computation of their own block after its canonical context.
Takes weights and prompts from the product, and no other code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rcllm.core.ranking import Plan, Prompt, TokenIds
from rcllm.model.spec import ModelSpec
from rcllm.model.weights import LayerWeights, load_model


@dataclass
class Computed:
    hidden: torch.Tensor  # [rows, d], after the final norm
    k: torch.Tensor  # [layers, rows, KV, D], before RoPE
    v: torch.Tensor  # [layers, rows, KV, D]
    attention: torch.Tensor  # [layers, H, rows, rows], softmax weights


@dataclass
class Dense:
    """A prompt as rows, one per token."""

    places: list[tuple[int, int]]  # block and offset of each
    token_ids: list[int]
    positions: torch.Tensor  # [rows]
    mask: torch.Tensor  # [rows, rows], who sees whom

    def row(self, block: int, offset: int) -> int:
        return self.places.index((block, offset))


class FullModel:
    """Plain torch, fp64."""

    def __init__(self, folder: Path) -> None:
        self.spec: ModelSpec
        self.spec, self.weights = load_model(folder, torch.float64)
        assert self.spec.rope.kind == "default"

    @torch.inference_mode()
    def compute(
        self,
        token_ids: Sequence[int],
        positions: torch.Tensor,
        mask: torch.Tensor,
        given: torch.Tensor | None = None,
        given_k: torch.Tensor | None = None,
        given_v: torch.Tensor | None = None,
        given_from: int = 0,
    ) -> Computed:
        """positions [rows]; mask [rows, rows]; where `given` [rows], K and V are those of given_k and given_v, in the
        layers from `given_from` on."""
        spec, x = self.spec, self.weights.embed[torch.tensor(token_ids)]
        ks, vs, attention = [], [], []
        for number, layer in enumerate(self.weights.layers):
            q, k, v = self._project(layer, x)
            if given is not None and given_k is not None and given_v is not None and number >= given_from:
                k = torch.where(given[:, None, None], given_k[number], k)
                v = torch.where(given[:, None, None], given_v[number], v)
            ks.append(k)
            vs.append(v)
            q, k = self.turn(q, positions), self.turn(k, positions)
            attended = torch.zeros_like(q)
            weights = torch.zeros(spec.num_heads, *mask.shape, dtype=torch.float64)
            for head in range(spec.num_heads):
                shared = head // (spec.num_heads // spec.num_kv_heads)
                scores = q[:, head] @ k[:, shared].T / math.sqrt(spec.head_dim)
                weights[head] = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
                attended[:, head] = weights[head] @ v[:, shared]
            attention.append(weights)
            x = x + attended.flatten(1) @ layer.o.T + (0 if layer.o_bias is None else layer.o_bias)
            gate, up = (self._norm(x, layer.post_norm) @ layer.gate_up.T).chunk(2, dim=-1)
            x = x + (gate * torch.sigmoid(gate) * up) @ layer.down.T
        hidden = self._norm(x, self.weights.final_norm)
        return Computed(hidden, torch.stack(ks), torch.stack(vs), torch.stack(attention))

    def _project(self, layer: LayerWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec = self.spec
        rows = self._norm(x, layer.input_norm) @ layer.qkv.T
        rows = rows if layer.qkv_bias is None else rows + layer.qkv_bias
        heads = rows.unflatten(1, (-1, spec.head_dim))
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return q, k, v

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.spec.rms_eps) * weight

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [rows, heads, D]"""
        half = self.spec.head_dim // 2
        frequencies = self.spec.rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions.double()[:, None, None] * frequencies
        low, high = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def sequence(self, token_ids: Sequence[int]) -> Computed:
        """One plain causal sequence."""
        count = len(token_ids)
        return self.compute(token_ids, torch.arange(count), torch.ones(count, count, dtype=torch.bool).tril())

    def block(self, variants: Sequence[TokenIds], token_ids: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
        """K (before RoPE) and V of a block after each of `variants`, averaged: its canonical KV."""
        runs = [self.sequence((*before, *token_ids)) for before in variants]
        parts = [(run.k[:, -len(token_ids) :], run.v[:, -len(token_ids) :]) for run in runs]
        return torch.stack([k for k, _ in parts]).mean(0), torch.stack([v for _, v in parts]).mean(0)

    def scores(
        self, prompt: Prompt, plan: Plan | None = None, contexts: dict[int, Sequence[TokenIds]] | None = None
    ) -> list[float]:
        """What the engine should answer. `plan`: which tokens are read from blocks; contexts: per block of the prompt,
        the tokens before it when its KV was computed."""
        dense = self.dense(prompt)
        reused = [piece for piece in plan.pieces if piece.key is not None] if plan else []
        k, v = self.cached(prompt, {piece.block for piece in reused}, contexts or {})
        given = torch.zeros(len(dense.places), dtype=torch.bool)
        for piece in reused:
            given[dense.row(piece.block, piece.start) : dense.row(piece.block, piece.stop - 1) + 1] = True
        hidden = self.compute(dense.token_ids, dense.positions, dense.mask, given, k, v).hidden
        return self.read(prompt, self.logits(prompt, dense, hidden))

    def dense(self, prompt: Prompt) -> Dense:
        places = [(b, o) for b, block in enumerate(prompt.blocks) for o in range(len(block))]
        token_ids = [prompt.blocks[b].token_ids[o] for b, o in places]
        positions = torch.tensor([prompt.blocks[b].base + o for b, o in places])
        block, offset = torch.tensor(places).T
        sees = torch.from_numpy(prompt.sees)[block][:, block]
        return Dense(
            places, token_ids, positions, torch.where(block[:, None] == block, offset <= offset[:, None], sees)
        )

    def cached(
        self, prompt: Prompt, blocks: set[int], contexts: dict[int, Sequence[TokenIds]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K (before RoPE) and V [layers, rows, KV, D] of `blocks` as they are cached, zeros elsewhere."""
        k, v = [], []
        for index, block in enumerate(prompt.blocks):
            shape = (self.spec.num_layers, len(block), self.spec.num_kv_heads, self.spec.head_dim)
            nothing = torch.zeros(shape, dtype=torch.float64)
            block_k, block_v = self.block(contexts[index], block.token_ids) if index in blocks else (nothing, nothing)
            k.append(block_k)
            v.append(block_v)
        return torch.cat(k, dim=1), torch.cat(v, dim=1)

    def logits(self, prompt: Prompt, dense: Dense, hidden: torch.Tensor) -> list[torch.Tensor]:
        """What each of the prompt's reads sees; [vocab] each."""
        return [hidden[dense.row(read.block, read.offset)] @ self.weights.lm_head.T for read in prompt.reads]

    def read(self, prompt: Prompt, logits: list[torch.Tensor]) -> list[float]:
        """logits [reads, vocab]"""
        if prompt.options.readout == "label":
            return self._read_labels(prompt, logits)
        per_slot: list[list[float]] = [[] for _ in range(prompt.num_candidates)]
        for read, row in zip(prompt.reads, logits, strict=True):
            assert read.slot is not None
            if prompt.options.readout == "pointwise":
                yes, *no = (row[token] for token in read.token_ids)
                per_slot[read.slot].append(float(yes - torch.logsumexp(torch.stack(no), 0)))
            else:
                per_slot[read.slot].append(float(torch.log_softmax(row, 0)[read.token_ids[0]]))
        return [sum(values) / len(values) for values in per_slot]

    def _read_labels(self, prompt: Prompt, logits: list[torch.Tensor]) -> list[float]:
        """log p(label) = Σ log p(token | the tokens before it, among those that some label continues with)."""
        nodes: dict[TokenIds, dict[int, float]] = {}
        for read, row in zip(prompt.reads, logits, strict=True):
            prefix = self._prefix(prompt, read.block)
            follow = {label[len(prefix)] for label in prompt.label_ids if label[: len(prefix)] == prefix}
            assert follow == set(read.token_ids)
            log_probs = torch.log_softmax(row[list(read.token_ids)], 0).tolist()
            nodes[prefix] = dict(zip(read.token_ids, log_probs, strict=True))
        return [sum(nodes[label[:i]][label[i]] for i in range(len(label))) for label in prompt.label_ids]

    def _prefix(self, prompt: Prompt, block: int) -> TokenIds:
        """The label's tokens up to a branch block: those of the branches that it sees, and its own."""
        question = max(i for i, b in enumerate(prompt.blocks) if b.kind == "question")
        path = [i for i in range(question + 1, block) if prompt.sees[block, i]]
        path += [block] if block > question else []
        return tuple(token for i in path for token in prompt.blocks[i].token_ids)
