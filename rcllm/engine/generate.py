"""Answers in text, many at once: plain or speculative decoding of open prompts through the engine.

    admit → draft → forward → readout → verify → … → finished

Knows nothing of how drafts are made (`decode/draft.py`). Invariant: without relaxed verification an answer depends on
its prompt's KV and its options alone, not on its batch, nor on what was drafted: to the bit on the compiled kernels.
On torch alone a pass of several rows may round otherwise than a pass of one, which matters where two tokens are equally
likely to about six digits (docs/numerics.md).
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rcllm.core.decoding import Generated, GenerateOptions, GenerateReceipt, GenerateRequest, check
from rcllm.core.ranking import Prompt, TokenIds
from rcllm.decode.sample import Draw, drawn, judge, likeliest, uniform
from rcllm.decode.verify import Accepted, accept, accept_relaxed, subtree
from rcllm.drafts.draft import EMPTY, Drafter, DraftTree
from rcllm.engine.ending import Ending
from rcllm.engine.engine import Engine
from rcllm.engine.opened import Opened
from rcllm.engine.pass_costs import measure
from rcllm.engine.sequences import Live, SequenceKV, next_pass
from rcllm.errors import ConfigError
from rcllm.metrics import Stopwatch
from rcllm.schedule.draft_budget import DraftBudget, Drafted

DrafterOf = Callable[[GenerateRequest, TokenIds], Drafter | None]  # of a request and its prompt
MAX_NODES = 64  # of one sequence's draft


def no_drafter(request: GenerateRequest, prompt: TokenIds) -> Drafter | None:
    """Plain decoding for every request."""
    return None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that was checked."""

    number: int
    request: GenerateRequest
    prompt: Prompt
    max_tokens: int  # of the answer

    @property
    def capacity(self) -> int:
        """Tokens of KV; the last one of the answer needs none."""
        return self.prompt.num_tokens + self.max_tokens - 1


class Generator:
    """Decodes with one engine, whose other users may go on meanwhile. Not thread-safe: one call at a time.

    Keeps what it learns of passes and drafts from call to call.
    """

    def __init__(
        self,
        engine: Engine,
        drafter_of: DrafterOf = no_drafter,
        *,
        batch_size: int = 16,
        max_draft_rows: int = 64,
        kv_bytes: int | None = None,
        budget: DraftBudget | None = None,
    ) -> None:
        """drafter_of: makes the drafter of each request whose speculation is not `none`.

        batch_size: answers decoded together; max_draft_rows: drafted tokens of one pass, over the batch; kv_bytes: of
        the answers being decoded and their prompts, beside the engine's pool; None: a quarter of the pool's budget. A
        request that needs more than that runs alone. budget: decides how much is drafted; None: made at the first
        draft, from what passes cost on this machine, which takes about a second to measure.
        """
        if batch_size < 1 or max_draft_rows < 0:
            raise ConfigError(f"batch_size must be 1 or more, max_draft_rows 0 or more: {batch_size, max_draft_rows}")
        self.engine, self.drafter_of = engine, drafter_of
        self.batch_size, self.max_draft_rows = batch_size, max_draft_rows
        self.kv_bytes = engine.pool.budget // 4 if kv_bytes is None else kv_bytes
        self._budget = budget

    @property
    def budget(self) -> DraftBudget:
        """What decides how much is drafted, and what it has learned so far."""
        if self._budget is None:
            self._budget = DraftBudget(measure(self.engine.decoder, self.engine.forward))
        return self._budget

    def check(self, request: GenerateRequest) -> None:
        """Raises RequestError or ConfigError for a request that cannot be decoded. Computes nothing."""
        self._waiting(0, request)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generated]:
        """The answers in the order of the requests.

        Raises RequestError or ConfigError, before anything is computed, for the first request that is wrong.
        """
        waiting = [self._waiting(number, request) for number, request in enumerate(requests)]
        done = dict(_Run(self, iter(waiting)).answers())
        return [done[number] for number in range(len(requests))]

    def stream(self, requests: Iterable[GenerateRequest]) -> Iterator[Generated]:
        """The answers as they are complete; takes requests as places in the batch come free.

        A request that is wrong raises, and ends the stream: `check` them before.
        """
        waiting = (self._waiting(number, request) for number, request in enumerate(requests))
        for _, generated in _Run(self, waiting).answers():
            yield generated

    def _waiting(self, number: int, request: GenerateRequest) -> _Waiting:
        check(request.options)
        prompt = self.engine.prompter.build_open(request.opening)
        room = self.engine.decoder.max_positions - prompt.num_tokens + 1  # the prompt itself gives the first token
        return _Waiting(number, request, prompt, min(request.options.max_tokens, room))


