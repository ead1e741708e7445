"""The read-outs: scores of candidates from the hidden states that a prompt asked for. No decoding.

Knows nothing of caches. Invariant: the scores of a prompt depend on its own reads alone, so a batch cannot change them.
"""

from __future__ import annotations

import numpy as np
import torch

from rcllm.core.ranking import IntArray, Prompt, Scores
from rcllm.model.decoder import Decoder
from rcllm.prompt.labels import choices

_ROWS = 128  # rows of logits over the whole vocabulary at a time: 25 MB at 49,152 tokens in fp32


@torch.inference_mode()
def score(decoder: Decoder, prompt: Prompt, hidden: torch.Tensor, rows: IntArray) -> Scores:
    """hidden [wanted, d] after the final norm; rows [reads]: the wanted row of each of the prompt's reads."""
    return _READOUTS[prompt.options.readout](decoder, prompt, hidden, rows)


def _label(decoder: Decoder, prompt: Prompt, hidden: torch.Tensor, rows: IntArray) -> Scores:
    """Log-probability of each candidate's label among the labels, by the chain rule along the trie of their tokens."""
    counts = [len(read.token_ids) for read in prompt.reads]
    columns = torch.tensor([token for read in prompt.reads for token in read.token_ids], device=decoder.device)
    among = [
        torch.log_softmax(decoder.logits(hidden[row : row + 1], some)[0].double(), dim=-1)
        for row, some in zip(rows, columns.split(counts), strict=True)
    ]
    values = iter(torch.cat(among).tolist())  # the host waits for the device once
    log_probs: dict[tuple[int, ...], float] = {}
    for choice, read in zip(choices(prompt.label_ids), prompt.reads, strict=True):
        before = log_probs.get(choice.prefix, 0.0)
        log_probs |= {(*choice.prefix, token): before + next(values) for token in read.token_ids}
    return np.array([log_probs[label] for label in prompt.label_ids])


def _pointwise(decoder: Decoder, prompt: Prompt, hidden: torch.Tensor, rows: IntArray) -> Scores:
    """Logit of the answer for the item, minus the (log-sum-exp of the) logits of the answers against it."""
    columns = torch.tensor(prompt.reads[0].token_ids, device=decoder.device)
    logits = decoder.logits(hidden[torch.from_numpy(rows).to(decoder.device)], columns).double()
    return (logits[:, 0] - torch.logsumexp(logits[:, 1:], dim=-1)).cpu().numpy()


def _likelihood(decoder: Decoder, prompt: Prompt, hidden: torch.Tensor, rows: IntArray) -> Scores:
    """Mean log-probability of each candidate's tokens under the whole vocabulary."""
    wanted = torch.tensor([read.token_ids[0] for read in prompt.reads], device=decoder.device)
    distinct, where = np.unique(rows, return_inverse=True)  # all candidates' first tokens share one row
    per_read = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(distinct), _ROWS):
        some = torch.from_numpy(distinct[start : start + _ROWS]).to(decoder.device)
        logits = decoder.logits(hidden[some])
        normaliser = torch.logsumexp(logits, dim=-1)
        reads = np.flatnonzero((where >= start) & (where < start + _ROWS))
        local = torch.from_numpy(where[reads] - start).to(decoder.device)
        picked = logits[local, wanted[torch.from_numpy(reads).to(decoder.device)]] - normaliser[local]
        per_read[torch.from_numpy(reads)] = picked.double().cpu()
    totals, counts = np.zeros(prompt.num_candidates), np.zeros(prompt.num_candidates)
    slots = np.array([read.slot for read in prompt.reads])
    np.add.at(totals, slots, per_read.numpy())
    np.add.at(counts, slots, 1.0)
    return totals / counts


_READOUTS = {"label": _label, "pointwise": _pointwise, "likelihood": _likelihood}
