"""Does an engine over its store hold under a mixed load: no error, flat memory, a bounded file, right answers?

Regime: four threads rank, warm, change items and erase users, all at once, on SmolLM2-135M with short prompts (template
`titles`, 10 candidates), over a pool and a disk that are each much smaller than the catalogue, so that both evict all
the time. 10 minutes; `--quick`: one. Memory is RssAnon, for mapped pages of the file are the system's to take back.
Wanted: no error, growth of memory after the first minute of at most 5 %, a file of at most a few times its budget, and
records that agree at the end. Ceiling: none; the throughput is what the model takes.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from benchmarks.harness import Metrics, console, dataset, options, report, show
from benchmarks.store_disk import place
from benchmarks.store_setup import SET
from rcllm.cache.heap import share_arenas
from rcllm.cache.pool import Pool
from rcllm.config import MIB, CacheConfig, Config, PromptConfig, StoreConfig
from rcllm.core.ranking import Item, Level, RankOptions, RankRequest, UserId
from rcllm.data import build_requests
from rcllm.engine.engine import Engine
from rcllm.engine.space import about, space_of
from rcllm.engine.tiers import Tiers, open_tiers
from rcllm.store.tiered import Tiered

QUESTION = "Errors, memory, file and throughput of an engine over its store under a mixed load of four threads"
NUM_THREADS = 4
_POOL_MB, _DISK_MB = 150, 400
_USERS = 300
_CLOSE = 1e-3  # between scores of the same blocks that were computed in other company


def main() -> None:
    chosen = options("store_load", QUESTION)
    share_arenas()  # as the command line does
    data = dataset(SET)
    base = Engine.build(data.catalogue, Config(prompt=PromptConfig("titles"), cache=CacheConfig(pool_mb=_POOL_MB)))
    asked = build_requests(data, _USERS, num_candidates=10, num_history=6, min_history=3, seed=chosen.seed)
    with place() as folder, _over_store(base, folder) as (engine, tiers):
        _fill(engine, asked)
        load = Load(engine, folder / "data.mdb", asked, chosen.seed)
        seconds = 60.0 if chosen.quick else 600.0
        samples = load.run(seconds)
        metrics = {**_outcome(load, samples, seconds), **_end(engine, tiers, base, asked)}
    show("Mixed load", ["what", "figure"], [[name, f"{value:,.4g}"] for name, value in metrics.items()])
    report("store_load", QUESTION, chosen, metrics)


@contextmanager
def _over_store(base: Engine, folder: Path) -> Iterator[tuple[Engine, Tiers]]:
    """An engine on the model of `base`, over a disk that is too small for the catalogue."""
    space = space_of(base.prompter.namespace)
    config = StoreConfig(enabled=True, folder=str(folder), disk_mb=_DISK_MB, queue_mb=64)
    tiers = open_tiers(config, space, about(base.config, base.model_id))
    pool = Pool(_POOL_MB * MIB, base.pool.dtype, base.pool.device, tiers.store, space=space)
    with Engine(base.config, base.decoder, base.prompter, pool, base.model_id, tiers=tiers) as engine:
        yield engine, tiers


def _fill(engine: Engine, asked: Sequence[RankRequest]) -> None:
    """Ranks until the pool has no room left, so that what grows afterwards is not the pool."""
    for request in asked:
        engine.rank(dataclasses.replace(request, options=RankOptions(level=Level("blocks"))))
        if engine.pool.free_bytes < engine.pool.budget // 50:
            return


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the process took at a moment."""

    at_s: float
    rss_anon_bytes: int
    file_bytes: int


