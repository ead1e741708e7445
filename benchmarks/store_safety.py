"""Does a store serve a wrong block after its process was killed, or a wrong answer from a file with a flipped bit?

Regime, kill -9: a process puts blocks of 20 to 400 KB, written behind as an engine's are, reads, evicts, erases and
opens anew; it is killed at a random moment, all runs in one folder. Then every block that is served is compared byte by
byte. Regime, flips: a store with the blocks of a few real requests (SmolLM2-135M). One bit of a copy is flipped, half
of the times anywhere, half in the trees of its keys. An engine opens it and ranks; its scores are held against those of
an engine without a store, and every block that is served against what was put. Wanted: no wrong one. Ceiling: none.

A power cut is not tested: a killed process leaves its writes to the system, which a machine without power does not.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.harness import ROOT, Metrics, Options, dataset, options, run_parts, show
from benchmarks.store_disk import place
from benchmarks.store_setup import SET, at_blocks
from benchmarks.store_victim import BUDGET_BYTES, NUM_KEYS, key, num_wrong
from rcllm.cache.pool import Pool
from rcllm.config import MIB, CacheConfig, Config, PromptConfig
from rcllm.core.ranking import ContentKey, RankRequest
from rcllm.data import build_requests
from rcllm.engine.engine import Engine
from rcllm.engine.prefill import keys_of
from rcllm.errors import RcllmError, StoreError
from rcllm.store.disk import DiskStore, pages
from rcllm.store.sealed import is_whole
from rcllm.store.tiered import Tiered

QUESTION = "Wrong blocks after kill -9, and wrong answers from files with a flipped bit"
_CLOSE = 1e-3  # between scores of the same blocks that were computed in other company
_CHUNK = 250  # flips that one process takes


def main() -> None:
    chosen = options("store_safety", QUESTION, tuple(PARTS))
    run_parts("store_safety", QUESTION, chosen, {name: partial(part, chosen) for name, part in PARTS.items()})


# ---- kill -9 ----


def kills(chosen: Options) -> Metrics:
    """One folder, one process after another."""
    runs = 20 if chosen.quick else 200
    total = Counter[str]()
    largest = 0
    with place() as folder:
        for number in range(runs):
            total.update(_kill(folder, chosen.seed + number))
            largest = max(largest, (folder / "data.mdb").stat().st_size)
    rows = [[name, f"{count:,}"] for name, count in total.items()]
    show(f"{runs} processes that were killed while they wrote", ["what", "count"], rows)
    return {
        "kill9_runs": runs,
        "kill9_wrong_blocks": total["wrong blocks"],
        "kill9_blocks_served": total["blocks served"],
        "kill9_runs_that_served": total["runs that served"],
        "kill9_refused_to_open": total["refused to open"],
        "kill9_records_that_differ": total["records that differ"],
        "kill9_largest_file_over_budget": largest / BUDGET_BYTES,
    }


def _kill(folder: Path, seed: int) -> Mapping[str, int]:
    """Kills a process at a random point; what the store serves afterwards."""
    code = f"from benchmarks.store_victim import churn; churn({str(folder)!r}, {seed})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "begins\n", "the process ended before it wrote"
        time.sleep(random.Random(seed).uniform(0.0, 0.4))
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL, f"the process ended by itself: {victim.returncode}"
    try:
        store = DiskStore.open(folder, BUDGET_BYTES)
    except StoreError:
        return {"refused to open": 1}
    with store:
        found = store.get_many(key(number) for number in range(NUM_KEYS))
        told = {"blocks served": len(found), "wrong blocks": num_wrong(found.items()), "runs that served": bool(found)}
        told["records that differ"] = not store.verify(repair=False).is_whole
        return told


# ---- flipped bits ----


def flips(chosen: Options) -> Metrics:
    """In processes of their own, for LMDB could end one that it runs in."""
    count, seed = (100 if chosen.quick else 1_000), chosen.seed
    total = Counter[str]()
    with place() as folder:
        for first in range(0, count, _CHUNK):
            last = min(first + _CHUNK, count)
            code = f"from benchmarks.store_safety import flip; flip({str(folder)!r}, {first}, {last}, {seed})"
            ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
            if ran.returncode:
                print(ran.stderr[-2000:], file=sys.stderr)
                total["processes that died"] += 1
            else:
                total.update(json.loads(ran.stdout.splitlines()[-1]))
    rows = [[name, f"{number:,}"] for name, number in total.items()]
    show(f"{count} copies of a store, each with one bit flipped", ["what", "count"], rows)
    return {
        "flips": count,
        "flips_wrong_answers": total["wrong answers"],
        "flips_wrong_blocks": total["wrong blocks"],
        "flips_processes_that_died": total["processes that died"],
        "flips_answers": total["answers"],
        "flips_equal_answers": total["equal answers"],
        "flips_refused": total["refused to open"],
        "flips_blocks_lost": total["blocks lost"],
        "flips_failed_checksums": total["failed checksums"],
    }


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A store that is as it was written, and what engines answer from it."""

    engine: Engine  # has the model
    request: RankRequest
    file: bytes
    blocks: Mapping[ContentKey, bytes]
    scores: tuple[float, ...]  # without a store
    tree_pages: tuple[int, ...]


