"""A pass that was launched: who is in it, what it reads of the pool, and the answers that wait for the device.

Knows nothing of queues. Invariant: what a pass reads is held until its answers are there, or it has failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from rcllm.engine.job import Answer, OnePass, Ticket
from rcllm.metrics import Stopwatch
from rcllm.schedule.cost import Demand


@dataclass(slots=True)
class Flight:
    """From its launch until its answers are given."""

    entering: Sequence[Ticket]
    running: Sequence[Ticket]
    watch: Stopwatch
    start_s: float
    away_s: float  # of its clock, when it began
    holding: ExitStack = field(default_factory=ExitStack)  # what it reads
    asked: Demand = field(default_factory=Demand)
    answers: Iterable[Answer] = ()  # those of requests that end with it; taking them waits for the device
    kv_bytes: int = 0  # that its prompts read
    _mark: Any = None  # on a device that computes beside the host: behind the layers

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        return (*self.entering, *self.running)

    @property
    def may_wait(self) -> bool:
        """Whether the next pass needs nothing of what this one gives."""
        return not self.running and all(isinstance(ticket.job, OnePass) for ticket in self.entering)

    @property
    def has_ended(self) -> bool:
        """Whether the device has computed its layers, as it has where anybody waited for what they give."""
        return self._mark is None or bool(self._mark.query())

    def launched(self, device: torch.device) -> None:
        """Its layers are launched."""
        if device.type == "cuda":
            self._mark = torch.cuda.Event()
            self._mark.record()

    def failed(self, error: BaseException) -> None:
        """Everybody in it is told of the error."""
        self.answers, self.asked = [Answer(ticket.number, error) for ticket in self.tickets], Demand()
