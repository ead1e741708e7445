"""Recommend: a wide beam search over the codes of a live catalogue, as many passes as there are levels.

Where the decoder carries an item-kNN, its scores are mixed with the beams'. Knows nothing of how items got their
semantic IDs, or of files. Requests that enter together are searched together, in one buffer. Invariant: a request sees
one epoch of the codes from its first step to its last, and every item of its answer was in that epoch and allowed;
batches and what else runs change the time alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rcllm.cache.held import Held
from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex, CodeTokens, LiveCodes
from rcllm.codes.knn import Knn, mixed
from rcllm.core.decoding import OpenRequest, RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId, Prompt
from rcllm.core.receipts import RecommendReceipt
from rcllm.decode.beam import BeamSearch, Found, choosing_of, items_of, step_bytes_per_row
from rcllm.decode.beam_kv import joined
from rcllm.decode.beam_task import BeamPrompt, BeamTask, most_rows
from rcllm.engine.engine import Engine
from rcllm.engine.job import Answer, Entered, Opening
from rcllm.errors import (
    CapacityError,
    ConfigError,
    ModelError,
    PromptTooLongError,
    RcllmError,
    RequestError,
    answered,
)
from rcllm.fields import parse
from rcllm.metrics import Stage
from rcllm.model.decoder import Pass, Passed
from rcllm.schedule.work import KindLimits

_LONG_LIST, _FILTERS = 1000, 16  # items that make a list long; filters that are remembered
BEAM_ROWS = 512  # beams of all requests that are searched at a time


class Recommender:
    """Beam search over live codes, on an engine whose template is for open prompts. Threads may share it."""

    kind = "recommend"

    def __init__(
        self,
        engine: Engine,
        codes: LiveCodes,
        tokens: CodeTokens,
        *,
        knn: Knn | None = None,
        max_items: int | None = None,
        beam_rows: int = BEAM_ROWS,
    ) -> None:
        """`tokens`: which token of the model's vocabulary stands for which code. Raises ConfigError.

        `knn`: mixed into the scores; None: they are the decoder's. `max_items`: events at the end of a history that the
        decoder reads; None: all. `beam_rows`: beams of all requests that are searched at a time; a request that has
        more is searched alone.
        """
        self.engine, self.codes, self.tokens, self.knn, self.beam_rows = engine, codes, tokens, knn, beam_rows
        self.max_items = max_items
        self.limits = KindLimits(step_rows=beam_rows, own_bytes=engine.pool.budget // 4)
        _check_tokens(tokens, codes.epoch(), engine.decoder.spec.vocab_size)
        self._filters = _Filters()
        self._choosing = choosing_of(tokens, engine.decoder.device)
        self._searching: list[_Searched] = []
        self._idle: list[BeamSearch] = []  # with their buffers, while nobody uses them

    @property
    def device_bytes(self) -> int:
        """Of codes and filters that are kept on the device, beside the engine's pool."""
        return self._choosing.device_bytes

    def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """The best items for one request. Raises RequestError, ConfigError, CapacityError."""
        return answered(self.recommend_batch([request]))[0]

    def recommend_batch(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse | RcllmError]:
        """Per request its response, or its error."""
        return self.engine.run(self, requests)

    # ---- the job ----

    def open(self, request: RecommendRequest) -> Opening:
        """Raises RequestError, ConfigError, CapacityError."""
        _check(request)
        if request.knn and self.knn is None:
            raise RequestError(
                f"request {request.request_id!r}: knn is {request.knn}, but the decoder carries no item-kNN; train it "
                "with `rcllm sid train`, or leave knn out"
            )
        prompt, code_index, decoder = self._opened(request), self.codes.epoch(), self.engine.decoder
        needed, limit = prompt.num_tokens + code_index.num_levels - 1, decoder.max_positions
        if needed > limit:
            raise PromptTooLongError(
                f"request {request.request_id!r} needs {needed} positions with its answer, the limit is {limit}: send "
                "fewer or shorter events"
            )
        num_rows = most_rows(code_index, _beam(request))
        step_bytes, budget = num_rows * step_bytes_per_row(decoder, code_index.num_levels), self.engine.pool.budget
        if step_bytes > budget:
            raise CapacityError(
                f"request {request.request_id!r}: {num_rows:,} beams keep {step_bytes / 1e6:,.1f} MB, more than the "
                f"cache's {budget / 1e6:,.1f} MB: ask for fewer items or a narrower beam, or raise cache.pool_mb"
            )
        prompt_bytes = decoder.spec.kv_bytes_per_token(self.engine.pool.dtype.itemsize) * prompt.num_tokens
        return Opening(prompt, num_rows, prompt_bytes + step_bytes)

    def _opened(self, request: RecommendRequest) -> Prompt:
        """The prompt of what the decoder reads of a history, with a note where that is not all. Raises RequestError."""
        num_events = len(request.history)
        history = request.history[-(self.max_items or num_events) :]
        prompt = self.engine.prompter.build_open(
            OpenRequest(request.request_id, history, request.user_id, request.level, tenant=request.tenant)
        )
        if len(history) == num_events:
            return prompt
        cut = f"the decoder reads the last {len(history)} of {num_events:,} events, as many as it was trained on"
        return replace(prompt, notes=(*prompt.notes, cut))

    def enter(self, entered: Sequence[Entered], stage: Stage) -> Iterator[Answer]:
        """Begins a search; what its prompts read of the pool stays in place until it ends."""
        with stage("allow"):
            code_index = self.codes.epoch()
            allowed = [self._filters.of(code_index, each.ticket.request) for each in entered]
        with stage("join"):
            tasks = [
                BeamTask(self._prompt(each), code_index, some, _beam(each.ticket.request), each.ticket.request.rule)
                for each, some in zip(entered, allowed, strict=True)
            ]
        search = self._idle.pop() if self._idle else BeamSearch(self.engine.decoder, self._choosing, self.beam_rows)
        read = [key for each in entered for key in each.planned.plan.read]
        self._searching.append(_Searched(entered, tasks, search, entered[0].held.also(read)))
        search.begin(tasks, stage)
        yield from self._ended(stage)

    def passes(self, stage: Stage) -> Sequence[Pass]:
        with stage("reorder"):
            return [searched.search.next_pass() for searched in self._searching]

    def take(self, passed: Sequence[Passed], stage: Stage) -> Iterator[Answer]:
        for searched, rows in zip(self._searching, passed, strict=True):
            searched.search.take(rows, stage)
        yield from self._ended(stage)

    def drop(self, number: int) -> None:
        """Its beams go on while others of the same search are waited for."""
        for searched in list(self._searching):
            searched.dropped.add(number)
            if searched.abandoned:
                self._close(searched)

    # ---- searches ----

    def _prompt(self, entered: Entered) -> BeamPrompt:
        decoder = self.engine.decoder
        return BeamPrompt(joined(entered.segments, decoder.rope, decoder.sequence_dtype), entered.end, entered.last)

    def _ended(self, stage: Stage) -> Iterator[Answer]:
        for searched in [each for each in self._searching if each.search.ended]:
            with stage("items"):
                answers = list(self._answers(searched))
            self._close(searched)
            yield from answers

    def _close(self, searched: _Searched) -> None:
        """Lets go of its blocks; its buffer waits for the next search."""
        self._searching.remove(searched)
        searched.held.release()
        searched.search.reset()
        self._idle.append(searched.search)

    def _answers(self, searched: _Searched) -> Iterator[Answer]:
        for entered, task, found in zip(searched.entered, searched.tasks, searched.search.found(), strict=True):
            if entered.ticket.number not in searched.dropped:
                yield Answer(entered.ticket.number, self._outcome(entered, task, found))

    def _outcome(self, entered: Entered, task: BeamTask, found: Found) -> RecommendResponse | ModelError:
        if found.error is not None:
            return found.error
        request, receipt = entered.ticket.request, _receipt(entered, task, found)
        share, shares = self._knn_of(request, task)
        if not shares:
            items, scores = items_of(task.code_index, task.allowed, found, request.n)
        else:
            beams = dict(zip(*items_of(task.code_index, task.allowed, found, task.beam), strict=True))
            items, scores = mixed(beams, shares, share, request.n)
            receipt = replace(receipt, knn=share, num_by_knn=sum(item_id not in beams for item_id in items))
        return RecommendResponse(request.request_id, items, scores, receipt)

    def _knn_of(self, request: RecommendRequest, task: BeamTask) -> tuple[float, Mapping[ItemId, float]]:
        """The share of item-kNN in the scores, and what it says of items; nothing where it is not asked."""
        if self.knn is None or not (share := self.knn.share if request.knn is None else request.knn):
            return 0.0, {}
        history = [event.item_id for event in request.history if event.item_id is not None]
        return share, self.knn.shares(history, task.code_index, task.allowed, task.beam)


