"""A service over a store that fails: rankings, warming, updates, erasures and restarts at once.

Each thread owns some items and a user, whom it alone changes, so that it knows what each of its answers must be: what
an engine without a store says of the same texts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from rcllm.core.ranking import Item, ItemId, RankRequest, UserId
from rcllm.engine.engine import Engine
from rcllm.errors import ErasureError, StoreError
from rcllm.store.disk import DiskStore
from rcllm.store.faulty import Faults, FaultyStore
from rcllm.store.tiered import Tiered
from tests.conftest import assert_no_pins
from tests.engine import tiny
from tests.engine.test_restart import Trusted

THREADS, POOL_TOKENS, DISK_BYTES = 4, 700, 1 << 20
FAULTS = Faults(failed=0.03, slow=0.1, slow_s=0.001, dropped=0.05, lost=0.05, flipped=0.03, truncated=0.03)

pytestmark = pytest.mark.usefixtures("one_compute_thread")


@dataclass(frozen=True)
class Seen:
    """An answer, and the texts that it was given."""

    asked: RankRequest
    versions: tuple[int, ...]  # of its thread's items
    scores: tuple[float, ...]


@dataclass
class Worker:
    """One thread's part. Its items read as their version says, here and in no other thread."""

    me: int
    rng: Random
    versions: list[int] = field(default_factory=lambda: [0, 0, 0])
    seen: list[Seen] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    erased: bool = True  # nothing of the user was computed since

    @property
    def item_ids(self) -> list[ItemId]:
        return [tiny.IDS[3 * self.me + n] for n in range(3)]

    def run(self, engine: Engine, until: float) -> None:
        while time.monotonic() < until:
            act = self.rng.choices([self.rank, self.rank_as_user, self.warm, self.upsert, self.erase], [8, 4, 1, 2, 1])
            act[0](engine)
            self.counts[act[0].__name__] += 1

    def rank(self, engine: Engine) -> None:
        shared = self.rng.sample(range(20, 26), 2)
        asked = tiny.request((3 * self.me, 3 * self.me + 1, *shared), (30, 31), user=None)
        self.note(asked, tuple(engine.rank(asked).scores))

    def rank_as_user(self, engine: Engine) -> None:
        words = (f"what user {self.me} said", "and more")
        asked = tiny.request((3 * self.me, 3 * self.me + 2), words, user=f"user-{self.me}", level="exact")
        answer = engine.rank(asked)
        if self.erased:
            history = {block.source for block in answer.receipt.blocks if block.kind == "history"}
            assert history == {"fresh"}, f"an erased user was read from {history}"
        self.erased = False
        self.note(asked, tuple(answer.scores))

    def note(self, asked: RankRequest, scores: tuple[float, ...]) -> None:
        self.seen.append(Seen(asked, tuple(self.versions), scores))

    def warm(self, engine: Engine) -> None:
        engine.warm(self.rng.sample(tiny.IDS[12:50], 6))

    def upsert(self, engine: Engine) -> None:
        which = self.rng.randrange(3)
        self.versions[which] = 1 - self.versions[which]
        try:
            engine.upsert_items([text_of(self.item_ids[which], self.versions[which])])
        except ErasureError:
            self.counts["not erased"] += 1  # the text is new all the same

    def erase(self, engine: Engine) -> None:
        while True:
            try:
                engine.erase_user(UserId(f"user-{self.me}"))
                break
            except (ErasureError, StoreError):
                continue
        self.erased = True


def text_of(item_id: ItemId, version: int) -> Item:
    item = tiny.catalogue()[item_id]
    return replace(item, fields={"title": f"quite another thing than {item_id}"}) if version else item


@contextmanager
def serving(folder: Path, workers: list[Worker], rng: Random) -> Iterator[Engine]:
    """An engine that was just started over what earlier ones left; what it leaves agrees with itself."""
    disk = DiskStore.open(folder, DISK_BYTES)
    tiers = Tiered({"disk": FaultyStore(disk, FAULTS, rng)}, queue_bytes=1 << 20, clock=lambda: 100 * time.monotonic())
    items = dict(tiny.catalogue())
    for worker in workers:
        items |= {i: text_of(i, v) for i, v in zip(worker.item_ids, worker.versions, strict=True)}
    engine = tiny.fresh(pool_tokens=POOL_TOKENS, store=tiers, items=items)
    engine.pool.rates.bytes_of["disk"] = Trusted(1e15)
    yield engine
    assert_no_pins(engine)
    engine.close()
    tiers.flush()
    tiers.check()
    disk.check()
    assert disk.stats()[0].num_bytes <= DISK_BYTES
    tiers.close()


def check_answers(workers: list[Worker]) -> int:
    """Every answer against an engine that has no store; returns how many different ones there were."""
    wanted: dict[tuple[int, str, tuple[int, ...]], tuple[float, ...]] = {}
    for worker in workers:
        for seen in worker.seen:
            name = (worker.me, repr(seen.asked), seen.versions)
            if name not in wanted:
                items = {i: text_of(i, v) for i, v in zip(worker.item_ids, seen.versions, strict=True)}
                wanted[name] = tuple(tiny.fresh(items=dict(tiny.catalogue()) | items).rank(seen.asked).scores)
            assert np.allclose(seen.scores, wanted[name], atol=1e-5), name
    return len(wanted)


def load(folder: Path, seconds: float, restarts: int) -> None:
    rng = Random(1)
    workers = [Worker(me, Random(10 + me)) for me in range(THREADS)]
    hits: Counter[str] = Counter()
    for _ in range(restarts):
        with serving(folder, workers, rng) as engine, ThreadPoolExecutor(THREADS) as threads:
            until = time.monotonic() + seconds / restarts
            for outcome in [threads.submit(worker.run, engine, until) for worker in workers]:
                outcome.result(timeout=seconds + 60)
            hits.update(engine.stats().hits)
    done = {name: sum(worker.counts[name] for worker in workers) for name in ("rank", "warm", "upsert", "erase")}
    assert all(count >= 10 for count in done.values()), done
    assert hits["disk"] > 0, hits
    assert check_answers(workers) > 20


@pytest.mark.filterwarnings("ignore::rcllm.errors.StoreWarning")
def test_answers_are_those_without_a_store(tmp_path: Path) -> None:
    load(tmp_path / "store", seconds=3.0, restarts=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::rcllm.errors.StoreWarning")
def test_the_same_for_a_minute(tmp_path: Path) -> None:
    load(tmp_path / "store", seconds=60.0, restarts=12)
