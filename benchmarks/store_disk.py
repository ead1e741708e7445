"""What does a block cost on disk: written, found, read warm and cold, beside plain files of the same bytes?

Regime: blocks of 2 MB, as 90 tokens of SmolLM2-135M in fp16 are, put in batches; small ones for the cost per key. Reads
take the checksum of every block, in place. Ceiling: the disk for writes and cold reads, XXH3 over memory for warm ones.
Every ratio is taken within one run on one file system.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.harness import Metrics, Options, options, report, show, timed
from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Stored
from rcllm.store.disk import DiskStore
from rcllm.store.sealed import finish, open_sealed, seal

QUESTION = "Cost of blocks on disk beside plain files: write, look up, read warm and cold, open, churn"
_BATCH = 32
_BUDGET = 1 << 40
_FORGET = """
import os, sys
for name in sys.argv[1:]:
    os.posix_fadvise(os.open(name, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
"""


def main() -> None:
    chosen = options("store_disk", QUESTION)
    metrics = measure(chosen)
    show("Blocks on disk", ["what", "figure"], [[name, f"{value:.4g}"] for name, value in metrics.items()])
    report("store_disk", QUESTION, chosen, metrics)


def measure(chosen: Options) -> Metrics:
    """All figures; about a minute, half of it the disk's."""
    large, small = (300, 20_000) if chosen.quick else (1_500, 100_000)
    with place() as folder:
        beside_files = measure_beside_files(folder, large, 2_000_000, chosen.seed)
    with place() as folder:
        per_key = measure_per_key(folder, small, chosen.seed)
    with place() as folder:
        churn = measure_churn(folder, 200 if chosen.quick else 1_000, chosen.seed)
    return {**beside_files, **per_key, **churn}


@contextmanager
def place() -> Iterator[Path]:
    """A folder on the file system of this checkout, for `/tmp` may be memory."""
    folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent, prefix=".store-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def key(number: int) -> ContentKey:
    return ContentKey(random.Random(number).randbytes(32))


def block(number: int, num_bytes: int) -> Stored:
    out, kv = seal("fp16", (1, 1, 1, 1, num_bytes // 2))
    np.frombuffer(kv, np.uint32)[:] = np.arange(num_bytes // 4, dtype=np.uint32) * np.uint32(number + 1)
    return Stored(finish(out), float(number + 1), f"item:{number % 1_000}", "benchmark")


def measure_beside_files(folder: Path, count: int, num_bytes: int, seed: int) -> Metrics:
    """GB/s of `count` blocks, put and read in batches, against as many files, each written and synchronised."""
    files = folder / "files"
    files.mkdir()
    (folder / "store").mkdir()
    order = list(range(count))
    random.Random(seed).shuffle(order)
    gigabytes = count * num_bytes / 1e9
    with DiskStore.open(folder / "store", _BUDGET) as store:
        write_s = sum(timed(store.put_many, batch)[0] for batch in _made(range(count), num_bytes))
        file_write_s = sum(
            timed(lambda each: _write_files(files, each), batch)[0] for batch in _made(range(count), num_bytes)
        )
        warm_s, _ = timed(lambda which: read_all(store, which), order)
    drop_cache(folder / "store" / "data.mdb", *files.iterdir())
    with DiskStore.open(folder / "store", _BUDGET) as store:
        cold_s, _ = timed(lambda which: read_all(store, which), order)
    file_cold_s, _ = timed(lambda which: _read_files(files, which), order)
    return {
        "write_gb_s": gigabytes / write_s,
        "write_gb_s_files": gigabytes / file_write_s,
        "write_ratio_vs_files": file_write_s / write_s,
        "read_warm_gb_s": gigabytes / warm_s,
        "read_cold_gb_s": gigabytes / cold_s,
        "read_cold_gb_s_files": gigabytes / file_cold_s,
    }


def measure_per_key(folder: Path, count: int, seed: int) -> Metrics:
    """Microseconds per block among `count` small ones, and what it takes to open the store."""
    metrics: dict[str, float] = {}
    with DiskStore.open(folder, _BUDGET) as store:
        put_s = sum(timed(store.put_many, batch)[0] for batch in _made(range(count), 400, 1_000))
        metrics["put_us"] = put_s / count * 1e6
    keys = [key(number) for number in range(count)]
    random.Random(seed).shuffle(keys)
    absent = [key(number) for number in range(count, 2 * count)]
    open_s, store = timed(lambda where: DiskStore.open(where, _BUDGET), folder)
    with store:
        batches = [keys[first : first + _BATCH] for first in range(0, len(keys), _BATCH)]
        metrics |= {
            "open_ms": open_s * 1e3,
            "lookup_us": timed(lambda each: [store.lookup_many(batch) for batch in each], batches)[0] / count * 1e6,
            "get_us": timed(lambda each: [len(store.get_many(batch)) for batch in each], batches)[0] / count * 1e6,
            "lookup_absent_us": timed(store.lookup_many, absent)[0] / count * 1e6,
        }
    return metrics


def measure_churn(folder: Path, count: int, seed: int) -> Metrics:
    """The file against its content, after blocks of many sizes took one another's place ten times over."""
    rng = random.Random(seed)
    budget = count // 10 * 400_000
    with DiskStore.open(folder, budget) as store:
        ratios = []
        for number in range(count):
            store.put_many({key(number): block(number, 4 * rng.randrange(2_000, 200_000))})
            if number > count // 2:
                ratios.append(store.use().file_bytes / store.stats()[0].num_bytes)
        return {"file_over_content_median": float(np.median(ratios)), "file_over_content_last": ratios[-1]}


def read_all(store: DiskStore, numbers: Sequence[int]) -> None:
    """As an engine does: a batch is looked up, which announces it, and then read where it lies."""
    for first in range(0, len(numbers), _BATCH):
        keys = [key(number) for number in numbers[first : first + _BATCH]]
        store.lookup_many(keys)
        found = store.get_many(keys)
        assert len(found) == len(keys)
        for stored in found.values():
            open_sealed(stored.data)


def drop_cache(*files: Path) -> None:
    """Lets the system forget pages of files that nobody has mapped."""
    os.sync()
    for first in range(0, len(files), 500):
        subprocess.run([sys.executable, "-c", _FORGET, *map(str, files[first : first + 500])], check=True)


def _made(numbers: Sequence[int], num_bytes: int, batch: int = _BATCH) -> Iterator[dict[ContentKey, Stored]]:
    for first in range(0, len(numbers), batch):
        yield {key(number): block(number, num_bytes) for number in numbers[first : first + batch]}


def _write_files(folder: Path, blocks: dict[ContentKey, Stored]) -> None:
    """As safe as a commit, and synchronised as seldom: a batch is on the disk, and then has its names."""
    partials = {name: folder / f"{name.hex()}.partial" for name in blocks}
    for name, partial in partials.items():
        partial.write_bytes(blocks[name].data)
    for name, partial in partials.items():
        with partial.open("rb") as written:
            os.fdatasync(written.fileno())
        partial.rename(folder / name.hex())


def _read_files(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        open_sealed(memoryview((folder / key(number).hex()).read_bytes()))


if __name__ == "__main__":
    main()
