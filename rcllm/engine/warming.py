"""What is computed ahead of requests, block by block, while requests are served in between.

Knows nothing of requests. Invariants: blocks that exist on any tier of this machine are skipped, and a block is
computed only where it fits beside all that is kept, in the pool or below it, so that warming evicts nothing. Of an item
that changes meanwhile no old text is computed after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate

from rcllm.cache.pool import Pool
from rcllm.config import Config
from rcllm.core.ranking import Item, ItemId, RankOptions
from rcllm.data.live import LiveCatalogue
from rcllm.engine.prefill import Prefill
from rcllm.metrics import Clock
from rcllm.prompt.blocks import Prompter
from rcllm.reuse.missing import Missing, canonical, chunks, item_owner
from rcllm.store.sealed import HEADER_BYTES

_CHUNK_TOKENS = 512  # of a pass that warms: requests that come meanwhile wait for it, and more rows are hardly faster


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far `warm` is."""

    done_blocks: int
    total_blocks: int
    computed_tokens: int
    computed_bytes: int  # of KV, in this run
    full: bool  # neither the pool nor a tier below it has room for the rest
    elapsed_s: float
    eta_s: float  # until the rest is done, at the speed so far; 0 when it is


class Warming:
    """One run over the blocks of some items."""

    def __init__(
        self,
        prefill: Prefill,
        prompter: Prompter,
        catalogue: LiveCatalogue,
        pool: Pool,
        config: Config,
        clock: Clock,
    ) -> None:
        self._prefill, self._prompter, self._catalogue = prefill, prompter, catalogue
        self._pool, self._config, self._clock = pool, config, clock

    def run(
        self, item_ids: Iterable[ItemId] | None, alone: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[WarmProgress]:
        """How far it is, after each pass and at the end. `alone`: keeps others from computing meanwhile."""
        version, ids = self._catalogue.version, list(self._catalogue if item_ids is None else item_ids)
        by_owner = {item_owner(item_id): item_id for item_id in ids}
        wanted = blocks_to_warm(self._prompter, self._config.rank, ids)
        todo = self._lacking(wanted)
        start, left, num_bytes, full = self._clock(), len(todo), 0, False
        with alone():
            tokens = self._instruction()
        room_below = _room_below(self._pool)

        def progress() -> WarmProgress:
            elapsed = self._clock() - start
            eta = elapsed * left / (len(todo) - left) if left < len(todo) else 0.0
            return WarmProgress(len(wanted) - left, len(wanted), tokens, num_bytes, full, elapsed, eta)

        for chunk in chunks(todo, min(_CHUNK_TOKENS, self._config.cache.pass_tokens)):
            with alone():
                blocks = self._anew(chunk, by_owner) if self._catalogue.has_changed(version) else chunk
                fitting = self._within(self._pool.free_bytes, blocks)
                tokens += self._compute(fitting, self._pool)
                room_below -= self._num_bytes(fitting, HEADER_BYTES)
                rest = self._within(room_below, blocks[len(fitting) :], HEADER_BYTES)
                tokens += self._compute(rest, self._pool.beside(self._beside_bytes))
                room_below -= self._num_bytes(rest, HEADER_BYTES)
            done = [*fitting, *rest]
            num_bytes += self._num_bytes(done, 0)
            full = len(done) < len(blocks)
            left -= len(chunk) - (len(blocks) - len(done))
            yield progress()
            if full:
                return
        yield progress()

    def _lacking(self, blocks: Sequence[Missing]) -> list[Missing]:
        """Those that no tier of this machine has."""
        exist = self._pool.lookup_many(missing.key for missing in blocks)
        return [missing for missing in blocks if not exist.is_near(missing.key)]

    def _anew(self, chunk: Sequence[Missing], by_owner: Mapping[str | None, ItemId]) -> list[Missing]:
        """What a chunk's items lack, as they read by now; some may be gone."""
        ids = dict.fromkeys(by_owner[missing.owner] for missing in chunk)
        items = [item for item_id in ids if (item := self._catalogue.get(item_id)) is not None]
        return self._lacking(_blocks(self._prompter, self._config.rank, items))

    @property
    def _beside_bytes(self) -> int:
        """Of a pool that holds one chunk and the longest contexts that it may be computed in."""
        return 2 * self._prefill.kv_bytes_per_token * (self._config.cache.pass_tokens + self._prompter.max_positions)

    def _within(self, num_bytes: int, blocks: Sequence[Missing], header: int = 0) -> Sequence[Missing]:
        """The first blocks that fit into so many bytes."""
        ends = accumulate(self._num_bytes([missing], header) for missing in blocks)
        return blocks[: sum(end <= num_bytes for end in ends)]

    def _num_bytes(self, blocks: Iterable[Missing], header: int) -> int:
        return sum(len(missing.token_ids) * self._prefill.kv_bytes_per_token + header for missing in blocks)

    def _compute(self, blocks: Sequence[Missing], pool: Pool) -> int:
        """Returns how many tokens went through the layers."""
        if not blocks:
            return 0
        with pool.hold() as held:
            absent = set(held.fetch(missing.key for missing in blocks))
            tokens = self._prefill.compute([each for each in blocks if each.key in absent], held)
            self._prefill.corrector.warm(blocks, self._config.rank, held)
        pool.write_through()
        return tokens

    def _instruction(self) -> int:
        layout = self._config.rank.layout
        instruction = canonical(self._prompter, self._prompter.instruction_block(layout), layout)
        with self._pool.hold() as held:
            tokens = self._prefill.compute([instruction] if held.fetch([instruction.key]) else [], held)
        self._pool.write_through()
        return tokens


def _room_below(pool: Pool) -> int:
    """Bytes that the roomiest tier below a pool can still take."""
    return max((tier.budget_bytes - tier.num_bytes for tier in pool.stats().tiers), default=0)


def blocks_to_warm(prompter: Prompter, options: RankOptions, item_ids: Iterable[ItemId] | None) -> list[Missing]:
    """Items as candidates and, where histories share events, as events; each block once. None: the whole catalogue.

    Raises UnknownItemError.
    """
    ids = prompter.catalogue if item_ids is None else item_ids
    return _blocks(prompter, options, [prompter.item(item_id) for item_id in ids])


def _blocks(prompter: Prompter, options: RankOptions, items: Sequence[Item]) -> list[Missing]:
    layout = options.layout
    reads_items = options.readout != "likelihood"  # which computes its candidates afresh
    blocks = [prompter.item_block(item, layout) for item in items if reads_items]
    if options.history == "shared":
        blocks += [prompter.event_block(item, layout) for item in items]
    return [canonical(prompter, block, layout) for block in {block.key: block for block in blocks}.values()]
