"""The read-outs: scores of candidates from the hidden states that a prompt asked for. No decoding.

All that a batch asks is launched before the host waits, once, for what it gives. Knows nothing of caches. Invariant:
the scores of a prompt depend on its own reads alone, so a batch cannot change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from rcllm.core.ranking import IntArray, Prompt, Readout, Scores, TokenIds
from rcllm.model.decoder import Decoder
from rcllm.model.upload import download, upload
from rcllm.prompt.labels import choices

_ROWS = 128  # rows of logits over the whole vocabulary at a time: 25 MB at 49,152 tokens in fp32


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt that has been through the layers."""

    prompt: Prompt
    rows: IntArray  # [reads], which of the hidden states each of its reads is of


@dataclass(frozen=True, slots=True)
class Launched:
    """What some prompts of one read-out come to, on its way."""

    values: torch.Tensor  # [n], fp32, on the device
    scores: Callable[[torch.Tensor], list[Scores]]  # of each prompt, from these values on the host


Among = dict[TokenIds, Iterator[list[float]]]  # by what is compared, the figures of one read after the other


def score(decoder: Decoder, hidden: torch.Tensor, asked: Asked) -> Scores:
    """hidden [wanted, d], after the final norm."""
    return launch(decoder, hidden, [asked])()[0]


@torch.inference_mode()
def launch(decoder: Decoder, hidden: torch.Tensor, batch: Sequence[Asked]) -> Callable[[], list[Scores]]:
    """Has the device compute what the scores of a batch need; what this returns waits for it, and gives the scores."""
    kinds: dict[Readout, list[int]] = {}
    for number, asked in enumerate(batch):
        kinds.setdefault(asked.prompt.options.readout, []).append(number)
    numbers = [number for some in kinds.values() for number in some]
    parts = [_READOUTS[kind](decoder, hidden, [batch[i] for i in some]) for kind, some in kinds.items()]
    values = download(torch.cat([part.values for part in parts]))

    def scores() -> list[Scores]:
        here = values().split([len(part.values) for part in parts])
        found = [scores for part, some in zip(parts, here, strict=True) for scores in part.scores(some)]
        return [scores for _, scores in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])]

    return scores


def _label(decoder: Decoder, hidden: torch.Tensor, batch: Sequence[Asked]) -> Launched:
    """Log-probability of each candidate's label among the labels, by the chain rule along the trie of their tokens."""

    def log_probs(logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits, dim=-1)

    def scores(prompt: Prompt, among: Among) -> Scores:
        found: dict[TokenIds, float] = {}
        for choice, read in zip(choices(prompt.label_ids), prompt.reads, strict=True):
            before, values = found.get(choice.prefix, 0.0), next(among[read.token_ids])
            for token, value in zip(read.token_ids, values, strict=True):
                found[*choice.prefix, token] = before + value
        return np.array([found[label] for label in prompt.label_ids])

    return _compared(decoder, hidden, batch, log_probs, scores)


def _pointwise(decoder: Decoder, hidden: torch.Tensor, batch: Sequence[Asked]) -> Launched:
    """Logit of the answer for the item, minus the (log-sum-exp of the) logits of the answers against it."""

    def differences(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :1] - torch.logsumexp(logits[:, 1:], dim=-1, keepdim=True)

    def scores(prompt: Prompt, among: Among) -> Scores:
        return np.array([next(among[read.token_ids])[0] for read in prompt.reads])

    return _compared(decoder, hidden, batch, differences, scores)


def _compared(
    decoder: Decoder,
    hidden: torch.Tensor,
    batch: Sequence[Asked],
    figures: Callable[[torch.Tensor], torch.Tensor],
    scores: Callable[[Prompt, Among], Scores],
) -> Launched:
    """Logits of each read's own tokens alone; those of one prompt that are asked for the same tokens are one product.

    figures: of logits in fp64, [n, tokens] -> [n, any].
    """
    rows: dict[TokenIds, dict[int, list[int]]] = {}  # by what is compared, of each prompt that asks for it
    for number, asked in enumerate(batch):
        for read, row in zip(asked.prompt.reads, asked.rows.tolist(), strict=True):
            rows.setdefault(read.token_ids, {}).setdefault(number, []).append(row)
    lists = [numbers for token_ids, by_prompt in rows.items() for numbers in (token_ids, *by_prompt.values())]
    sent = iter(upload(np.concatenate(lists), decoder.device).split([len(each) for each in lists]))
    logits = list[torch.Tensor]()
    for by_prompt in rows.values():
        columns = next(sent)
        logits += [decoder.logits(hidden[some], columns).view(-1) for some in islice(sent, len(by_prompt))]

    def scores_of(values: torch.Tensor) -> list[Scores]:
        sizes = [len(token_ids) * sum(map(len, by_prompt.values())) for token_ids, by_prompt in rows.items()]
        among = {
            token_ids: iter(figures(part.view(-1, len(token_ids))).tolist())
            for token_ids, part in zip(rows, values.double().split(sizes), strict=True)
        }
        return [scores(asked.prompt, among) for asked in batch]

    return Launched(torch.cat(logits), scores_of)


def _likelihood(decoder: Decoder, hidden: torch.Tensor, batch: Sequence[Asked]) -> Launched:
    """Mean log-probability of each candidate's tokens under the whole vocabulary."""
    tokens = np.array([read.token_ids[0] for asked in batch for read in asked.prompt.reads])
    distinct, where = np.unique(np.concatenate([asked.rows for asked in batch]), return_inverse=True)
    order = np.argsort(where, kind="stable")  # all first tokens of a prompt share one row, so reads go row by row
    where, tokens = where[order], tokens[order]
    sent = upload(np.concatenate((distinct, where, tokens)).astype(np.int64), decoder.device)
    rows, local, wanted = sent.split([len(distinct), len(where), len(tokens)])
    picked = []
    for start in range(0, len(distinct), _ROWS):
        logits = decoder.logits(hidden[rows[start : start + _ROWS]])
        reads = slice(*np.searchsorted(where, (start, start + _ROWS)).tolist())
        at = local[reads] - start
        picked.append(logits[at, wanted[reads]] - torch.logsumexp(logits, dim=-1)[at])

    def scores_of(values: torch.Tensor) -> list[Scores]:
        per_read = np.empty(len(order))
        per_read[order] = values.numpy()
        ends = np.cumsum([len(asked.rows) for asked in batch])[:-1]
        return [_means(asked.prompt, own) for asked, own in zip(batch, np.split(per_read, ends), strict=True)]

    return Launched(torch.cat(picked), scores_of)


def _means(prompt: Prompt, log_probs: Scores) -> Scores:
    """log_probs [reads] -> [candidates]"""
    totals, counts = np.zeros(prompt.num_candidates), np.zeros(prompt.num_candidates)
    slots = np.array([read.slot for read in prompt.reads])
    np.add.at(totals, slots, log_probs)
    np.add.at(counts, slots, 1.0)
    return totals / counts


_READOUTS = {"label": _label, "pointwise": _pointwise, "likelihood": _likelihood}