class Load:
    """What four threads do to one engine."""

    def __init__(self, engine: Engine, file: Path, asked: Sequence[RankRequest], seed: int) -> None:
        self._engine, self._file, self._asked, self._seed = engine, file, asked, seed
        self._items = list(engine.catalogue.values())
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the counts
        self._until = 0.0
        self._acts: dict[str, tuple[float, Callable[[random.Random], None]]] = {  # with how often each comes
            "rank": (0.70, lambda rng: self._rank(rng, "blocks")),
            "rank exactly": (0.10, lambda rng: self._rank(rng, "exact")),  # which keeps a chain of the user's
            "warm": (0.06, self._warm),
            "upsert": (0.07, self._upsert),
            "erase": (0.07, self._erase),
        }

    def run(self, seconds: float) -> list[Sample]:
        """Until so much time has passed; a sample for each second."""
        start = time.monotonic()
        self._until = start + seconds
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        samples = []
        with console.status("") as status:
            while time.monotonic() < self._until:
                time.sleep(1.0)
                now = time.monotonic() - start
                samples.append(Sample(now, rss_anon_bytes(), self._file.stat().st_size))
                status.update(f"{samples[-1].at_s:.0f} s, {self.done.total()} calls, {self.errors.total()} errors")
        for thread in threads:
            thread.join()
        return samples

    def _work(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        names, weights = list(self._acts), [weight for weight, _ in self._acts.values()]
        while time.monotonic() < self._until:
            [name] = rng.choices(names, weights)
            try:
                self._acts[name][1](rng)
            except Exception as error:  # the benchmark counts them
                with self._lock:
                    self.errors[f"{name}: {type(error).__name__}: {error}"] += 1
            with self._lock:
                self.done[name] += 1

    def _rank(self, rng: random.Random, level: Literal["blocks", "exact"]) -> None:
        request = rng.choice(self._asked)
        self._engine.rank(dataclasses.replace(request, options=RankOptions(level=Level(level))))

    def _warm(self, rng: random.Random) -> None:
        self._engine.warm([item.item_id for item in rng.sample(self._items, 8)])

    def _upsert(self, rng: random.Random) -> None:
        self._engine.upsert_items([_changed(item, rng) for item in rng.sample(self._items, 3)])

    def _erase(self, rng: random.Random) -> None:
        self._engine.erase_user(rng.choice(self._asked).user_id or UserId(""))


def _changed(item: Item, rng: random.Random) -> Item:
    """The item with another edition in its title, one of a few, so that old texts come back."""
    return dataclasses.replace(item, fields={**item.fields, "title": f"{item.fields['title']} {rng.randrange(5)}"})


def rss_anon_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def _outcome(load: Load, samples: Sequence[Sample], seconds: float) -> Metrics:
    """Growth: medians of a tenth of the time, after the first minute (a third of a shorter run) and at the end."""
    begin, span = min(60.0, seconds / 3), seconds / 10
    early = [s.rss_anon_bytes for s in samples if begin <= s.at_s < begin + span]
    late = [s.rss_anon_bytes for s in samples if s.at_s >= seconds - span]
    for error, count in load.errors.most_common(5):
        console.print(f"[red]{count} × {error}", highlight=False)
    return {
        "soak_seconds": seconds,
        "soak_threads": NUM_THREADS,
        "soak_errors": load.errors.total(),
        "soak_calls_per_s": load.done.total() / seconds,
        **{f"soak_{name.replace(' ', '_')}_calls": count for name, count in sorted(load.done.items())},
        "soak_rss_growth": statistics.median(late) / statistics.median(early) - 1.0,
        "soak_rss_mb_early": statistics.median(early) / 1e6,
        "soak_rss_mb_end": statistics.median(late) / 1e6,
        "soak_file_over_budget": max(s.file_bytes for s in samples) / (_DISK_MB * MIB),
    }


def _end(engine: Engine, tiers: Tiers, base: Engine, asked: Sequence[RankRequest]) -> Metrics:
    """Whether all records agree, and some answers against those of an engine without a store."""
    assert isinstance(tiers.store, Tiered)
    assert tiers.disk is not None
    tiers.store.flush()
    engine.pool.check()
    tiers.store.check()
    tiers.disk.check()
    anew = Engine(base.config, base.decoder, base.prompter, base.pool, base.model_id)
    wrong = 0
    for request in asked[:20]:
        asking = dataclasses.replace(request, user_id=None, options=RankOptions(level=Level("blocks")))
        pairs = zip(engine.rank(asking).scores, anew.rank(asking).scores, strict=True)
        wrong += max(abs(a - b) for a, b in pairs) > _CLOSE
    stats = engine.stats()
    [tier] = stats.tiers
    num_blocks = sum(stats.hits.values()) + stats.misses
    return {
        "soak_wrong_answers": wrong,
        "soak_check": 1.0,  # it raises where records differ
        "soak_store_errors": stats.store_errors + tier.errors,
        "soak_evictions_pool": stats.evictions,
        "soak_evictions_disk": tier.evictions,
        "soak_dropped": tier.dropped,
        "soak_hit_rate_pool": stats.hits.get("device", 0) / num_blocks,
        "soak_hit_rate_disk": stats.hits.get("disk", 0) / num_blocks,
    }


if __name__ == "__main__":
    main()