def flip(folder: str, first: int, last: int, seed: int) -> None:
    """In a process of its own: flips one bit after another, each in a copy. Prints JSON."""
    warnings.simplefilter("ignore")
    where = Path(folder)
    whole = _whole(where / "whole", seed)
    total = Counter[str]()
    for number in range(first, last):
        data, rng = bytearray(whole.file), random.Random(f"{seed} {number}")
        if number % 2:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data[rng.choice(whole.tree_pages) * 4096 + rng.randrange(4096)] ^= 1 << rng.randrange(8)
        damaged = where / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        damaged.mkdir()
        (damaged / "data.mdb").write_bytes(data)
        total.update(_tried(damaged, whole))
    print(json.dumps(total))


def _whole(folder: Path, seed: int) -> _Whole:
    """The store, which the first process makes."""
    data = dataset(SET)
    engine = Engine.build(data.catalogue, Config(prompt=PromptConfig("titles"), cache=CacheConfig(pool_mb=300)))
    asked = build_requests(data, 4, num_candidates=6, num_history=3, min_history=3, seed=seed)
    others = [at_blocks(request) for request in asked]
    scores = engine.rank(others[0]).scores
    if not folder.exists():
        folder.mkdir()
        writing = _over(engine, Tiered({"disk": DiskStore.open(folder, 100 * MIB)}, queue_bytes=64 * MIB))
        for request in others:  # a history of several transactions
            writing.rank(request)
        writing.pool.store.close()  # what waits is written
    keys = [key for request in others for key in keys_of(engine.prompter.build(request))]
    with DiskStore.open(folder, 100 * MIB) as disk:
        blocks = {key: bytes(stored.data) for key, stored in disk.get_many(keys).items()}
    return _Whole(engine, others[0], (folder / "data.mdb").read_bytes(), blocks, scores, _tree_pages(folder))


def _over(engine: Engine, store: Tiered) -> Engine:
    """An engine on the same model, with an empty pool over a store."""
    pool = Pool(64 * MIB, engine.pool.dtype, engine.pool.device, store)
    return Engine(engine.config, engine.decoder, engine.prompter, pool, engine.model_id)


def _tried(folder: Path, whole: _Whole) -> Counter[str]:
    """What an engine answers from a damaged store, and what that serves."""
    told = Counter[str]()
    try:
        disk = DiskStore.open(folder, 100 * MIB)
    except RcllmError:
        told["refused to open"] += 1
        return told
    found = disk.get_many(whole.blocks)
    for each, stored in found.items():
        if not is_whole(stored.data):
            told["failed checksums"] += 1
        elif stored.data != whole.blocks[each]:
            told["wrong blocks"] += 1
    told["blocks lost"] += len(whole.blocks) - len(found)
    del found
    store = Tiered({"disk": disk}, queue_bytes=64 * MIB)
    scores = _over(whole.engine, store).rank(whole.request).scores
    store.close()
    told["answers"] += 1
    told["equal answers"] += scores == whole.scores
    told["wrong answers"] += max(abs(a - b) for a, b in zip(scores, whole.scores, strict=True)) > _CLOSE
    return told


def _tree_pages(folder: Path) -> tuple[int, ...]:
    """The pages of trees, of the free list, and the first two."""
    with pages.PageFile(folder / "data.mdb") as file:
        newest = file.snapshots()[0]
        main_tree = pages.walk(file, newest, newest.main)
        found = [0, 1]
        for tree in (newest.free, newest.main, *main_tree.trees):
            walked = pages.walk(file, newest, tree)
            found += [int(page) for run in walked.first[: tree.depth] for page in run]
        return tuple(found)


PARTS: dict[str, Callable[[Options], Metrics]] = {"kills": kills, "flips": flips}


if __name__ == "__main__":
    main()
