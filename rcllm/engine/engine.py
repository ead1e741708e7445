"""The engine on one device: requests in, scores and receipts out.

    prompt → plan → materialise → forward → readout → respond

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
from dataclasses import dataclass, replace

import psutil
import torch

from rcllm.cache.pool import Held, Pool, PoolStats
from rcllm.config import Config, Hardware, check_options, resolve
from rcllm.core import (
    Block,
    BlockKind,
    ContentKey,
    Item,
    ItemId,
    Layout,
    Level,
    Prompt,
    RankOptions,
    RankRequest,
    RankResponse,
    UserId,
)
from rcllm.decode.rank import Scores, score
from rcllm.engine.bias import LabelBias
from rcllm.engine.build import declared_mask, load_decoder, make_pool, make_prompter, model_fingerprint
from rcllm.engine.materialise import NOTHING, Materialiser, Missing, chunks, recompute_flops
from rcllm.engine.respond import BatchFacts, respond
from rcllm.errors import CapacityError
from rcllm.metrics import Stopwatch
from rcllm.model.decoder import Decoder
from rcllm.model.pull import pull
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.keys import Context
from rcllm.reuse.assemble import Planned, assemble
from rcllm.reuse.plan import plan


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far `warm` is."""

    done_blocks: int
    total_blocks: int
    computed_tokens: int
    pool_bytes: int
    full: bool  # the pool has no room for the rest
    elapsed_s: float
    eta_s: float  # until the rest is done, at the speed so far; 0 when it is


