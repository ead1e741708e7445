"""From logits to tokens: the likeliest, or a draw; and how likely given tokens are.

Knows nothing of sequences or batches. Invariant: a row's result depends on that row alone (its logits, its
temperature, its nucleus, its uniform number), and a uniform number on a request's seed and a place in its answer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.core.decoding import Speculation
from rcllm.decode.verify import Judged
from rcllm.drafts.draft import DraftTree

_LIKELY = 1e-3  # of the likeliest token's probability: the tokens above it hold most nuclei


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn."""

    temperature: float  # above 0
    top_p: float  # above 0; 1: from the whole vocabulary
    uniform: float  # in [0, 1)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one place of one answer (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


@torch.inference_mode()
def likeliest(logits: torch.Tensor) -> list[int]:
    """logits [rows, vocab] -> token ids [rows]."""
    ids: list[int] = logits.argmax(dim=-1).tolist()
    return ids


@torch.inference_mode()
def judge(logits: torch.Tensor, targets: Sequence[int], tree: DraftTree, rule: Speculation) -> Judged:
    """What relaxed verification needs to know of a tree under `rule`; logits fp32 [n + 1, vocab].

    targets [n + 1]: of `likeliest`. A pass over the vocabulary is taken only for tokens that may be accepted without
    being the likeliest: a token's probability is at most its ratio to that of the likeliest, which is known.
    """
    parents = torch.from_numpy(tree.parents).to(logits.device, torch.int64)
    tokens = torch.from_numpy(tree.token_ids).to(logits.device, torch.int64)
    best = torch.tensor(targets, device=logits.device)[parents]
    first = (tokens == best).cpu().numpy()
    own, most = logits[parents, tokens], logits[parents, best]  # [n]
    ranks = np.where(first, 0, rule.k).astype(np.int32)
    probabilities, most_probable = (np.full(len(tree), np.nan, np.float32) for _ in range(2))
    if len(likely := np.flatnonzero((torch.exp(own - most) > rule.p).cpu().numpy() & ~first)):
        nodes = torch.from_numpy(likely).to(logits.device)
        likelier = (logits[parents[nodes]] > own[nodes, None]).sum(dim=1).cpu().numpy()
        ranks[likely] = np.clip(likelier, 1, rule.k)  # of equally likely tokens one is the first
    if len(open_nodes := np.flatnonzero((ranks > 0) & (ranks < rule.k))):
        nodes = torch.from_numpy(open_nodes).to(logits.device)
        lse = torch.logsumexp(logits[parents[nodes]], dim=-1)
        probabilities[open_nodes] = torch.exp(own[nodes] - lse).cpu().numpy()
        most_probable[open_nodes] = torch.exp(most[nodes] - lse).cpu().numpy()
    return Judged(ranks, probabilities, most_probable)


@torch.inference_mode()
def drawn(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token per row, by the inverse of its cumulative distribution; logits fp32 [rows, vocab].

    The same uniform number and logits give the same token, so that a draw is repeatable, alone or in any batch.
    """
    device = logits.device
    temperature = torch.tensor([draw.temperature for draw in draws], device=device)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    uniforms = torch.tensor([draw.uniform for draw in draws], dtype=torch.float64, device=device)
    whole = [row for row, draw in enumerate(draws) if draw.top_p >= 1.0]
    parts = [row for row, draw in enumerate(draws) if draw.top_p < 1.0]
    token_ids = torch.empty(len(draws), dtype=torch.int64, device=device)
    if whole:
        token_ids[whole] = _inverse(probabilities[whole].double().cumsum(-1), uniforms[whole])
    for row in parts:
        token_ids[row] = _from_nucleus(probabilities[row], draws[row].top_p, uniforms[row])
    ids: list[int] = token_ids.tolist()
    return ids


def _from_nucleus(probabilities: torch.Tensor, top_p: float, number: torch.Tensor) -> torch.Tensor:
    """Draws from the smallest set of tokens whose mass reaches `top_p`; probabilities [vocab], number [] -> []."""
    likely = torch.nonzero(probabilities >= _LIKELY * probabilities.max())[:, 0]  # sorting all would take milliseconds
    if float(probabilities[likely].sum()) < top_p:
        likely = torch.arange(len(probabilities), device=probabilities.device)
    each, order = probabilities[likely].sort(descending=True, stable=True)
    mass = each.double().cumsum(-1)
    size = int((mass - each < top_p).sum())  # a token belongs to it where the mass before it does not reach top_p yet
    return likely[order[_inverse(mass[None, :size], number[None])[0]]]


def _inverse(mass: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Where each row's cumulative `mass` first exceeds its share `uniforms` of the total; [rows]."""
    total = mass[:, -1:]
    # u · total may round up to total itself
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True)[:, 0]
