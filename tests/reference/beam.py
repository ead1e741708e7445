"""Beam search the slow way: every candidate scored and sorted in fp64, and Hugging Face's own.

Knows nothing of tries, buffers or early termination: valid sequences are rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Codes = tuple[int, ...]
LogProbs = Callable[[Codes], npt.NDArray[np.float64]]  # after the prompt and these codes' tokens, over the vocabulary
_DEAD = -1e8  # Hugging Face fills up what it lacks with beams of -1e9


@dataclass(frozen=True)
class Sequences:
    """What a search ended with, best first."""

    codes: list[Codes]
    scores: list[float]
    margin: float  # the least difference of scores that the result and its order hang on


def slow_beam(
    log_probs: LogProbs, valid: Sequence[Codes], tokens: Sequence[npt.NDArray[np.int32]], beam: int, rule: str
) -> Sequences:
    """Keeps the `beam` best of all valid extensions at each level; equal scores in the order of codes."""
    beams: list[tuple[float, Codes]] = [(0.0, ())]
    margin = math.inf
    for level in range(len(tokens)):
        candidates: list[tuple[float, Codes]] = []
        for score, codes in beams:
            children = sorted({row[level] for row in valid if row[:level] == codes})
            given = log_probs(codes)[tokens[level][children]]
            if rule == "renormalise":
                given = given - np.logaddexp.reduce(given)
            candidates += [(score + float(each), (*codes, child)) for child, each in zip(children, given, strict=True)]
        candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        last = level == len(tokens) - 1
        ordered = [score for score, _ in candidates]
        matter = range(beam) if last else [beam - 1]
        margin = min([margin, *(ordered[i] - ordered[i + 1] for i in matter if i + 1 < len(ordered))])
        beams = sorted(candidates[:beam], key=lambda candidate: candidate[1])
    beams.sort(key=lambda candidate: (-candidate[0], candidate[1]))
    return Sequences([codes for _, codes in beams], [score for score, _ in beams], margin)


def model_log_probs(model: Any, prompt: Sequence[int], tokens: Sequence[npt.NDArray[np.int32]]) -> LogProbs:
    """From a transformers model, a whole forward for every prefix."""

    def log_probs(codes: Codes) -> npt.NDArray[np.float64]:
        ids = [*prompt, *(int(tokens[level][code]) for level, code in enumerate(codes))]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return np.asarray(torch.log_softmax(logits.double(), -1).numpy())

    return log_probs


def hugging_face_beam(
    model: Any, prompt: Sequence[int], valid: Sequence[Codes], tokens: Sequence[npt.NDArray[np.int32]], beam: int
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Token ids and summed log-probabilities of `generate` under `prefix_allowed_tokens_fn`, less what it made up."""
    allowed: dict[tuple[int, ...], set[int]] = {}
    for row in valid:
        ids = tuple(int(tokens[level][code]) for level, code in enumerate(row))
        for level in range(len(ids)):
            allowed.setdefault(ids[:level], set()).add(ids[level])
    lists = {prefix: sorted(ids) for prefix, ids in allowed.items()}
    output = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),  # else padding tokens in the prompt are masked
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=len(tokens),
        do_sample=False,
        length_penalty=0.0,
        early_stopping="never",
        eos_token_id=None,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda _, ids: lists[tuple(ids[len(prompt) :].tolist())],
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    sequences = output.sequences[:, len(prompt) :].tolist()
    if beam == 1:  # which it searches greedily, and scores not at all
        steps = zip(output.logits, sequences[0], strict=True)
        scores = [sum(float(torch.log_softmax(logits[0].float(), -1)[token]) for logits, token in steps)]
    else:
        scores = output.sequences_scores.tolist()
    real = [(tuple(ids), score) for ids, score in zip(sequences, scores, strict=True) if score > _DEAD]
    return [ids for ids, _ in real], [score for _, score in real]
