"""A job that ends where decoding would begin: tests look at what the loop hands over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rcllm.core.decoding import OpenRequest
from rcllm.core.ranking import Prompt, RankRequest
from rcllm.core.receipts import Receipt
from rcllm.engine.engine import Engine
from rcllm.engine.job import Answer, Entered, OnePass, Opening
from rcllm.engine.jobs.rank import Rank
from rcllm.errors import answered
from rcllm.metrics import Stage
from rcllm.schedule.work import KindLimits


@dataclass(frozen=True)
class Opened:
    """What a job would go on from; its segments outlive the pool's blocks."""

    entered: Entered
    receipt: Receipt


class Opener(OnePass):
    kind = "open"
    limits = KindLimits()

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def open(self, request: OpenRequest) -> Opening:
        return Opening(self._engine.prompter.build_open(request), step_rows=1)

    def enter(self, entered: Sequence[Entered], stage: Stage) -> Iterator[Answer]:
        for each in entered:
            yield Answer(each.ticket.number, Opened(each, Receipt(**each.shared)))


def opened(engine: Engine, requests: Sequence[OpenRequest]) -> list[Entered]:
    """The prompts of requests, computed together."""
    return [each.entered for each in answered(engine.run(Opener(engine), requests))]


class RankPrompt(Rank):
    """Ranks a prompt that was made otherwise than from its request."""

    def __init__(self, engine: Engine, prompt: Prompt) -> None:
        super().__init__(engine.config, engine.decoder, engine.prompter, engine._prefill, engine.admission)
        self._prompt = prompt

    def open(self, request: RankRequest) -> Opening:
        return Opening(self._prompt)
