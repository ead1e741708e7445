"""Recommends from the whole catalogue: prompts are opened together, searched together, and answered with receipts.

Knows nothing of how items got their semantic IDs, or of files. Invariant: a request sees one epoch of the catalogue
from its first step to its last, and every item of its answer was in that epoch and allowed; batches and what else runs
change the time alone. Safe to call from several threads.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.config import nearest
from rcllm.core.decoding import BeamRule, OpenRequest, RecommendReceipt, RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId, Prompt
from rcllm.decode.beam import BeamPrompt, BeamSearch, BeamTask, Found, items_of
from rcllm.decode.beam_kv import joined
from rcllm.engine.beam_schedule import Turns, run_overlapped
from rcllm.engine.engine import Engine
from rcllm.engine.opened import Opened, OpenedBatch
from rcllm.errors import ConfigError, PromptTooLongError, RequestError
from rcllm.metrics import BatchClock, Trace
from rcllm.model.decoder import Pass, Passed
from rcllm.schedule.batches import BeamLimits, Load, beam_batches

_LONG_LIST, _FILTERS = 1000, 16  # items that make a list long; filters that are remembered


class Recommender:
    """Beam search over a live catalogue of semantic IDs, on an engine whose template is for open prompts."""

    def __init__(
        self, engine: Engine, catalogue: LiveCodes, tokens: CodeTokens, limits: BeamLimits | None = None
    ) -> None:
        """`tokens`: which token of the model's vocabulary stands for which code. Raises ConfigError.

        Batches overlap where the device is not the host itself: on a CPU both would want the same cores
        (`benchmarks.beam`, part `overlap`).
        """
        self.engine, self.catalogue, self.tokens = engine, catalogue, tokens
        apart = engine.decoder.device.type != "cpu"
        self.limits = limits or BeamLimits(engine.config.cache.pass_tokens, num_overlapped=2 if apart else 1)
        _check_tokens(tokens, catalogue.epoch(), engine.decoder.spec.vocab_size)
        self._turns = Turns()
        self._filters = _Filters()
        self._searches: list[BeamSearch] = []  # with their buffers, while no batch uses them
        self._lock = threading.Lock()  # of that list

    def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """The best items for one request. Raises RequestError, ConfigError, CapacityError."""
        return self.recommend_batch([request])[0]

    def recommend_batch(
        self, requests: Sequence[RecommendRequest], trace: Trace | None = None
    ) -> list[RecommendResponse]:
        """Answers several requests, in batches within the limits that overlap. `trace` is told what ran when.

        Raises, before anything is computed, for the first request that is wrong.
        """
        asked = [self._asked(request) for request in requests]
        loads = [Load(each.prompt.num_tokens, _beam(each.request)) for each in asked]
        trace = trace or Trace()
        jobs = [
            partial(self._run, [asked[i] for i in part], number, trace)
            for number, part in enumerate(beam_batches(loads, self.limits))
        ]
        return [answer for answers in run_overlapped(jobs, self.limits.num_overlapped) for answer in answers]

    def _asked(self, request: RecommendRequest) -> _Asked:
        _check(request)
        start = time.perf_counter()
        prompt = self.engine.prompter.build_open(
            OpenRequest(request.request_id, request.history, request.user_id, request.level)
        )
        needed, limit = prompt.num_tokens + self.catalogue.epoch().num_levels - 1, self.engine.decoder.max_positions
        if needed > limit:
            raise PromptTooLongError(
                f"request {request.request_id!r} needs {needed} positions with its answer, the limit is {limit}: send "
                "fewer or shorter events"
            )
        return _Asked(request, prompt, (time.perf_counter() - start) * 1e3)

    def _run(self, asked: Sequence[_Asked], number: int, trace: Trace) -> list[RecommendResponse]:
        clock, code_index = BatchClock(number, trace), self.catalogue.epoch()
        with clock.stage("allow"):
            allowed = [self._filters.of(code_index, each.request) for each in asked]
        with self._open(asked, clock) as batch:
            with clock.stage("join"):
                prompts = [self._prompt(each) for each in batch.prompts]
            tasks = [
                BeamTask(prompt, code_index, some, _beam(each.request), each.request.rule)
                for prompt, some, each in zip(prompts, allowed, asked, strict=True)
            ]
            with self._searching() as search:
                found = search.search(tasks, partial(self._forward, clock), clock.stage)
        with clock.stage("items"):
            best = [
                items_of(code_index, task.allowed, some, each.request.n)
                for task, some, each in zip(tasks, found, asked, strict=True)
            ]
        stage_ms = {"prompt": sum(each.prompt_ms for each in asked), **clock.read_ms()}
        facts = _Facts(self.engine.model_id, batch, code_index.epoch, stage_ms)
        return [
            RecommendResponse(each.request.request_id, *some, _receipt(each.request, opened, task, leaves, facts))
            for each, opened, task, leaves, some in zip(asked, batch.prompts, tasks, found, best, strict=True)
        ]

    @contextmanager
    def _open(self, asked: Sequence[_Asked], clock: BatchClock) -> Iterator[OpenedBatch]:
        """What the prompts read stays in place; the device is free for others meanwhile."""
        with ExitStack() as stack:
            with self._turns.take(clock, "prefill"):
                batch = stack.enter_context(self.engine.open([each.prompt for each in asked]))
            yield batch

    def _forward(self, clock: BatchClock, work: Pass) -> Passed:
        with self._turns.take(clock, "step"):
            return self.engine.forward(work)

    def _prompt(self, opened: Opened) -> BeamPrompt:
        decoder = self.engine.decoder
        return BeamPrompt(joined(opened.segments, decoder.rope, decoder.dtype), opened.end, opened.hidden)

    @contextmanager
    def _searching(self) -> Iterator[BeamSearch]:
        """A search whose buffer nobody else uses."""
        with self._lock:
            found = self._searches.pop() if self._searches else None
        found = found or BeamSearch(self.engine.decoder, self.tokens, self.limits.beam_rows)
        try:
            yield found
        finally:
            with self._lock:
                self._searches.append(found)


class _Filters:
    """What requests are allowed, remembered for long lists, such as the stock of a region, that many of them share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._code_index: CodeIndex | None = None  # the epoch of those that are remembered
        self._known: dict[tuple[tuple[ItemId, ...] | None, tuple[ItemId, ...]], Allowed | None] = {}

    def of(self, code_index: CodeIndex, request: RecommendRequest) -> Allowed | None:
        key = request.allow, request.deny
        if len(request.allow or ()) + len(request.deny) < _LONG_LIST:
            return code_index.allowed(*key)
        with self._lock:
            if self._code_index is not code_index or len(self._known) == _FILTERS:
                self._code_index, self._known = code_index, {}
            if key not in self._known:
                self._known[key] = code_index.allowed(*key)
            return self._known[key]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that was checked, and its prompt."""

    request: RecommendRequest
    prompt: Prompt
    prompt_ms: float  # what building it took


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the receipts of a batch share."""

    model: str
    batch: OpenedBatch
    epoch: int
    stage_ms: Mapping[str, float]