@dataclass(slots=True, eq=False)
class _Searched:
    """Requests that are searched together."""

    entered: Sequence[Entered]
    tasks: Sequence[BeamTask]
    search: BeamSearch
    held: Held
    dropped: set[int] = field(default_factory=set)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of them."""
        return all(each.ticket.number in self.dropped for each in self.entered)


def _receipt(entered: Entered, task: BeamTask, found: Found) -> RecommendReceipt:
    joined_bytes = task.prompt.num_bytes if task.prompt.segments is not entered.segments else 0
    return RecommendReceipt(
        **entered.shared,
        rule=task.rule,
        beam=task.beam,
        epoch=task.code_index.epoch,
        kv_bytes_read=found.bytes_read,
        kv_bytes_naive=found.bytes_naive,
        kv_bytes_copied=entered.kv_bytes_copied + joined_bytes,
        steps=found.steps,
    )


class _Filters:
    """What requests are allowed, remembered for long lists, such as the stock of a region, that many of them share.

    An epoch is let go with the first request of the next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._code_index: CodeIndex | None = None  # the epoch of those that are remembered
        self._known: dict[tuple[tuple[ItemId, ...] | None, tuple[ItemId, ...]], Allowed | None] = {}

    def of(self, code_index: CodeIndex, request: RecommendRequest) -> Allowed | None:
        key = request.allow, request.deny
        with self._lock:
            if self._code_index is not code_index or len(self._known) == _FILTERS:
                self._code_index, self._known = code_index, {}
            if len(request.allow or ()) + len(request.deny) < _LONG_LIST:
                return code_index.allowed(*key)
            if key not in self._known:
                self._known[key] = code_index.allowed(*key)
            return self._known[key]


def _beam(request: RecommendRequest) -> int:
    """A search that keeps fewer prefixes than items are asked for could not answer."""
    return max(request.beam, request.n)


def _check(request: RecommendRequest) -> None:
    """Raises RequestError for values that a body could not have brought."""
    given = {name: getattr(request, name) for name in ("request_id", "n", "beam", "rule", "knn")}
    parse(RecommendRequest, given, f"request {request.request_id!r}", base=request, error=RequestError)


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