class Engine:
    """Make one with `Engine.build`."""

    def __init__(self, config: Config, decoder: Decoder, prompter: Prompter, pool: Pool, model_id: str) -> None:
        self.config, self.decoder, self.prompter, self.pool, self.model_id = config, decoder, prompter, pool, model_id
        self._materialiser = Materialiser(decoder, prompter.namespace, config.cache.pass_tokens)
        self._lock = threading.Lock()
        self._bias = LabelBias(self._score_content_free)

    @classmethod
    def build(
        cls,
        catalogue: Mapping[ItemId, Item],
        config: Config | None = None,
        samples: Sequence[RankRequest] = (),
    ) -> Engine:
        """Loads the model and makes an empty cache.

        `samples`: real requests for the canonical contexts `typical` and `mean(n)`. Fetches the model when it is not
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
        return cls(config, decoder, prompter, make_pool(config, decoder), model.hex()[:12])

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
            responses: list[RankResponse] = []
            for part in self._parts(planned):
                some = requests[len(responses) : len(responses) + len(part)]
                responses.extend(self._run(some, part, watch))
            return responses
        finally:
            self._lock.release()

    def _prompt(self, request: RankRequest) -> Prompt:
        options = request.options or self.config.rank
        check_options(options)
        return self.prompter.build(replace(request, options=options))

    def _run(self, requests: Sequence[RankRequest], batch: Sequence[Planned], watch: Stopwatch) -> list[RankResponse]:
        with self.pool.hold() as held:
            with watch.stage("materialise"):
                num_computed = self._materialise(batch, held)
            with watch.stage("assemble"):
                assembled = assemble(batch, held.blocks, self.decoder.device)
            with watch.stage("forward"):
                passed = self.decoder.forward(assembled.work)
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
                passed.bytes_copied,
                num_computed,
                len(batch),
                held.sources,
                watch.read_ms(),
            )
            segments = [group.segments for group in assembled.work.groups]
            return [
                respond(r, p, p.prompt.options.level, s, g, facts, self._notes(p.prompt.options))
                for r, p, s, g in zip(requests, batch, scores, segments, strict=True)
            ]

    def _plan(self, prompt: Prompt) -> Planned:
        # under a block mask, reading the blocks is exact, and letting them see more would be wrong
        level = Level("blocks") if self.config.model.mask == "blocks" else prompt.options.level
        return Planned(prompt, plan(prompt, level, self.pool.contains))

    def _parts(self, batch: Sequence[Planned]) -> Iterator[Sequence[Planned]]:
        """Runs of prompts whose fresh tokens and KV fit together; a prompt that fits alone nowhere is tried alone."""
        start, rows, needed = 0, 0, dict[ContentKey, int]()
        for i, planned in enumerate(batch):
            keys = {p.key: len(planned.prompt.blocks[p.block]) for p in planned.plan.pieces if p.key is not None}
            total = sum((needed | keys).values()) * self._kv_bytes_per_token
            too_much = rows + planned.plan.num_fresh > self.config.cache.pass_tokens or total > self.pool.budget // 2
            if i > start and too_much:
                yield batch[start:i]
                start, rows, needed = i, 0, {}
            rows, needed = rows + planned.plan.num_fresh, needed | keys
        if batch:
            yield batch[start:]

    def _materialise(self, batch: Sequence[Planned], held: Held) -> int:
        """Fetches every block that the plans read, and computes those that do not exist; returns tokens computed."""
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
        return self._canonical(block, prompt.options.layout)

    def _publish(self, batch: Sequence[Planned], kept: Sequence[torch.Tensor], held: Held) -> None:
        """Keeps the history that was computed exactly; a full cache is no reason to fail a request."""
        blocks = [(planned.prompt, planned.prompt.blocks[i]) for planned in batch for i in planned.plan.publish]
        for (prompt, block), kv in zip(blocks, kept, strict=True):
            assert block.chain_key is not None
            cost = recompute_flops(self.decoder.spec, len(block), [block.base])
            with contextlib.suppress(CapacityError):
                held.publish(block.chain_key, kv, cost, user_owner(prompt.user_id))

    def _score_content_free(self, num_candidates: int, options: RankOptions) -> Scores:
        """The log-probabilities of labels whose candidates all read the same."""
        planned = self._plan(self.prompter.build_content_free(num_candidates, options))
        with self.pool.hold() as held:
            self._materialise([planned], held)
            assembled = assemble([planned], held.blocks, self.decoder.device)
            hidden = self.decoder.forward(assembled.work).hidden
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
        items = [self.prompter.item(i) for i in (self.prompter.catalogue if item_ids is None else item_ids)]
        reads_items = self.config.rank.readout != "likelihood"  # which computes its candidates afresh
        blocks = [self.prompter.item_block(item, layout) for item in items if reads_items]
        if self.config.rank.history == "shared":
            blocks += [self.prompter.event_block(item, layout) for item in items]
        todo = [self._canonical(block, layout) for block in {block.key: block for block in blocks}.values()]
        todo = [missing for missing in todo if not self.pool.contains(missing.key)]
        start, total, left, full = time.perf_counter(), len(blocks), len(todo), False

        def progress() -> WarmProgress:
            elapsed = time.perf_counter() - start
            eta = elapsed * left / (len(todo) - left) if left < len(todo) else 0.0
            return WarmProgress(total - left, total, tokens, self.pool.stats().num_bytes, full, elapsed, eta)

        instruction = self._canonical(self.prompter.instruction_block(layout), layout)
        with self._lock, self.pool.hold() as held:
            tokens = self._materialiser.compute([instruction] if held.fetch([instruction.key]) else [], held)
        for chunk in chunks(todo, self.config.cache.pass_tokens):
            num_bytes = sum(len(missing.token_ids) for missing in chunk) * self._kv_bytes_per_token
            with self._lock, self.pool.hold() as held:
                full = num_bytes > self.pool.free_bytes
                if not full:
                    absent = set(held.fetch(missing.key for missing in chunk))
                    tokens += self._materialiser.compute([m for m in chunk if m.key in absent], held)
                    left -= len(chunk)
            if on_progress:
                on_progress(progress())
            if full:
                break
        return progress()

    def erase_user(self, user_id: UserId) -> int:
        """Removes every block derived from a user; returns how many there were.

        Waits for the batch that is running, which may be about to publish some.
        """
        with self._lock:
            return self.pool.delete_owner(user_owner(user_id) or "")

    def retire_item(self, item_id: ItemId) -> int:
        """Removes the blocks of an item whose text changed or that is gone; returns how many there were.

        Not needed for correctness: new text has new keys. It frees the memory of the old ones at once.
        """
        return self.pool.delete_owner(item_owner(item_id) or "")

    def stats(self) -> PoolStats:
        return self.pool.stats()

    @property
    def _kv_bytes_per_token(self) -> int:
        return self.decoder.spec.kv_bytes_per_token(self.pool.dtype.itemsize)

    def _canonical(self, block: Block, layout: Layout) -> Missing:
        """A block to compute in the canonical context of its kind."""
        assert block.key is not None
        context = NOTHING if block.kind is BlockKind.INSTRUCTION else self.prompter.contexts[layout][block.kind]
        return Missing(block.key, block.token_ids, context, item_owner(block.owner))

    def _notes(self, options: RankOptions) -> tuple[str, ...]:
        notes = []
        if self.config.model.mask == "blocks":
            notes.append("the model's mask is `blocks`: reading cached blocks is exact under it")
        if options.bias == "running_mean":
            notes.append("bias running_mean: the scores depend on the requests before this one")
        return tuple(notes)


def user_owner(user_id: str | None) -> str | None:
    """Owner names of users and items never collide."""
    return None if user_id is None else f"user:{user_id}"


def item_owner(item_id: str | None) -> str | None:
    return None if item_id is None else f"item:{item_id}"
