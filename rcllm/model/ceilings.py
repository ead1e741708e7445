"""What this machine is, and what it can do at most: the ceilings that measured times are held against.

Knows nothing of requests or caches. Invariant: rates are measured here and now, with the libraries and thread count
that the engine uses, never looked up; on a machine that others use, they are what is left of it.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from rcllm.model.attend.native import Kernels, kernels
from rcllm.model.layers import Linear
from rcllm.model.ops import torch_linear
from rcllm.model.packed import PACKINGS
from rcllm.model.spec import ModelSpec

_BEYOND_CACHES = 192 << 20  # bytes of weights that a pass streams, so that it finds none of them in a cache
_READ_BYTES = 256 << 20
_REPEATS = 5
_PACKINGS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
_PAIRS = 15  # products in a narrow dtype and in fp32, in turn
_SECONDS = 0.6  # per shape and way: enough repetitions for a median, few enough for `rcllm doctor`
_CGROUPS = Path("/sys/fs/cgroup")  # a container finds its own limits there
_MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of version 2, which may say "max", and of version 1


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures of a run depend on."""

    cpu: str
    num_cores: int  # that this process may use
    num_threads: int  # that torch uses
    memory_bytes: int
    instruction_set: str  # the widest that torch's own kernels use here
    cuda_device: str | None
    torch_version: str


def describe_hardware() -> Machine:
    """The machine as this process sees it."""
    return Machine(
        cpu=_cpu_name(),
        num_cores=_cores(),
        num_threads=torch.get_num_threads(),
        memory_bytes=usable_memory_bytes(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        cuda_device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        torch_version=torch.__version__,
    )


def usable_memory_bytes(cgroups: Path = _CGROUPS) -> int:
    """The memory that this process may use, which in a container may be less than the machine has."""
    told = (path.read_text().strip() for name in _MEMORY_LIMITS if (path := cgroups / name).is_file())
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in told if limit.isdecimal())])


@torch.inference_mode()
def measure_gemm(rows: int, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """GFLOP/s of the model's four linear shapes (qkv, o, gate_up, down) at `rows` fresh tokens, as in one layer.

    For each shape the faster of two ways counts: `F.linear`, and on the CPU the kernels' product with a packed matrix,
    in fp32, bf16 or int8, where torch has none. The rate is the FLOPs of a layer over the sum of the shapes' median
    times, so shapes weigh by what they cost. As in a forward pass, weights come from memory: successive products use
    different copies of them.
    """
    shapes = {
        "qkv": (spec.q_size + 2 * spec.kv_size, spec.hidden_size),
        "o": (spec.hidden_size, spec.q_size),
        "gate_up": (2 * spec.ffn_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.ffn_size),
    }
    seconds = sum(_fastest(rows, shape, spec.num_layers, dtype, torch.device(device)) for shape in shapes.values())
    flops = sum(2 * rows * out * inner for out, inner in shapes.values())
    return flops / seconds / 1e9


@torch.inference_mode()
def measure_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes/s at which memory is read: the sum of an fp32 array of 256 MiB by all of torch's threads, median of five.

    Reading is what attention over cached KV does; a copy, which also writes, moves about half of this.
    """
    where = torch.device(device)
    values = torch.ones(_READ_BYTES // 4, device=where)
    values.sum()
    return _READ_BYTES / median(_timed(lambda: values.sum(), where) for _ in range(_REPEATS))


def _fastest(rows: int, shape: tuple[int, int], num_layers: int, dtype: torch.dtype, device: torch.device) -> float:
    """Median seconds of one product [rows, in] · [in, out] by the fastest way."""
    out, inner = shape
    copies = min(num_layers, math.ceil(_BEYOND_CACHES / (out * inner * dtype.itemsize)))
    x, compiled = torch.randn(rows, inner, device=device), kernels()

    def seconds(make: Callable[[torch.Tensor], Linear], inputs: torch.Tensor) -> float:
        return _median_seconds([make(torch.randn(out, inner, device=device)) for _ in range(copies)], inputs, device)

    found = []
    if dtype.is_floating_point:
        found.append(seconds(lambda weight: torch_linear(weight.to(dtype), None), x.to(dtype)))
    if dtype in _PACKINGS and device.type == "cpu" and (compiled or not found):  # else torch has been asked already
        found.append(seconds(lambda weight: _product(weight, _PACKINGS[dtype], compiled), x))
    return min(found)


def _product(weight: torch.Tensor, packing: str, compiled: Kernels | None) -> Linear:
    """Of the kernels, or of torch where there are none."""
    return PACKINGS[packing](compiled, weight, None) if compiled else torch_linear(weight, None, packing)


@torch.inference_mode()
def measure_narrow(products: str, spec: ModelSpec, rows: int, compiled: Kernels | None) -> float:
    """How many times as quick as in fp32 the model's largest product is in bf16 or int8 here; the median of pairs.

    compiled: the kernels, or None where torch alone computes the model.
    """
    weight, x = torch.randn(2 * spec.ffn_size, spec.hidden_size), torch.randn(rows, spec.hidden_size)
    wide, narrow = (_product(weight, name, compiled) for name in ("fp32", products))
    cpu = torch.device("cpu")
    for product in (wide, narrow):
        product(x)
    return median(_timed(lambda: wide(x), cpu) / _timed(lambda: narrow(x), cpu) for _ in range(_PAIRS))


def _median_seconds(products: list[Linear], x: torch.Tensor, device: torch.device) -> float:
    products[0](x)  # the first call plans
    times: list[float] = []
    while len(times) < _REPEATS or (sum(times) < _SECONDS and len(times) < 40 * _REPEATS):
        product = products[len(times) % len(products)]
        times.append(_timed(lambda product=product: product(x), device))  # type: ignore[misc]
    return median(times)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds; waits for a GPU, whose calls return before they are done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cores() -> int:
    """Those that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
