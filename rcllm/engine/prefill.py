"""Computes the prompts of a batch: plan → materialise → select → assemble, and what is published afterwards.

Knows prompts, the pool and the decoder, not requests, jobs or who waits. Invariant: what a prompt gives does not depend
on the batch or on what is cached, beyond the tolerance of the kernels (docs/numerics.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch

from rcllm.cache.held import Held
from rcllm.cache.lookup import Lookup
from rcllm.cache.pool import Pool
from rcllm.config import CacheConfig
from rcllm.core.ranking import Borrowed, ContentKey, Level, Mask, Prompt, RankOptions, Scores
from rcllm.core.receipts import BlockKind
from rcllm.decode.rank import Asked, score
from rcllm.engine.correct import Corrector, Selected
from rcllm.engine.materialise import Materialiser
from rcllm.errors import CapacityError
from rcllm.metrics import Clock
from rcllm.model.attend.segments import Segment
from rcllm.model.decoder import Between, Decoder, Keep
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.keys import Context
from rcllm.prototypes.pool import PrototypePool
from rcllm.reuse.assemble import Assembled, assemble
from rcllm.reuse.missing import Missing, canonical, recompute_flops, user_owner
from rcllm.reuse.plan import NOTHING_BORROWED, Planned, plan
from rcllm.reuse.select import choose_without_evidence


class Prefill:
    """`mask`: the model's. `prototypes`: for history "semantic"."""

    def __init__(
        self,
        decoder: Decoder,
        prompter: Prompter,
        pool: Pool,
        cache: CacheConfig,
        mask: Mask,
        prototypes: PrototypePool | None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._decoder, self._prompter, self._pool = decoder, prompter, pool
        self._mask, self._prototypes, self._clock = mask, prototypes, clock
        self.kv_bytes_per_token = decoder.spec.kv_bytes_per_token(pool.dtype.itemsize)  # as the pool keeps it
        self.num_layers = decoder.spec.num_layers
        self.materialiser = Materialiser(decoder, prompter.namespace, cache.pass_tokens)
        self.corrector = Corrector(decoder, prompter, self.materialiser, cache.pass_tokens)

    @property
    def has_prototypes(self) -> bool:
        """Whether histories can be read from token prototypes."""
        return self._prototypes is not None

    def kv_bytes_per_token_of(self, prompt: Prompt) -> int:
        """Of what a prompt reads, as it is kept in the pool that `pool_of` gives it."""
        dtype = self._decoder.dtype if self.is_anew(prompt) else self._pool.dtype
        return self._decoder.spec.kv_bytes_per_token(dtype.itemsize)

    # ---- lookup and plan: no tensors ----

    def lookup(self, prompt: Prompt) -> Lookup:
        """Where the blocks of a prompt are; asks every tier, and waits for no pass.

        What is computed sooner than it is read, by what was learned of both, is set apart.
        """
        lookup = self._pool.lookup_many(keys_of(prompt))
        far = {key for key, located in lookup.found.items() if located.ms > 0.0}
        if not far:
            return lookup
        flops = {key: flops for key, flops in self._recompute_flops(prompt) if key in far}
        return lookup.against({key: self._pool.rates.flops.ms(amount) for key, amount in flops.items()})

    def _recompute_flops(self, prompt: Prompt) -> Iterator[tuple[ContentKey, float]]:
        """What each block would take, under either of its keys."""
        spec, layout = self._decoder.spec, prompt.options.layout
        for block in prompt.blocks:
            if block.chain_key is not None:
                yield block.chain_key, recompute_flops(spec, len(block), [block.base])
            if block.key is not None:
                variants = canonical(self._prompter, block, layout).context.variants
                yield block.key, recompute_flops(spec, len(block), [len(variant) for variant in variants])

    def plan(self, prompt: Prompt, lookup: Lookup) -> Planned:
        """Decides what is fresh and what is read from where."""
        borrowed = self._borrow(prompt)
        if self._mask == "blocks":  # reading the blocks is exact, and letting them see more would be wrong
            found: Container[ContentKey] = () if self.is_anew(prompt) else lookup
            return Planned(prompt, plan(prompt, Level("blocks"), found, borrowed), borrowed=borrowed)
        assert prompt.options.level.name != "auto", "admission resolves it"
        level = prompt.options.level
        return choose_without_evidence(Planned(prompt, plan(prompt, level, lookup, borrowed), level, borrowed))

    def replan(self, planned: Planned, lookup: Lookup) -> Planned:
        """The plan anew where the device has another part of the user's chain by now; the same plan otherwise."""
        chain = [block.chain_key for block in planned.prompt.blocks if block.chain_key is not None]
        now = self._pool.refreshed(lookup, chain)
        if all((key in now) == (key in lookup) for key in chain):
            return planned
        return self.plan(planned.prompt, now)

    def is_anew(self, prompt: Prompt) -> bool:
        """Full recompute under a block mask: the prompt is read from blocks, but from none that are cached."""
        return self._mask == "blocks" and prompt.options.level.name in ("full", "exact")

    def _borrow(self, prompt: Prompt) -> Mapping[int, Borrowed]:
        """What of the history the semantic pool gives to a request that asks for it."""
        asked = prompt.options.history == "semantic" and prompt.options.level.name not in ("full", "exact")
        return self._prototypes.borrow(prompt) if asked and self._prototypes is not None else NOTHING_BORROWED

    # ---- computing ----

    def pool_of(self, batch: Sequence[Planned]) -> Pool:
        """The pool, or, where every block is to be computed anew, an empty one without rounding, for this batch."""
        if not batch or not self.is_anew(batch[0].prompt):
            return self._pool
        return Pool(self._pool.budget, self._decoder.dtype, self._decoder.device)

    def materialise(
        self, batch: Sequence[Planned], lookups: Iterable[Lookup], held: Held, between: Between | None = None
    ) -> int:
        """Fetches every block that the plans read, and computes the others; returns tokens computed.

        Others are those that do not exist, and those that are computed sooner than read.
        """
        for borrowed in (each for planned in batch for each in planned.borrowed.values()):
            if borrowed.key not in held.blocks:
                assert self._prototypes is not None
                held.lend(borrowed.key, self._prototypes.block(borrowed.matches), "semantic")
        needed = {
            piece.key: (planned.prompt, piece.block)
            for planned in batch
            for piece in planned.plan.pieces
            if piece.key is not None
        }
        dear = set[ContentKey]()
        for lookup in lookups:
            dear |= lookup.dear
            self._pool.passed_over(lookup)
        return self.compute([self._missing(key, *needed[key]) for key in held.fetch(needed, dear)], held, between)

    def compute(self, missing: Sequence[Missing], held: Held, between: Between | None = None) -> int:
        """Computes blocks, and learns how fast that goes; returns tokens computed."""
        if not missing:
            return 0
        flops = sum(
            recompute_flops(self._decoder.spec, len(each.token_ids), [len(v) for v in each.context.variants])
            for each in missing
        )
        start = self._clock()
        tokens = self.materialiser.compute(missing, held, between)
        self._pool.rates.flops.saw(flops, self._clock() - start)
        return tokens

    def _missing(self, key: ContentKey, prompt: Prompt, index: int) -> Missing:
        block = prompt.blocks[index]
        if key != block.key:  # a user's chain that was dropped after planning: its context is all that precedes it
            earlier = prompt.blocks[:index]
            before = tuple(token for each in earlier for token in each.token_ids)
            owner = user_owner(prompt.user_id)
            is_shared = all(each.kind is BlockKind.INSTRUCTION for each in earlier)
            return Missing(key, block.token_ids, Context((before,)), owner, None if is_shared else owner)
        return canonical(self._prompter, block, prompt.options.layout)

    def select(self, batch: Sequence[Planned], held: Held) -> Selected:
        """Level `corrected`: which reused tokens are computed afresh."""
        return self.corrector.select(batch, held) if batch else Selected(())

    def assemble(self, batch: Sequence[Planned], held: Held, going_on: Sequence[bool] = ()) -> Assembled:
        """The pass over the fresh rows of the batch; its layers wait for what is still on its way."""
        early = held.blocks.early(key for planned in batch for key in planned.plan.read)
        return assemble(batch, early.kv, self._decoder.device, going_on, early.arrivals)

    def publish(self, batch: Sequence[Planned], kept: Iterable[torch.Tensor], held: Held) -> None:
        """Keeps the history that was computed exactly; a full cache is no reason to fail a request."""
        blocks = [(planned.prompt, planned.prompt.blocks[i]) for planned in batch for i in planned.plan.publish]
        for (prompt, block), kv in zip(blocks, kept, strict=True):
            assert block.chain_key is not None
            cost = recompute_flops(self._decoder.spec, len(block), [block.base])
            with contextlib.suppress(CapacityError):
                held.publish(block.chain_key, kv, cost, user_owner(prompt.user_id))

    def forget_erased(self, prompts: Iterable[tuple[Prompt, Lookup]]) -> None:
        """Forgets how these prompts ranked tokens of users who were erased after they had been asked for."""
        for prompt, lookup in prompts:
            owner = user_owner(prompt.user_id)
            if owner is not None and self._pool.was_erased(owner, lookup.erasures):
                self.corrector.rankings.forget(owner)

    def notes(self, options: RankOptions, lookup: Lookup, held: Held) -> tuple[str, ...]:
        """What a receipt says of how the prompt was read."""
        notes = []
        if num_dear := sum(held.sources.get(key) == "computed" for key in lookup.dear):
            rates = self._pool.rates.told()
            notes.append(f"{num_dear} blocks that a tier has were sooner computed than read, by the estimates: {rates}")
        if self._mask == "blocks":
            anew = options.level.name in ("full", "exact")
            exact = "every block was computed anew for it" if anew else "reading cached blocks is exact under it"
            notes.append(f"the model's mask is `blocks`: {exact}")
        if options.history == "semantic" and self._prototypes is not None:
            notes.append(f"semantic pool {self._prototypes.identity}: its tokens are approximate")
        return tuple(notes)

    def score_content_free(self, num_candidates: int, options: RankOptions) -> Scores:
        """The log-probabilities of labels whose candidates all read the same."""
        prompt = self._prompter.build_content_free(num_candidates, options)
        lookup = self.lookup(prompt)
        planned = self.plan(prompt, lookup)
        with self.pool_of([planned]).hold() as held:
            self.materialise([planned], [lookup], held)
            selected = self.select([planned], held)
            assembled = self.assemble(selected.batch, held)
            hidden = self._decoder.forward(assembled.work, selected.carried).hidden
        return score(self._decoder, hidden, Asked(prompt, assembled.read_rows[0]))


def keys_of(prompt: Prompt) -> Iterator[ContentKey]:
    """Every key that a plan of the prompt may read."""
    for block in prompt.blocks:
        if block.chain_key is not None:
            yield block.chain_key
        if block.key is not None:
            yield block.key


def whole_prompts(
    batch: Sequence[Planned],
    blocks: Mapping[ContentKey, torch.Tensor],
    fresh: Sequence[Sequence[Keep]],
    kept: Iterable[torch.Tensor],
) -> list[tuple[Segment, ...]]:
    """Per prompt that goes on, all of its tokens as segments: what was reused, and what its pass kept of fresh rows."""
    left = iter(kept)
    return [
        tuple(_segments(planned, blocks, runs, list(islice(left, len(runs))))) if runs else ()
        for planned, runs in zip(batch, fresh, strict=True)
    ]


def _segments(
    planned: Planned, blocks: Mapping[ContentKey, torch.Tensor], runs: Sequence[Keep], kept: Sequence[torch.Tensor]
) -> Iterator[Segment]:
    """Runs cover as many of the fresh pieces as follow each other."""
    fresh, covered, number = iter(zip(runs, kept, strict=True)), 0, 0
    for piece in planned.plan.pieces:
        if piece.key is None and covered:
            covered -= len(piece)
            continue
        if piece.key is None:
            run, kv = next(fresh)
            yield Segment(kv.contiguous(), run.base, 0, run.stop - run.start, number)
            covered = run.stop - run.start - len(piece)
        else:
            base = planned.prompt.blocks[piece.block].base
            yield Segment(blocks[piece.key], base, piece.start, piece.stop, number)
        number += 1
