"""Generate: answers in text, plain or speculative, each as many passes as its text needs.

    enter → passes: draft, assemble → take: readout, verify, append → … → finished

Knows nothing of how drafts are made (`drafts/`). Invariant: without relaxed verification an answer depends on its
prompt's KV and its options alone, not on its batch, nor on what was drafted: to the bit on the compiled kernels. On
torch alone a pass of several rows may round otherwise than a pass of one, which matters where two tokens are equally
likely to about six digits (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from rcllm.core.decoding import Generated, GenerateOptions, GenerateRequest, check
from rcllm.core.ranking import Prompt, TokenIds
from rcllm.core.texts import TextRequest
from rcllm.decode.finite import not_numbers
from rcllm.decode.sample import Draw, uniform
from rcllm.decode.told import Asked, told
from rcllm.decode.verify import Accepted, accept, accept_relaxed, subtree
from rcllm.drafts.draft import EMPTY, Drafter, DraftTree
from rcllm.engine.engine import Engine
from rcllm.engine.job import Answer, Entered, Opening
from rcllm.engine.jobs.ending import Ending
from rcllm.engine.jobs.pass_costs import measure
from rcllm.engine.jobs.sequences import Live, SequenceKV, next_pass
from rcllm.errors import ConfigError, ModelError, RcllmError
from rcllm.metrics import Stage
from rcllm.model.decoder import Pass, Passed
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.plain import text_prompt
from rcllm.reuse.missing import user_owner
from rcllm.schedule.draft_budget import DraftBudget, Drafted
from rcllm.schedule.work import KindLimits

DrafterOf = Callable[[GenerateRequest, TokenIds], Drafter | None]  # of a request and its prompt
MAX_NODES = 64  # of one sequence's draft


def no_drafter(request: GenerateRequest, prompt: TokenIds) -> Drafter | None:
    """Plain decoding for every request."""
    return None


def prompt_of(prompter: Prompter, request: GenerateRequest) -> Prompt:
    """The tokens that a request brings, or instruction, history and question of the engine's template."""
    return text_prompt(prompter, request) if isinstance(request, TextRequest) else prompter.build_open(request.opening)


