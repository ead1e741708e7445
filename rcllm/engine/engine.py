"""The engine on one device: requests in, scores and receipts out.

    prompt → plan → materialise → select → forward → readout → respond

Invariant: a request's answer does not depend on what else is in its batch or in the cache, beyond the tolerance of the
kernels (docs/numerics.md); the cache decides how fast it comes. Safe to call from several threads: one batch runs at
a time.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import psutil
import torch

from rcllm.cache.pool import Held, Pool, PoolStats
from rcllm.config import Config, Hardware, check_options, resolve
from rcllm.core.decoding import OpenRequest
from rcllm.core.ranking import (
    Borrowed,
    ContentKey,
    Item,
    ItemId,
    Layout,
    Level,
    Prompt,
    RankOptions,
    RankRequest,
    RankResponse,
    Scores,
    UserId,
)
from rcllm.decode.rank import score
from rcllm.engine.batch import Limits, parts
from rcllm.engine.bias import LabelBias
from rcllm.engine.build import (
    declared_mask,
    identity,
    load_decoder,
    make_pool,
    make_prompter,
    model_fingerprint,
    open_semantic_pool,
)
from rcllm.engine.correct import Corrector
from rcllm.engine.materialise import Materialiser
from rcllm.engine.opened import OpenedBatch, keeping_fresh, opened
from rcllm.engine.respond import BatchFacts, respond
from rcllm.engine.warming import WarmProgress, blocks_to_warm
from rcllm.errors import CapacityError, ConfigError
from rcllm.metrics import Stopwatch
from rcllm.model.decoder import Decoder, Pass, Passed
from rcllm.model.pull import pull
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.keys import Context
from rcllm.prototypes.pool import PrototypePool
from rcllm.reuse.assemble import assemble
from rcllm.reuse.missing import Missing, canonical, chunks, item_owner, recompute_flops, user_owner
from rcllm.reuse.plan import NOTHING_BORROWED, Planned, plan
from rcllm.reuse.select import choose_without_evidence, first_phase
from rcllm.schedule.admission import Admission, AdmissionFactory, Identity, Open


class Engine:
    """Make one with `Engine.build`."""

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        prompter: Prompter,
        pool: Pool,
        model_id: str,
        admission: Admission | None = None,
        semantic_pool: PrototypePool | None = None,
    ) -> None:
        """`admission`: which reuse levels may be used; None for all. `semantic_pool`: for history "semantic"."""
        self.config, self.decoder, self.prompter, self.pool, self.model_id = config, decoder, prompter, pool, model_id
        self.semantic_pool = semantic_pool
        self.admission = admission or Open.of(self.identity, prompter.context_name)
        self._materialiser = Materialiser(decoder, prompter.namespace, config.cache.pass_tokens)
        self._corrector = Corrector(decoder, prompter, self._materialiser, config.cache.pass_tokens)
        self._lock = threading.Lock()
        self._bias = LabelBias(self._score_content_free)

    @classmethod
    def build(
        cls,
        catalogue: Mapping[ItemId, Item],
        config: Config | None = None,
        samples: Sequence[RankRequest] = (),
        admission: AdmissionFactory = Open.of,
    ) -> Engine:
        """Loads the model and makes an empty cache.

        `samples`: real requests for the canonical contexts `typical` and `mean(n)`. `admission`: told what the engine
        is, makes what decides which reuse levels may be used; by default, all. Fetches the model when it is not
        there. Raises ConfigError, ModelError, FetchError.
        """
        memory = psutil.virtual_memory().total
        config = declared_mask(resolve(config or Config(), Hardware(torch.cuda.is_available(), memory)))
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        folder = pull(config.model.path)
        model = model_fingerprint(config, folder)
        decoder = load_decoder(config, folder)
        prompter = make_prompter(config, folder, model, decoder, catalogue, samples)
        model_id = model.hex()[:12]
        semantic_pool = open_semantic_pool(config, decoder, prompter)
        admitting = admission(identity(config, prompter, model_id, semantic_pool), prompter.context_name)
        return cls(config, decoder, prompter, make_pool(config, decoder), model_id, admitting, semantic_pool)

    @property
    def identity(self) -> Identity:
        """What a calibration of this engine holds for."""
        return identity(self.config, self.prompter, self.model_id, self.semantic_pool)

    # ---- ranking ----

    def rank(self, request: RankRequest) -> RankResponse:
        """Scores the candidates of one request. Raises RequestError, ConfigError or CapacityError."""
        return self.rank_batch([request])[0]

    def rank_batch(self, requests: Sequence[RankRequest]) -> list[RankResponse]:
        """Scores several requests, whose misses and fresh tokens are computed together as far as memory allows.

        Raises, before anything is computed, for the first request that is wrong.
        """
        watch = Stopwatch()
        with watch.stage("prompt"):
            prompts = [self._prompt(request) for request in requests]
        with watch.stage("wait"):
            self._lock.acquire()
        try:
            with watch.stage("plan"):
                planned = [self._plan(prompt) for prompt in prompts]
            responses: dict[int, RankResponse] = {}
            for part in self._parts(planned):
                answers = self._run([requests[i] for i in part], [planned[i] for i in part], watch)
                responses.update(zip(part, answers, strict=True))
            return [responses[i] for i in range(len(requests))]
        finally:
            self._lock.release()

    def _prompt(self, request: RankRequest) -> Prompt:
        options = request.options or self.config.rank
        check_options(options)
        admitted = self.admission.admit(options)
        options = admitted.options
        if options.history == "semantic" and self.semantic_pool is None:
            raise ConfigError(
                "history 'semantic' needs a semantic pool: build one with `rcllm pool build` and name it in "
                "cache.semantic_pool"
            )
        check_layer, last = options.selection.check_layer, self.decoder.spec.num_layers - 1
        if options.level.name == "corrected" and check_layer >= last:
            raise ConfigError(
                f"selection.check_layer is {check_layer}; the model has the layers 0 to {last}, of which at least the "
                "last must be left to run for the chosen tokens alone"
            )
        prompt = self.prompter.build(replace(request, options=options))
        return replace(prompt, notes=prompt.notes + admitted.notes)

    def _run(self, requests: Sequence[RankRequest], batch: Sequence[Planned], watch: Stopwatch) -> list[RankResponse]:
        with self._pool_of(batch).hold() as held:
            with watch.stage("materialise"):
                num_computed = self._materialise(batch, held)
            with watch.stage("select"):
                selected = self._corrector.select(batch, held)
                batch = selected.batch
            with watch.stage("assemble"):
                assembled = assemble(batch, held.blocks, self.decoder.device)
            with watch.stage("forward"):
                passed = self.decoder.forward(assembled.work, selected.carried)
            with watch.stage("readout"):
                scores = [
                    self._bias.correct(p.prompt.options, score(self.decoder, p.prompt, passed.hidden, rows))
                    for p, rows in zip(batch, assembled.read_rows, strict=True)
                ]
            with watch.stage("publish"):
                self._publish(batch, passed.kept, held)
            facts = BatchFacts(
                platform.node(),
                self.model_id,
                self.prompter.context_name,
                passed.backend,
                passed.bytes_copied + selected.bytes_copied,
                num_computed,
                len(batch),
                held.sources,
                watch.read_ms(),
            )
            read = selected.bytes_read(assembled.work.groups, self.decoder.spec.num_layers)
            return [
                respond(r, p, p.prompt.options.level, s, b, facts, self._notes(p.prompt.options) + n)
                for r, p, s, b, n in zip(requests, batch, scores, read, selected.notes, strict=True)
            ]

    # ---- decoding ----

    @contextlib.contextmanager
    def open(self, requests: Sequence[OpenRequest | Prompt]) -> Iterator[OpenedBatch]:
        """Computes prompts for decoding to continue; what they read stays in place while the context is open.

        A prompt is one that `prompter.build_open` made of a request before.

        The requests are computed together: give as many as `pass_tokens` allows. Other threads may use the engine
        meanwhile. Raises RequestError, ConfigError, CapacityError.
        """
        watch = Stopwatch()
        with watch.stage("prompt"):
            prompts = [each if isinstance(each, Prompt) else self.prompter.build_open(each) for each in requests]
        with contextlib.ExitStack() as stack:
            with self._lock:
                with watch.stage("plan"):
                    batch = [self._plan(prompt) for prompt in prompts]
                held = stack.enter_context(self._pool_of(batch).hold())
                with watch.stage("materialise"):
                    num_computed = self._materialise(batch, held)
                with watch.stage("assemble"):
                    assembled = keeping_fresh(assemble(batch, held.blocks, self.decoder.device), batch)
                with watch.stage("forward"):
                    passed = self.decoder.forward(assembled.work)
                with watch.stage("publish"):
                    self._publish(batch, passed.kept, held)
            prompts_open = opened(batch, held.blocks, assembled, passed)
            yield OpenedBatch(prompts_open, watch.read_ms(), num_computed, passed.bytes_copied, passed.backend)

    def forward(self, work: Pass) -> Passed:
        """One pass of decoding; waits for its turn."""
        with self._lock:
            return self.decoder.forward(work)

    def _plan(self, prompt: Prompt) -> Planned:
        level = prompt.options.level
        if self.config.model.mask == "blocks":  # reading the blocks is exact, and letting them see more would be wrong
            cached = self.pool.contains if not self._is_anew(prompt) else lambda key: False
            borrowed = self._borrow(prompt)
            return Planned(prompt, plan(prompt, Level("blocks"), cached, borrowed), borrowed=borrowed)
        assert level.name != "auto", "admission resolves it"
        borrowed = self._borrow(prompt)
        planned = Planned(prompt, plan(prompt, level, self.pool.contains, borrowed), level, borrowed)
        return choose_without_evidence(planned)

    def _borrow(self, prompt: Prompt) -> Mapping[int, Borrowed]:
        """What of the history the semantic pool gives to a request that asks for it."""
        asked = prompt.options.history == "semantic" and prompt.options.level.name not in ("full", "exact")
        return self.semantic_pool.borrow(prompt) if asked and self.semantic_pool is not None else NOTHING_BORROWED

    def _is_anew(self, prompt: Prompt) -> bool:
        """Full recompute under a block mask: the prompt is read from blocks, but from none that are cached."""
        return self.config.model.mask == "blocks" and prompt.options.level.name in ("full", "exact")

    def _pool_of(self, batch: Sequence[Planned]) -> Pool:
        """The pool, or, where every block is to be computed anew, an empty one without rounding, for this batch."""
        if not self._is_anew(batch[0].prompt):
            return self.pool
        return Pool(self.pool.budget, self.decoder.dtype, self.decoder.device)

    def _parts(self, batch: Sequence[Planned]) -> Iterator[list[int]]:
        limits = Limits(self.config.cache.pass_tokens, self.pool.budget // 2, self._kv_bytes_per_token)
        return parts(batch, lambda planned: (self._is_anew(planned.prompt), first_phase(planned)), limits)

    def _materialise(self, batch: Sequence[Planned], held: Held) -> int:
        """Fetches every block that the plans read, and computes those that do not exist; returns tokens computed."""
        for borrowed in (each for planned in batch for each in planned.borrowed.values()):
            if borrowed.key not in held.blocks:
                assert self.semantic_pool is not None
                held.lend(borrowed.key, self.semantic_pool.block(borrowed.matches), "semantic")
        needed = {
            piece.key: (planned.prompt, piece.block)
            for planned in batch
            for piece in planned.plan.pieces
            if piece.key is not None
        }
        return self._materialiser.compute([self._missing(key, *needed[key]) for key in held.fetch(needed)], held)

    def _missing(self, key: ContentKey, prompt: Prompt, index: int) -> Missing:
        block = prompt.blocks[index]
        if key != block.key:  # a user's chain that was dropped after planning: its context is all that precedes it
            before = tuple(token for earlier in prompt.blocks[:index] for token in earlier.token_ids)
            owner = user_owner(prompt.user_id)
            return Missing(key, block.token_ids, Context((before,)), owner, owner if index > 1 else None)
        return canonical(self.prompter, block, prompt.options.layout)

    def _publish(self, batch: Sequence[Planned], kept: Sequence[torch.Tensor], held: Held) -> None:
        """Keeps the history that was computed exactly; a full cache is no reason to fail a request."""
        blocks = [(planned.prompt, planned.prompt.blocks[i]) for planned in batch for i in planned.plan.publish]
        for (prompt, block), kv in zip(blocks, kept, strict=False):  # decoding keeps more, after these
            assert block.chain_key is not None
            cost = recompute_flops(self.decoder.spec, len(block), [block.base])
            with contextlib.suppress(CapacityError):
                held.publish(block.chain_key, kv, cost, user_owner(prompt.user_id))

    def _score_content_free(self, num_candidates: int, options: RankOptions) -> Scores:
        """The log-probabilities of labels whose candidates all read the same."""
        planned = self._plan(self.prompter.build_content_free(num_candidates, options))
        with self._pool_of([planned]).hold() as held:
            self._materialise([planned], held)
            selected = self._corrector.select([planned], held)
            assembled = assemble(selected.batch, held.blocks, self.decoder.device)
            hidden = self.decoder.forward(assembled.work, selected.carried).hidden
        return score(self.decoder, planned.prompt, hidden, assembled.read_rows[0])

    # ---- the cache ----

    def warm(
        self,
        item_ids: Iterable[ItemId] | None = None,
        *,
        on_progress: Callable[[WarmProgress], None] | None = None,
    ) -> WarmProgress:
        """Computes items ahead of requests, as candidates and (history "shared") as events, for the default options.

        Blocks that exist are skipped, so it can be repeated and resumed. Stops when the pool is full: what is left is
        computed when it is asked for. Give the most requested items first. Requests are served in between.
        """
        layout: Layout = self.config.rank.layout
        wanted = blocks_to_warm(self.prompter, self.config.rank, item_ids)
        todo = [missing for missing in wanted if not self.pool.contains(missing.key)]
        start, total, left, full = time.perf_counter(), len(wanted), len(todo), False

        def progress() -> WarmProgress:
            elapsed = time.perf_counter() - start
            eta = elapsed * left / (len(todo) - left) if left < len(todo) else 0.0
            return WarmProgress(total - left, total, tokens, self.pool.stats().num_bytes, full, elapsed, eta)

        instruction = canonical(self.prompter, self.prompter.instruction_block(layout), layout)
        with self._lock, self.pool.hold() as held:
            tokens = self._materialiser.compute([instruction] if held.fetch([instruction.key]) else [], held)
        for chunk in chunks(todo, self.config.cache.pass_tokens):
            num_bytes = sum(len(missing.token_ids) for missing in chunk) * self._kv_bytes_per_token
            with self._lock, self.pool.hold() as held:
                full = num_bytes > self.pool.free_bytes
                if not full:
                    absent = set(held.fetch(missing.key for missing in chunk))
                    tokens += self._materialiser.compute([m for m in chunk if m.key in absent], held)
                    self._corrector.warm(chunk, self.config.rank, held)
                    left -= len(chunk)
            if on_progress:
                on_progress(progress())
            if full:
                break
        return progress()

    def erase_user(self, user_id: UserId) -> int:
        """Removes every block derived from a user; returns how many there were.

        Waits for the batch that is running, which may be about to publish some. The semantic pool is a read-only file
        that was made of users' texts: build it again without the user (`rcllm pool build --exclude-users`).
        """
        with self._lock:
            owner = user_owner(user_id) or ""
            self._corrector.rankings.forget(owner)
            return self.pool.delete_owner(owner)

    def retire_item(self, item_id: ItemId) -> int:
        """Removes the blocks of an item whose text changed or that is gone; returns how many there were.

        Not needed for correctness: new text has new keys. It frees the memory of the old ones at once.
        """
        owner = item_owner(item_id) or ""
        with self._lock:
            self._corrector.rankings.forget(owner)
            return self.pool.delete_owner(owner)

    def stats(self) -> PoolStats:
        return self.pool.stats()

    @property
    def _kv_bytes_per_token(self) -> int:
        return self.decoder.spec.kv_bytes_per_token(self.pool.dtype.itemsize)

    def _notes(self, options: RankOptions) -> tuple[str, ...]:
        notes = []
        if self.config.model.mask == "blocks":
            anew = options.level.name in ("full", "exact")
            exact = "every block was computed anew for it" if anew else "reading cached blocks is exact under it"
            notes.append(f"the model's mask is `blocks`: {exact}")
        if options.history == "semantic" and self.semantic_pool is not None:
            notes.append(f"semantic pool {self.semantic_pool.identity}: its tokens are approximate")
        if options.bias == "running_mean":
            notes.append("bias running_mean: the scores depend on the requests before this one")
        return tuple(notes)
