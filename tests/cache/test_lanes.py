"""The lane of a GPU, told to a stand-in for CUDA that writes down what is asked of it; and memory that is locked."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rcllm.cache.lanes import AtOnce, Beside, Copy, lanes_of
from rcllm.cache.pinned import page_locked
from rcllm.cache.rates import Rate, Rates
from rcllm.errors import ConfigError, StoreWarning

GPU = torch.device("cuda")


class Cuda:
    """Streams and events by name, and what was asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.passed: set[int] = set()  # events, by number
        self.events = 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "lane"))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, "compute"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.told.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.cuda.told.append(f"host waits for {self.name}")

    def __enter__(self) -> None:
        self.cuda.told.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.cuda.told.append(f"off {self.name}")


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.number = cuda, cuda.events
        cuda.events += 1

    def record(self, stream: Stream) -> None:
        self.cuda.told.append(f"event {self.number} on {stream.name}")

    def query(self) -> bool:
        return self.number in self.cuda.passed

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end.number - self.number)  # ms


class Told:
    """A tensor that says when it is copied to."""

    nbytes = 8

    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def copy_(self, source: object, non_blocking: bool = False) -> None:
        assert non_blocking
        if self.name == "broken":
            raise RuntimeError("no memory, for a test")
        self.cuda.told.append(f"copy to {self.name}")


def parts(cuda: Cuda, *names: str) -> list[list[Any]]:
    return [[SimpleNamespace(to=Told(cuda, each), source=None) for each in part] for part in names]


def test_copies_begin_after_what_is_computed_and_a_mark_is_behind_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    marks = Beside(GPU, Rate(1.0)).send(parts(cuda, "ab", "cd"))
    assert cuda.told == [
        *("lane waits for compute", "event 0 on lane", "on lane"),
        *("copy to a", "copy to b", "event 1 on lane", "copy to c", "copy to d", "event 2 on lane", "off lane"),
    ]
    assert [mark.number for mark in marks] == [1, 2]  # type: ignore[attr-defined]


def test_what_is_copied_stays_alive_until_it_is_over_and_tells_how_fast_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, rate = Cuda(monkeypatch), Rate(1.0)
    lane = Beside(GPU, rate)
    lane.send(parts(cuda, "a", "b"))
    lane.send(parts(cuda, "c"))
    assert [len(each.parts) for each in lane._under_way] == [2, 1]
    cuda.passed |= {0, 1, 2}
    lane.send(parts(cuda, "d"))
    assert [len(each.parts) for each in lane._under_way] == [1, 1]
    assert rate.per_s == pytest.approx(16 / 2.0), "two copies of 8 bytes in 2 s"


def test_where_a_copy_cannot_be_begun_none_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    lane = Beside(GPU)
    with pytest.raises(RuntimeError):
        lane.send([*parts(cuda, "a"), [SimpleNamespace(to=Told(cuda, "broken"), source=None)]])
    assert cuda.told[-1] == "host waits for lane"
    assert not lane._under_way


def test_on_the_cpu_copies_have_ended_at_once() -> None:
    lanes = lanes_of(torch.device("cpu"), None)
    assert isinstance(lanes.up, AtOnce)
    source, to = torch.arange(6.0).view(2, 3), torch.zeros(2, 3)
    assert lanes.up.send([[Copy(to[:1], source[:1])], [Copy(to[1:], source[1:])]]) == []
    assert torch.equal(to, source)
    assert lanes.up.ready(source) is source
    assert lanes.down.host_room(5).nbytes == 5


def test_the_way_to_a_gpu_counts_beside_its_tier() -> None:
    rates = Rates(on_gpu=True)
    assert rates.up is not None
    rates.up.saw(1e9, 0.1)
    assert rates.fetch_ms("disk", 1_000_000) == pytest.approx(Rates().fetch_ms("disk", 1_000_000) + 0.1)
    assert rates.fetch_ms("device", 1_000_000) == 0.0
    assert "host to GPU 10.00 GB/s, computing" in rates.told()
    assert rates.timed() == {"up_bytes_per_s": 1e10}
    assert "GPU" not in Rates().told()


@pytest.mark.parametrize("refused", [0, 2])
def test_memory_is_locked_as_it_is_or_a_warning_says_why_not(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, num_bytes, flags: told.append(("lock", address)) or refused,
        cudaHostUnregister=lambda address: told.append(("unlock", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", lambda *given, **more: told.append(("kernel", 0)))
    if refused:
        with pytest.warns(StoreWarning, match="refuses to lock 0.0 GB of host memory"):
            memory = page_locked(1000)
    else:
        memory = page_locked(1000)
    assert memory.dtype == np.uint8
    assert memory.nbytes == 1000
    address = memory.ctypes.data
    assert told == [("lock", address), *([("kernel", 0)] if refused else [])]
    view = memory[10:].data
    del memory
    gc.collect()
    assert len(told) == 1 + bool(refused), "somebody still has some of it"
    del view
    gc.collect()
    assert told[1 + bool(refused) :] == ([] if refused else [("unlock", address)])


def test_more_memory_than_there_is_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"host memory: .* Lower store.host_mb"):
        page_locked(1 << 60)
