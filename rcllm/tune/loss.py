"""The listwise ranking loss on the product's own read-outs, differentiable.

Invariant: the scores are those that `decode/rank.py` reads from the same hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rcllm.core.ranking import Prompt, TokenIds
from rcllm.prompt.labels import choices

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # hidden [n, d], token ids [k] -> [n, k]


def listwise_loss(scores: torch.Tensor, positive: int) -> torch.Tensor:
    """-log softmax(scores)[positive]: ListNet's top-one loss with one relevant candidate (Cao et al. 2007, eq. 5)."""
    return -torch.log_softmax(scores, dim=0)[positive]


def distillation_loss(scores: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(scores / T)) over the candidates; Hinton et al. 2015, arXiv 1503.02531."""
    ours, theirs = (torch.log_softmax(each / temperature, dim=0) for each in (scores, teacher))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum()


def readout_scores(prompt: Prompt, hidden: torch.Tensor, logits: Logits) -> torch.Tensor:
    """hidden [reads, d]: one row per read of the prompt, in order. -> [candidates]"""
    if prompt.options.readout == "pointwise":
        answers = logits(hidden, _ids(prompt.reads[0].token_ids, hidden))
        return answers[:, 0] - torch.logsumexp(answers[:, 1:], dim=-1)
    log_probs: dict[TokenIds, torch.Tensor] = {(): hidden.new_zeros(())}
    for choice, read, row in zip(choices(prompt.label_ids), prompt.reads, hidden, strict=True):
        among = torch.log_softmax(logits(row[None], _ids(read.token_ids, hidden))[0], dim=0)
        for token, value in zip(read.token_ids, among, strict=True):
            log_probs[(*choice.prefix, token)] = log_probs[choice.prefix] + value
    return torch.stack([log_probs[label] for label in prompt.label_ids])


def _ids(token_ids: TokenIds, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, device=like.device)
