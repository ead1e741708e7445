"""What the loop and its jobs say to each other.

A job is a kind of request: rank, recommend or generate. It says what prompt a request opens, what its next pass is, and
what it takes from the rows of a pass; everything else is the loop's. Invariant: an answer is a response or an error of
one request, and a request gets one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from rcllm.cache.held import Held
from rcllm.cache.lookup import Lookup
from rcllm.core.ranking import IntArray, Prompt
from rcllm.core.receipts import Step
from rcllm.engine.demand import Demands
from rcllm.errors import RcllmError
from rcllm.metrics import Stage
from rcllm.model.attend.segments import Segment
from rcllm.model.decoder import Pass, Passed
from rcllm.reuse.plan import Planned
from rcllm.schedule.work import DEFAULT_TERMS, KindLimits, Terms

Request = TypeVar("Request", contravariant=True)
Response = TypeVar("Response", covariant=True)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a request asks the loop for, before anything is computed."""

    prompt: Prompt
    step_rows: int = 0  # of each later pass; 0: the answer is read from the prompt's own pass
    own_bytes: int = 0  # of KV that it keeps while it runs
    degraded: tuple[Step, ...] = ()  # what was given up to keep its deadline
    guard: str = ""  # what the guard of its admission knows

    @property
    def goes_on(self) -> bool:
        """Whether decoding continues the prompt, so that all of its KV is wanted."""
        return self.step_rows > 0


class Listener(Protocol):
    """Told of one request, in the thread that computes: it must return at once and raise nothing."""

    def tokens(self, token_ids: Sequence[int]) -> None:
        """The answer goes on with these."""

    def done(self, outcome: object) -> None:
        """The response or the exception; the last call."""


@dataclass(slots=True)
class Ticket:
    """One request on its way. Whoever submitted it runs the loop until it is done, or listens."""

    number: int
    job: Job[Any, Any]
    request: Any
    submitted_s: float
    opening: Opening
    lookup: Lookup  # where its blocks were when it was submitted
    planned: Planned  # by that look-up
    stage_ms: dict[str, float]  # of the passes that it took part in, too; those of its receipt
    demands: Demands  # what it asks of the device, by that look-up
    terms: Terms = DEFAULT_TERMS
    catalogue_version: int = 0  # of the items that its prompt reads
    listener: Listener | None = None
    outcome: object = None  # a response or an exception; None: not yet

    @property
    def tenant(self) -> str:
        """Whose request it is, for sharing the device."""
        return str(self.request.tenant)

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def end(self, outcome: object) -> None:
        """Gives it its response, or its exception."""
        self.outcome = outcome
        if self.listener is not None:
            self.listener.done(outcome)

    def add(self, stage_ms: Mapping[str, float]) -> None:
        """Adds the stages of a pass."""
        for stage, ms in stage_ms.items():
            self.stage_ms[stage] = self.stage_ms.get(stage, 0.0) + ms


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that entered no queue: it is wrong, or there is no time for it."""

    request: Any
    outcome: RcllmError

    @property
    def done(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Entered:
    """A request whose prompt has been through the layers."""

    ticket: Ticket
    planned: Planned
    hidden: torch.Tensor  # [wanted of the batch, d], after the final norm
    read_rows: IntArray  # [reads of the prompt], rows of `hidden`
    segments: tuple[Segment, ...]  # all tokens of a prompt that goes on; `block` is the number of the segment
    shared: Mapping[str, Any]  # what a receipt says whatever the job: the fields of core.receipts.Receipt
    held: Held  # what its batch reads of the pool, in place during the call
    kv_bytes_read: int
    kv_bytes_copied: int  # by the whole batch

    @property
    def end(self) -> int:
        """Position of the next token."""
        return max(block.base + len(block) for block in self.planned.prompt.blocks)

    @property
    def last(self) -> torch.Tensor:
        """[d], the hidden state of the last token of an open prompt."""
        return self.hidden[int(self.read_rows[0])]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. The times in a response's receipt are its ticket's, which the loop completes."""

    number: int
    outcome: Any  # a response, which has a receipt, or an exception


class Job(Protocol[Request, Response]):
    """One kind of request on one engine. All but `open` are called by one thread at a time, between passes.

    `enter` and `take` return the answers that are complete. An error that they raise is that of every request in the
    pass; an error of one request is an answer.
    """

    kind: str  # names it to the scheduler
    limits: KindLimits

    def open(self, request: Request) -> Opening:
        """Checks a request. Called by any thread; computes and changes nothing. Raises RcllmError."""

    def enter(self, entered: Sequence[Entered], stage: Stage) -> Iterable[Answer]:
        """Takes over requests whose prompts were computed; their rows and segments are there until the answers are.

        What it asks of the device is launched in the call, and the answers wait for it: other passes may be launched
        in between, where all in this one end with it.
        """

    def passes(self, stage: Stage) -> Sequence[Pass]:
        """The next pass of everything that runs, in parts that need not know of each other."""

    def take(self, passed: Sequence[Passed], stage: Stage) -> Iterable[Answer]:
        """What the rows of these passes decide."""

    def drop(self, number: int) -> None:
        """Forgets a request that was cancelled or failed, if it runs."""


class OnePass:
    """What jobs share whose requests end with the pass of their prompt: nothing of them runs on."""

    def passes(self, stage: Stage) -> Sequence[Pass]:
        return ()

    def take(self, passed: Sequence[Passed], stage: Stage) -> Iterable[Answer]:
        return ()

    def drop(self, number: int) -> None:
        pass
