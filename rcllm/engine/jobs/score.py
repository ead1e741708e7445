"""Score: how likely some label tokens are after a query and each of its items, in one pass.

The items of one query go through the layers together and do not see each other. Knows nothing of templates. Invariant:
the figures of an item depend on the query and on itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from rcllm.core.ranking import RankOptions
from rcllm.core.receipts import Receipt
from rcllm.core.texts import ScoreRequest, ScoreResponse
from rcllm.decode.finite import not_numbers
from rcllm.engine.engine import Engine
from rcllm.engine.job import Answer, Entered, OnePass, Opening
from rcllm.errors import ModelError
from rcllm.metrics import Stage
from rcllm.model.upload import download, upload
from rcllm.prompt.plain import score_prompt
from rcllm.schedule.work import KindLimits

_ROWS = 128  # rows of logits over the whole vocabulary at a time


class Score(OnePass):
    """The job of SGLang's and vLLM's `/v1/score`."""

    kind = "score"
    limits = KindLimits()

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def open(self, request: ScoreRequest) -> Opening:
        """Raises RequestError, ConfigError; UncalibratedError for a level that a calibration does not allow."""
        prompt = score_prompt(self._engine.prompter, request)
        if request.level is not None:
            self._engine.admission.admit(RankOptions(level=request.level, readout="pointwise"))
        return Opening(prompt)

    def enter(self, entered: Sequence[Entered], stage: Stage) -> Iterator[Answer]:
        with stage("readout"):
            figures = [self._launch(each) for each in entered]
        return self._answers(entered, figures, stage)

    @torch.inference_mode()
    def _launch(self, entered: Entered) -> Callable[[], torch.Tensor]:
        """Log-probabilities, [items, labels], once the device has computed them."""
        decoder, request = self._engine.decoder, entered.ticket.request
        numbers = upload(np.array([*entered.read_rows, *request.label_ids], dtype=np.int64), decoder.device)
        rows, labels = numbers.split([len(entered.read_rows), len(request.label_ids)])
        parts = []
        for some in rows.split(_ROWS):
            logits = decoder.logits(entered.hidden[some]).double()
            parts.append(logits[:, labels] - torch.logsumexp(logits, dim=-1, keepdim=True))
        return download(torch.cat(parts))

    def _answers(
        self, entered: Sequence[Entered], figures: Sequence[Callable[[], torch.Tensor]], stage: Stage
    ) -> Iterator[Answer]:
        with stage("readout"):
            here = [each().tolist() for each in figures]
        for each, found in zip(entered, here, strict=True):
            yield Answer(each.ticket.number, _outcome(each, found))


def _outcome(entered: Entered, found: list[list[float]]) -> ScoreResponse | ModelError:
    if not all(math.isfinite(value) for values in found for value in values):
        return not_numbers()
    request_id = entered.ticket.request.request_id
    return ScoreResponse(request_id, tuple(map(tuple, found)), Receipt(**entered.shared))