def _receipt(
    request: RecommendRequest, opened: Opened, task: BeamTask, found: Found, facts: _Facts
) -> RecommendReceipt:
    planned, batch = opened.planned, facts.batch
    joined_bytes = task.prompt.num_bytes if task.prompt.segments is not opened.segments else 0
    prefill = {f"prefill_{name}": ms for name, ms in batch.stage_ms.items() if name not in ("prompt", "total")}
    return RecommendReceipt(
        str(planned.level),
        request.rule,
        task.beam,
        facts.epoch,
        platform.node(),
        facts.model,
        batch.backend,
        planned.prompt.num_tokens,
        planned.plan.num_fresh,
        planned.plan.num_reused,
        batch.num_computed,
        found.bytes_read,
        found.bytes_naive,
        batch.bytes_copied + joined_bytes,
        found.steps,
        {**facts.stage_ms, **prefill},
        len(batch.prompts),
        planned.prompt.notes,
    )


def _beam(request: RecommendRequest) -> int:
    """A search that keeps fewer prefixes than items are asked for could not answer."""
    return max(request.beam, request.n)


def _check(request: RecommendRequest) -> None:
    for name, value in (("n", request.n), ("beam", request.beam)):
        if value < 1:
            raise RequestError(f"request {request.request_id!r}: {name} must be at least 1, got {value}")
    if request.rule not in (known := get_args(BeamRule)):
        wrong = f"request {request.request_id!r}: unknown rule {request.rule!r}"
        raise ConfigError(f"{wrong}; {nearest(request.rule, known)}")


def _check_tokens(tokens: CodeTokens, code_index: CodeIndex, vocab_size: int) -> None:
    """Raises ConfigError where the codes of the catalogue have no tokens in the model."""
    given = tuple(len(ids) for ids in tokens.ids)
    if len(given) != code_index.num_levels or any(
        have < need for have, need in zip(given, code_index.sizes, strict=True)
    ):
        raise ConfigError(
            f"the catalogue has {code_index.sizes} codes per level, the model has tokens for {given}; they do not "
            "belong together"
        )
    if (last := max(int(ids.max()) for ids in tokens.ids)) >= vocab_size:
        raise ConfigError(f"a code stands for token {last}, but the model has the tokens 0 to {vocab_size - 1}")