class _Run:
    """One call: answers enter and leave the batch until none are left."""

    def __init__(self, generator: Generator, waiting: Iterator[_Waiting]) -> None:
        self._generator, self._source = generator, waiting
        self._engine, self._decoder = generator.engine, generator.engine.decoder
        self._next = deque[_Waiting]()  # at most one, which did not fit yet
        self._live = list[Live]()
        self._kv = dict[int, SequenceKV]()  # of the live, by number
        self._watch = Stopwatch()
        self._budget: DraftBudget | None = None  # where a request drafts; only then passes are measured
        spec, pool = self._decoder.spec, self._engine.pool
        self._max_tokens = generator.kv_bytes // spec.kv_bytes_per_token(self._decoder.dtype.itemsize)
        self._max_pool_tokens = pool.budget // 2 // spec.kv_bytes_per_token(pool.dtype.itemsize)

    def answers(self) -> Iterator[tuple[int, Generated]]:
        """Numbers of requests, and their answers."""
        while (entering := self._entering()) or self._live:
            if entering:
                self._admit(entering)
            else:
                self._step()
            yield from self._leaving()

    # ---- in and out ----

    def _entering(self) -> list[_Waiting]:
        """The next requests that are computed together: what fits the batch, the budget and one pass."""
        used = sum(kv.kv.shape[3] for kv in self._kv.values())  # tokens
        entering = list[_Waiting]()
        while len(self._live) + len(entering) < self._generator.batch_size and (waiting := self._peek()):
            used += waiting.capacity
            if (self._live or entering) and used > self._max_tokens:
                break
            if entering and not self._opens_with(waiting, entering):
                break
            entering.append(self._next.popleft())
        return entering

    def _opens_with(self, waiting: _Waiting, others: Sequence[_Waiting]) -> bool:
        """Whether a prompt is computed in one pass with others: of one level, within a pass and half of the pool."""
        most = min(self._engine.config.cache.pass_tokens, self._max_pool_tokens)
        num_tokens = sum(each.prompt.num_tokens for each in (*others, waiting))
        return waiting.request.level == others[0].request.level and num_tokens <= most

    def _peek(self) -> _Waiting | None:
        if not self._next and (waiting := next(self._source, None)):
            self._next.append(waiting)
        return self._next[0] if self._next else None

    def _admit(self, entering: Sequence[_Waiting]) -> None:
        """Computes prompts, and with them the first token of their answers."""
        before = self._watch.read_ms()
        drafters = [self._drafter(waiting) for waiting in entering]
        with self._watch.stage("open"), self._engine.open([waiting.prompt for waiting in entering]) as batch:
            for waiting, opened in zip(entering, batch.prompts, strict=True):
                kv = self._kv[waiting.number] = SequenceKV(self._decoder, waiting.capacity)
                kv.fill(opened.segments, self._decoder.rope)
            hidden = torch.stack([opened.hidden for opened in batch.prompts])
        admitted = [self._enter(*each, before) for each in zip(entering, batch.prompts, drafters, strict=True)]
        with self._watch.stage("readout"):
            accepted = self._read(admitted, [EMPTY] * len(admitted), hidden)
        for live, first in zip(admitted, accepted, strict=True):
            self._take(live, first)
        self._live += admitted

    def _drafter(self, waiting: _Waiting) -> Drafter | None:
        if waiting.request.options.speculation.name == "none" or not self._generator.max_draft_rows:
            return None
        drafter = self._generator.drafter_of(waiting.request, waiting.prompt.token_ids)
        if drafter is not None and self._budget is None:
            with self._watch.stage("measure"):
                self._budget = self._generator.budget
        return drafter

    def _enter(
        self, waiting: _Waiting, opened: Opened, drafter: Drafter | None, before_ms: Mapping[str, float]
    ) -> Live:
        eos_ids, decode = self._decoder.spec.eos_ids, self._engine.prompter.tokenizer.decode
        ending = Ending(decode, eos_ids, waiting.request.options.stop, waiting.max_tokens)
        # its segments were copied: what they were read from need not stay
        return Live(waiting.number, waiting.request, replace(opened, segments=()), ending, drafter, before_ms)

    def _leaving(self) -> Iterator[tuple[int, Generated]]:
        done = [live for live in self._live if live.finish_reason is not None]
        self._live = [live for live in self._live if live.finish_reason is None]
        for live in done:
            del self._kv[live.number]
            if live.drafter is not None:
                live.drafter.finish()
            yield live.number, self._generated(live)

    def _generated(self, live: Live) -> Generated:
        assert live.finish_reason is not None
        counts, planned, options = live.counts, live.opened.planned, live.request.options
        stage_ms = {name: ms - live.entered_ms.get(name, 0.0) for name, ms in self._watch.read_ms().items()}
        receipt = GenerateReceipt(
            str(planned.prompt.options.level),
            planned.prompt.options.history,
            str(options.speculation),
            platform.node(),
            self._engine.model_id,
            planned.prompt.num_tokens,
            planned.plan.num_fresh,
            planned.plan.num_reused,
            counts.passes,
            counts.drafted,
            counts.accepted,
            (len(live.answer) - 1) / counts.passes if counts.passes else 0.0,
            tuple(counts.divergences),
            stage_ms,
            planned.prompt.notes,
        )
        text = live.ending.text(live.answer)
        return Generated(live.request.request_id, text, tuple(live.answer), live.finish_reason, receipt)

    # ---- one pass ----

    def _step(self) -> None:
        live, watch = self._live, self._watch
        with watch.stage("draft"):
            drafted = self._draft()
            trees = [EMPTY] * len(live) if drafted is None else [_chosen(each) for each in drafted]
        with watch.stage("assemble"):
            segments = [self._kv[each.number].segment for each in live]
            roots, positions = [each.answer[-1] for each in live], [each.root_position for each in live]
            work = next_pass(segments, roots, positions, trees)
        start = time.perf_counter()
        with watch.stage("forward"):
            passed = self._engine.forward(work)
        with watch.stage("readout"):
            accepted = self._read(live, trees, passed.hidden)
        pass_ms = (time.perf_counter() - start) * 1e3
        with watch.stage("append"):
            self._append(passed.kept[0], trees, accepted)
        with watch.stage("learn"):
            taken = [self._take(each, result) for each, result in zip(live, accepted, strict=True)]
            self._learn(drafted or (), accepted, taken, pass_ms)

    @property
    def _drafting(self) -> DraftBudget | None:
        """The budget, while any live sequence may draft."""
        return self._budget if any(live.drafter is not None for live in self._live) else None

    def _draft(self) -> list[Drafted] | None:
        """What each live sequence verifies in this pass; None where nothing is drafted or looked for."""
        budget = self._drafting
        if budget is None or not budget.worth_looking:
            return None
        start = time.perf_counter()
        trees = [
            EMPTY if live.drafter is None or live.max_depth < 1 else live.drafter.draft(live.context, MAX_NODES)
            for live in self._live
        ]
        look_ms = (time.perf_counter() - start) * 1e3
        if not any(map(len, trees)):
            budget.observe_look(look_ms, 0)
            return None
        trusts, depths = [live.trust for live in self._live], [live.max_depth for live in self._live]
        drafted = budget.choose(trees, trusts, depths, self._generator.max_draft_rows)
        budget.observe_look(look_ms, sum(len(each.nodes) for each in drafted))
        return drafted

    def _read(self, live: Sequence[Live], trees: Sequence[DraftTree], hidden: torch.Tensor) -> list[Accepted]:
        """What the rows of a pass decide; hidden [rows, d], of each sequence its root and its tree."""
        with torch.inference_mode():
            logits = self._decoder.logits(hidden)
        targets = _targets(live, trees, logits)
        accepted, at = list[Accepted](), 0
        for each, tree in zip(live, trees, strict=True):
            stop, rule = at + len(tree) + 1, each.request.options.speculation
            own = targets[at:stop]
            if rule.name == "relaxed" and len(tree):
                judged = judge(logits[at:stop], own, tree, rule)
                accepted.append(accept_relaxed(tree, own, judged, rule, each.answer))
            else:
                accepted.append(accept(tree, own))
            at = stop
        return accepted

    def _append(self, kept: torch.Tensor, trees: Sequence[DraftTree], accepted: Sequence[Accepted]) -> None:
        row = 0
        for live, tree, result in zip(self._live, trees, accepted, strict=True):
            self._kv[live.number].append(kept, [row, *(row + each for each in result.rows)])
            live.counts.passes += 1
            live.counts.drafted += len(tree)
            row += len(tree) + 1

    def _take(self, live: Live, accepted: Accepted) -> tuple[int, ...]:
        taken = live.take(accepted)
        if live.drafter is not None:
            live.drafter.observe(taken)
        return taken

    def _learn(
        self,
        drafted: Sequence[Drafted],
        accepted: Sequence[Accepted],
        taken: Sequence[Sequence[int]],
        pass_ms: float,
    ) -> None:
        """`drafted`: of each live sequence, or empty where this pass looked for no drafts."""
        if (budget := self._drafting) is None:
            return
        for live, each, tokens in zip(self._live, drafted, taken, strict=False):
            budget.observe_tree(each, live.trust, tokens)
        num_drafted, num_accepted = sum(len(each.nodes) for each in drafted), sum(len(each.rows) for each in accepted)
        budget.observe_pass(len(self._live), num_drafted, num_accepted, pass_ms)


def _chosen(drafted: Drafted) -> DraftTree:
    return subtree(drafted.tree, drafted.nodes) if len(drafted.nodes) else EMPTY


def _targets(live: Sequence[Live], trees: Sequence[DraftTree], logits: torch.Tensor) -> list[int]:
    """The model's own choice after each row of a pass; logits [rows, vocab]."""
    targets, at = likeliest(logits), 0
    rows, draws = list[int](), list[Draw]()
    for each, tree in zip(live, trees, strict=True):
        stop = at + len(tree) + 1
        if each.request.options.temperature > 0:
            rows += range(at, stop)
            draws += _draws(each.request.options, len(each.answer), tree)
        at = stop
    if rows:
        for row, token in zip(rows, drawn(logits[rows], draws), strict=True):
            targets[row] = token
    return targets


def _draws(options: GenerateOptions, position: int, tree: DraftTree) -> list[Draw]:
    """Of the root and each node: what comes after it stands at `position` plus its depth in the answer."""
    depths = [0, *tree.depths.tolist()]
    by_depth = {depth: uniform(options.seed, position + depth) for depth in set(depths)}
    return [Draw(options.temperature, options.top_p, by_depth[depth]) for depth in depths]
