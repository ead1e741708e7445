"""Score: how likely some label tokens are after a query and each of its items, in one pass.

The items of one query go through the layers together and do not see each other. Knows nothing of templates. Invariant:
the figures of an item depend on the query and on itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from rcllm.core.ranking import RankOptions
from rcllm.core.receipts import Receipt
from rcllm.core.texts import ScoreRequest, ScoreResponse
from rcllm.decode.finite import not_numbers
from rcllm.engine.engine import Engine
from rcllm.engine.job import Answer, Entered, OnePass, Opening
from rcllm.errors import ModelError
from rcllm.metrics import Stage
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
        for each in entered:
            with stage("readout"):
                outcome = self._outcome(each)
            yield Answer(each.ticket.number, outcome)

    def _outcome(self, entered: Entered) -> ScoreResponse | ModelError:
        decoder, request = self._engine.decoder, entered.ticket.request
        rows = torch.from_numpy(entered.read_rows).to(decoder.device)
        labels = torch.tensor(request.label_ids, device=decoder.device)
        found: list[list[float]] = []
        with torch.inference_mode():
            for start in range(0, len(rows), _ROWS):
                logits = decoder.logits(entered.hidden[rows[start : start + _ROWS]]).double()
                found += (logits[:, labels] - torch.logsumexp(logits, dim=-1, keepdim=True)).tolist()
        if not all(math.isfinite(value) for values in found for value in values):
            return not_numbers()
        return ScoreResponse(request.request_id, tuple(map(tuple, found)), Receipt(**entered.shared))
