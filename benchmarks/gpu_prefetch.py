"""What do blocks in host memory cost a ranking on a GPU, and how much of that is hidden behind its pass?

A part of `benchmarks.gpu`. The engine's own path: items and events lie in the page-locked tier alone, and each ranking
brings up what it reads. Rankings go in turns through the ways below. Ceiling: a ranking takes no less than its copies,
and no less than from the pool. `hidden_share` is 1 where copies cost nothing beside the pass, and 0 where they come
before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch

from benchmarks.gpu_parts import Ceilings, clean, decoder_of
from benchmarks.gpu_setup import Scale, Size, Timer, engine_of, rankings, spread
from benchmarks.harness import Options, show
from rcllm.cache.lanes import Copy, Lane, Lanes
from rcllm.cache.pinned import page_locked
from rcllm.core.ranking import ContentKey, Level, RankRequest, RankResponse
from rcllm.engine.engine import Engine
from rcllm.model.arrivals import Mark
from rcllm.reuse.plan import plan
from rcllm.store.arena import Arena
from rcllm.store.tiered import Tiered

WAYS = ("pool", "overlapped", "before", "launched")
Around = Callable[[Engine], AbstractContextManager[None]]


class Before:
    """A lane whose copies the device waits for as they are sent: nothing is computed beside them."""

    def __init__(self, lane: Lane) -> None:
        self._lane, self.num_parts = lane, lane.num_parts

    def ready(self, source: torch.Tensor) -> torch.Tensor:
        return self._lane.ready(source)

    def host_room(self, num_bytes: int) -> memoryview:
        return self._lane.host_room(num_bytes)

    def send(self, parts: Sequence[Sequence[Copy]]) -> list[Mark]:
        for mark in self._lane.send(parts)[-1:]:
            mark.wait()
        return []


@contextmanager
def copies_before(engine: Engine) -> Iterator[None]:
    lanes = engine.pool.lanes
    engine.pool.lanes = Lanes(Before(lanes.up), lanes.down)
    yield
    engine.pool.lanes = lanes


@contextmanager
def launched(engine: Engine) -> Iterator[None]:
    """No pass is replayed, so that each layer waits for its own part, however little there is to copy."""
    static, engine.decoder.static = engine.decoder.static, None
    yield
    engine.decoder.static = static


AROUND: dict[str, Around] = {
    "pool": lambda engine: nullcontext(),
    "overlapped": lambda engine: nullcontext(),
    "before": copies_before,
    "launched": launched,
}


def prefetch(scale: Scale, ceilings: Ceilings, chosen: Options) -> dict[str, float]:
    """TTFT at level `blocks` by where blocks are and when they are copied, and what handing down costs at `exact`."""
    found, rows = dict[str, float](), []
    for shape in scale.shapes:
        decoder = decoder_of(shape, scale)
        for size in scale.below:
            pool = engine_of(decoder, size, scale.kv_dtype, scale.pool_bytes)
            over = engine_of(decoder, size, scale.kv_dtype, scale.pool_bytes, _host_tier(scale))
            for engine in (pool, over):
                engine.warm(list(engine.catalogue))
            over.pool.settle()
            name = f"prefetch_{shape}_{size}"
            found |= _ways(name, pool, over, size, scale, chosen)
            found |= _handing_down(name, {"alone": pool, "handing_down": over}, size, scale, chosen)
            rows.append([name, *(f"{found[f'{name}_{way}_p50_ms']:.2f}" for way in WAYS)])
            rows[-1] += [f"{found[f'{name}_{key}']:.2f}" for key in ("copy_ms", "hidden_share")]
            rows[-1] += [f"{found[f'{name}_exact_{key}_p50_ms']:.2f}" for key in ("alone", "handing_down")]
            clean(pool, over)
        clean(decoder)
    columns = [*WAYS, "copies", "hidden share", "exact", "exact, handing down"]
    show("TTFT by where blocks are, P50 ms", ["ranking", *columns], rows)
    return found


def _host_tier(scale: Scale) -> Tiered:
    memory = page_locked(scale.host_bytes) if scale.device.type == "cuda" else np.empty(scale.host_bytes, np.uint8)
    return Tiered({}, arena=Arena(memory), queue_bytes=1)


def _ways(name: str, pool: Engine, over: Engine, size: Size, scale: Scale, chosen: Options) -> dict[str, float]:
    """The same rankings in turns, from the pool and from host memory."""
    timer, times = Timer(scale.device), {way: list[float]() for way in (*WAYS, "copy")}
    shares, errors, sizes = list[float](), list[float](), list[int]()
    for request in rankings(size, scale.warming + scale.repeats, "blocks", chosen.seed):
        answers = dict[str, RankResponse]()
        for way in WAYS:
            over.pool.clear()
            with AROUND[way](over):
                times[way].append(timer.wall(partial(_rank, over if way != "pool" else pool, request, answers, way)))
        sources = [block.source for block in answers["overlapped"].receipt.blocks if block.source != "fresh"]
        shares.append(sources.count("host") / len(sources))
        errors += [_error(each, answers["pool"]) for each in answers.values()]
        prompt = over.prompter.build(request)
        keys = plan(prompt, Level("blocks"), ()).read
        sizes.append(over.pool.stats().num_bytes)
        over.pool.clear()
        times["copy"].append(timer.wall(partial(_bring_up, over, keys)))
    kept = slice(scale.warming, None)
    found = dict[str, float]()
    for way in WAYS:
        found |= spread(f"{name}_{way}", times[way][kept])
    p50, copy = {way: found[f"{name}_{way}_p50_ms"] for way in WAYS}, statistics.median(times["copy"][kept])
    return found | {
        f"{name}_host_share": min(shares[kept]),
        f"{name}_max_error": max(errors),
        f"{name}_copied_mb": statistics.median(sizes[kept]) / 1e6,
        f"{name}_copy_ms": copy * 1e3,
        f"{name}_gb_per_s": statistics.median(sizes[kept]) / copy / 1e9,
        f"{name}_hidden_share": (p50["before"] - p50["overlapped"]) / (p50["before"] - p50["pool"]),
    }


def _rank(engine: Engine, request: RankRequest, answers: dict[str, RankResponse], way: str) -> None:
    answers[way] = engine.rank(request)


def _error(response: RankResponse, other: RankResponse) -> float:
    return float(np.abs(np.array(response.scores) - np.array(other.scores)).max())


def _bring_up(engine: Engine, keys: Sequence[ContentKey]) -> None:
    """What a ranking reads, and no ranking."""
    with engine.pool.hold() as held:
        held.fetch(keys)
        assert len(list(held.blocks.values())) == len(keys)


def _handing_down(
    name: str, engines: Mapping[str, Engine], size: Size, scale: Scale, chosen: Options
) -> dict[str, float]:
    """New users at level `exact`, whose histories are published, and go down or not."""
    timer, times = Timer(scale.device), {which: list[float]() for which in engines}
    for request in rankings(size, scale.warming + scale.repeats, "exact", chosen.seed):
        for which, engine in engines.items():
            times[which].append(timer.wall(partial(engine.rank, request)))
    found = dict[str, float]()
    for which, seconds in times.items():
        found |= spread(f"{name}_exact_{which}", seconds[scale.warming :])
    return found