class Generator:
    """Decodes on one engine, whose other users go on meanwhile. Keeps what it learns of passes and drafts."""

    kind = "generate"

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
        """drafter_of: makes the drafter of each request whose speculation is not `none`, and whose user was not erased
        while it waited.

        batch_size: answers decoded together; max_draft_rows: drafted tokens of one pass, over the batch; kv_bytes: of
        the answers being decoded and their prompts, beside the engine's pool; None: a quarter of the pool's budget. A
        request that needs more than that runs alone. budget: decides how much is drafted; None: made at the first
        draft, from what passes cost on this machine, which takes about a second to measure.
        """
        if batch_size < 1 or max_draft_rows < 0:
            raise ConfigError(f"batch_size must be 1 or more, max_draft_rows 0 or more: {batch_size, max_draft_rows}")
        self.engine, self.drafter_of = engine, drafter_of
        self.batch_size, self.max_draft_rows = batch_size, max_draft_rows
        own_bytes = engine.pool.budget // 4 if kv_bytes is None else kv_bytes
        self.limits = KindLimits(requests=batch_size, own_bytes=own_bytes)
        self._budget = budget
        self._decoder, self._clock = engine.decoder, engine.pass_clock
        self._live: list[Live] = []
        self._trees: list[DraftTree] = []  # of the pass that runs, per live sequence
        self._drafted: list[Drafted] | None = None  # what they were chosen from; None: nothing was looked for
        self._pass_start = 0.0

    @property
    def budget(self) -> DraftBudget:
        """What decides how much is drafted, and what it has learned so far."""
        if self._budget is None:
            self._budget = DraftBudget(measure(self._decoder, clock=self._clock))
        return self._budget

    def check(self, request: GenerateRequest) -> None:
        """Raises RequestError or ConfigError for a request that cannot be decoded. Computes nothing."""
        self.open(request)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generated | RcllmError]:
        """Per request its answer, or its error, in their order."""
        return self.engine.run(self, requests)

    def stream(self, requests: Iterable[GenerateRequest]) -> Iterator[tuple[GenerateRequest, Generated | RcllmError]]:
        """Requests with their answers as they are complete; takes requests as places in the batch come free."""
        return self.engine.stream(self, requests, self.batch_size)

    # ---- the job ----

    def open(self, request: GenerateRequest) -> Opening:
        """Raises RequestError, ConfigError."""
        check(request.options)
        prompt = prompt_of(self.engine.prompter, request)
        num_tokens = prompt.num_tokens + self._max_tokens(request.options, prompt.num_tokens) - 1
        item_bytes = self._decoder.sequence_dtype.itemsize
        return Opening(prompt, 1, num_tokens * self._decoder.spec.kv_bytes_per_token(item_bytes))

    def _max_tokens(self, options: GenerateOptions, num_prompt: int) -> int:
        """Of an answer, which ends with the model's context at the latest; the prompt itself gives its first token."""
        return min(options.max_tokens, self._decoder.max_positions - num_prompt + 1)

    def enter(self, entered: Sequence[Entered], stage: Stage) -> Iterator[Answer]:
        """Copies the KV of prompts, and takes the first token of their answers."""
        with stage("join"):
            begun = [self._begin(each) for each in entered]
        with stage("measure"):
            if self._budget is None and any(live.drafter is not None for live in begun):
                self._budget = self.budget
        with stage("readout"):
            read = self._read(begun, [EMPTY] * len(begun), torch.stack([each.last for each in entered]))
        self._live += begun
        yield from self._taken(begun, read)

    def _begin(self, entered: Entered) -> Live:
        request, prompt = entered.ticket.request, entered.planned.prompt
        drafter = None
        was_erased = self.engine.pool.was_erased(user_owner(prompt.user_id), entered.ticket.lookup.erasures)
        if request.options.speculation.name != "none" and self.max_draft_rows and not was_erased:
            drafter = self.drafter_of(request, prompt.token_ids)
        max_tokens = self._max_tokens(request.options, prompt.num_tokens)
        kv = SequenceKV(self._decoder, prompt.num_tokens + max_tokens - 1)  # the last token needs none
        kv.fill(entered.segments, self._decoder.rope)
        decode = self.engine.prompter.tokenizer.decode
        ending = Ending(decode, self._decoder.spec.eos_ids, request.options.stop, max_tokens)
        # its segments were copied: what they were read from need not stay
        return Live(replace(entered, segments=()), kv, ending, drafter)

    def passes(self, stage: Stage) -> Sequence[Pass]:
        live = self._live
        with stage("draft"):
            drafted = self._drafted = self._draft()
            self._trees = [EMPTY] * len(live) if drafted is None else [_chosen(each) for each in drafted]
        with stage("assemble"):
            segments, roots = [each.kv.segment for each in live], [each.answer[-1] for each in live]
            work = next_pass(segments, roots, [each.root_position for each in live], self._trees)
        self._pass_start = self._clock()
        return [work]

    def take(self, passed: Sequence[Passed], stage: Stage) -> Iterator[Answer]:
        live, trees, [rows] = list(self._live), self._trees, passed
        with stage("readout"):
            read = self._read(live, trees, rows.hidden)
        pass_ms = (self._clock() - self._pass_start) * 1e3
        with stage("append"):
            self._append(rows.kept[0], trees, read)
        with stage("learn"):
            self._learn(live, trees, read, pass_ms if rows.num_rows == len(rows.hidden) else None)
        yield from self._taken(live, read)

    def drop(self, number: int) -> None:
        for live in [each for each in self._live if each.number == number]:
            self._end(live)

    def _end(self, live: Live) -> None:
        self._live.remove(live)
        if live.drafter is not None:
            live.drafter.finish()

    # ---- one pass ----

    @property
    def _drafting(self) -> DraftBudget | None:
        """The budget, while any live sequence may draft."""
        return self._budget if any(live.drafter is not None for live in self._live) else None

    def _draft(self) -> list[Drafted] | None:
        """What each live sequence verifies in this pass; None where nothing is drafted or looked for."""
        budget = self._drafting
        if budget is None or not budget.worth_looking:
            return None
        start = self._clock()
        trees = [
            EMPTY if live.drafter is None or live.max_depth < 1 else live.drafter.draft(live.context, MAX_NODES)
            for live in self._live
        ]
        look_ms = (self._clock() - start) * 1e3
        if not any(map(len, trees)):
            budget.observe_look(look_ms, 0)
            return None
        trusts, depths = [live.trust for live in self._live], [live.max_depth for live in self._live]
        drafted = budget.choose(trees, trusts, depths, self.max_draft_rows)
        budget.observe_look(look_ms, sum(len(each.nodes) for each in drafted))
        return drafted

    def _read(
        self, live: Sequence[Live], trees: Sequence[DraftTree], hidden: torch.Tensor
    ) -> list[Accepted | ModelError]:
        """What the rows of a pass decide; hidden [rows, d], of each sequence its root and its tree."""
        asked = [
            Asked(tree, each.request.options.speculation, _draws(each.request.options, len(each.answer), tree))
            for each, tree in zip(live, trees, strict=True)
        ]
        read = list[Accepted | ModelError]()
        for each, own, says in zip(live, asked, told(self._decoder, hidden, asked), strict=True):
            if says is None:
                read.append(not_numbers())
            elif says.judged is not None:
                read.append(accept_relaxed(own.tree, says.targets, says.judged, own.rule, each.answer))
            else:
                read.append(accept(own.tree, says.targets))
        return read

    def _append(self, kept: torch.Tensor, trees: Sequence[DraftTree], read: Sequence[Accepted | ModelError]) -> None:
        row = 0
        for live, tree, result in zip(self._live, trees, read, strict=True):
            if isinstance(result, Accepted):
                live.kv.append(kept, [row, *(row + each for each in result.rows)])
            live.counts.passes += 1
            live.counts.drafted += len(tree)
            row += len(tree) + 1

    def _taken(self, live: Sequence[Live], read: Sequence[Accepted | ModelError]) -> Iterator[Answer]:
        """Adds the tokens to the answers; those that are complete leave."""
        for each, result in zip(live, read, strict=True):
            if isinstance(result, ModelError):
                self._end(each)
                yield Answer(each.number, result)
                continue
            taken = each.take(result)
            if each.drafter is not None:
                each.drafter.observe(taken)
            if each.finish_reason is not None:
                self._end(each)
                yield Answer(each.number, each.generated())

    def _learn(
        self,
        live: Sequence[Live],
        trees: Sequence[DraftTree],
        read: Sequence[Accepted | ModelError],
        pass_ms: float | None,
    ) -> None:
        """What the drafts of a pass were good for; pass_ms: None where other rows were in it."""
        if (budget := self._drafting) is None:
            return
        accepted = [result if isinstance(result, Accepted) else None for result in read]
        for each, drafted, result in zip(live, self._drafted or (), accepted, strict=False):
            if result is not None:
                budget.observe_tree(drafted, each.trust, each.would_take(result))
        if pass_ms is not None:
            num_accepted = sum(len(result.rows) for result in accepted if result is not None)
            budget.observe_pass(len(live), sum(map(len, trees)), num_accepted, pass_ms)


def _chosen(drafted: Drafted) -> DraftTree:
    return subtree(drafted.tree, drafted.nodes) if len(drafted.nodes) else EMPTY


def _draws(options: GenerateOptions, position: int, tree: DraftTree) -> list[Draw]:
    """Of the root and each node: what comes after it stands at `position` plus its depth in the answer.

    None where the likeliest tokens are taken.
    """
    if options.temperature == 0:
        return []
    depths = [0, *tree.depths.tolist()]
    by_depth = {depth: uniform(options.seed, position + depth) for depth in set(depths)}
    return [Draw(options.temperature, options.top_p, by_depth[depth]) for depth in depths]
