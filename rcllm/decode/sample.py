"""From logits to tokens: the likeliest, or a draw.

Knows nothing of sequences or batches. Invariant: a row's result depends on that row alone (its logits, its
temperature, its nucleus, its uniform number), and a uniform number on a request's seed and a place in its answer alone.
Elsewhere than on the CPU nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.model.upload import is_near, upload

_LIKELY = 1e-3  # of the likeliest token's probability: the tokens above it hold most nuclei
_COLDEST = torch.finfo(torch.float32).tiny  # the least number that a GPU does not take for 0


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn."""

    temperature: float  # above 0; so low that fp32 has no such number: the likeliest token
    top_p: float  # above 0; 1: from the whole vocabulary
    uniform: float  # in [0, 1)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one place of one answer (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def drawn(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token per row, by the inverse of its cumulative distribution; logits fp32 [rows, vocab] -> int64 [rows].

    The same uniform number and logits give the same token, so that a draw is repeatable, alone or in any batch.
    """
    table = np.array([(draw.temperature, draw.top_p, draw.uniform) for draw in draws])
    temperature, top_p, uniforms = upload(table, logits.device).unbind(1)
    below = logits - logits.amax(dim=-1, keepdim=True)  # at most 0, so that no quotient overflows upwards
    probabilities = torch.softmax(below / temperature.float().clamp(min=_COLDEST)[:, None], dim=-1)
    token_ids = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    whole, parts = np.flatnonzero(table[:, 1] >= 1.0), np.flatnonzero(table[:, 1] < 1.0)
    if len(whole):
        rows = upload(whole, logits.device)
        token_ids[rows] = _inverse(probabilities[rows].double().cumsum(-1), uniforms[rows])
    if len(parts):
        rows = upload(parts, logits.device)
        from_nuclei = from_nuclei_by_look if is_near(logits.device) else from_nuclei_unseen
        token_ids[rows] = from_nuclei(probabilities[rows], top_p[rows], uniforms[rows])
    return token_ids


def from_nuclei_by_look(probabilities: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws from the smallest set of tokens whose mass reaches `top_p`; [rows, vocab], [rows], [rows] -> [rows].

    Sorts the likely tokens alone, for to sort all would take milliseconds on a CPU.
    """
    rows = zip(probabilities, top_p.tolist(), uniforms, strict=True)
    return torch.stack([_from_nucleus(*row) for row in rows])


def _from_nucleus(probabilities: torch.Tensor, top_p: float, number: torch.Tensor) -> torch.Tensor:
    """probabilities [vocab], number [] -> []."""
    likely = torch.nonzero(probabilities >= _LIKELY * probabilities.max())[:, 0]
    if float(probabilities[likely].sum()) < top_p:
        likely = torch.arange(len(probabilities), device=probabilities.device)
    each, order = probabilities[likely].sort(descending=True, stable=True)
    mass = each.double().cumsum(-1)
    size = int((mass - each < top_p).sum())  # a token belongs to it where the mass before it does not reach top_p yet
    return likely[order[_inverse(mass[None, :size], number[None])[0]]]


def from_nuclei_unseen(probabilities: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The same by steps whose shapes depend on no value: all tokens are sorted."""
    each, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass = each.double().cumsum(-1)
    sizes = (mass - each < top_p[:, None]).sum(-1, keepdim=True)
    place = _inverse(mass, uniforms, mass.gather(1, sizes - 1))
    return order.gather(1, place[:, None])[:, 0]


def _inverse(mass: torch.Tensor, uniforms: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """Where each row's cumulative `mass` first exceeds its share `uniforms` of the total, by default all; [rows]."""
    total = mass[:, -1:] if total is None else total  # [rows, 1]
    # u · total may round up to total itself
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True)[:, 0]
