"""What a pass, a copy and a fetch take, in seconds: from a roofline of a device, or fitted to measured passes.

Knows nothing of requests or queues. A pass is seen as four numbers (`PassShape`), which add up over the requests in
it. Invariant: costs never fall when any of the four grows, and nothing is free below its fixed part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.optimize import nnls

from rcllm.errors import ConfigError, DataError
from rcllm.model.spec import ModelSpec
from rcllm.sim.hardware import Gpu, find_gpu, find_model, weight_bytes

_MIN_POINTS = 5  # four coefficients, and one point that may disagree with them


@dataclass(frozen=True, slots=True)
class PassShape:
    """What goes through the layers; rows and pairs are means over the layers, for some run for fewer tokens."""

    rows: float = 0.0  # fresh tokens
    pairs: float = 0.0  # (query, visible key)
    kv_bytes: float = 0.0  # cached KV that attention reads
    copied_bytes: float = 0.0  # of it, what first comes from host memory to the device

    def __add__(self, other: PassShape) -> PassShape:
        return PassShape(
            self.rows + other.rows,
            self.pairs + other.pairs,
            self.kv_bytes + other.kv_bytes,
            self.copied_bytes + other.copied_bytes,
        )


class Costs(Protocol):
    """Times of one node. Immutable."""

    def pass_s(self, shape: PassShape) -> float:
        """Seconds of one pass."""

    def rows_s(self, rows: float) -> float:
        """Seconds by which so many more rows lengthen a pass that is bound by computing."""

    def fetch_s(self, num_bytes: float) -> float:
        """Seconds until blocks of so many bytes have come from another node."""


@dataclass(frozen=True, slots=True)
class Network:
    """Between nodes. The default: 100 Gb/s, as in RcLLM's evaluation; its latency is not disclosed."""

    bytes_per_s: float = 12.5e9
    latency_s: float = 1e-4

    def fetch_s(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


# ---- roofline -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Roofline:
    """The slowest of computing, reading memory and copying from the host; beside a fixed part of every pass."""

    flops_per_s: float  # as reached
    memory_bytes_per_s: float
    host_bytes_per_s: float
    overhead_s: float
    weight_bytes: float
    linear_flops_per_row: float
    attention_flops_per_pair: float
    network: Network = Network()
    overlap: bool = True  # copies run beside computing; else before it

    def pass_s(self, shape: PassShape) -> float:
        flops = shape.rows * self.linear_flops_per_row + shape.pairs * self.attention_flops_per_pair
        computing = max(flops / self.flops_per_s, (self.weight_bytes + shape.kv_bytes) / self.memory_bytes_per_s)
        copying = shape.copied_bytes / self.host_bytes_per_s
        return self.overhead_s + (max(computing, copying) if self.overlap else computing + copying)

    def rows_s(self, rows: float) -> float:
        return rows * self.linear_flops_per_row / self.flops_per_s

    def fetch_s(self, num_bytes: float) -> float:
        return self.network.fetch_s(num_bytes)


@dataclass(frozen=True, slots=True)
class Anchor:
    """A measured full prefill."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Reached:
    """How near a device comes to its data sheet."""

    share: float  # of its FLOP/s in a long prefill
    overhead_s: float  # fixed part of a pass


# RcLLM, Fig. 1c, read off the curves (± 5 %); how many GPUs ran the larger model there is not said, its evaluation
# takes four.
ANCHORS: Mapping[str, tuple[str, int, Anchor, Anchor]] = {
    "qwen3-8b": ("a100", 1, Anchor(1_000, 0.10), Anchor(10_000, 1.05)),
    "qwen2.5-72b": ("a100", 4, Anchor(1_000, 0.50), Anchor(10_000, 4.50)),
}


def anchored(spec: ModelSpec, gpu: Gpu, num_gpus: int, one: Anchor, other: Anchor) -> Reached:
    """The share and the fixed part for which both prefills take as long as they were measured to.

    t(n) = overhead + flops(n) / (share · peak): two equations, two unknowns.
    """
    flops = [prefill_flops(spec, anchor.tokens) for anchor in (one, other)]
    rate = (flops[1] - flops[0]) / (other.seconds - one.seconds)
    overhead = one.seconds - flops[0] / rate
    assert min(rate, overhead) > 0, f"anchors that no roofline has: {rate} FLOP/s, {overhead} s"
    return Reached(rate / (gpu.flops_per_s * num_gpus), overhead)


def reached(model: str) -> Reached:
    """What RcLLM's anchors say for a model; of a model that it did not measure, what they say for the 8B one."""
    named = model if model in ANCHORS else "qwen3-8b"
    gpu, num_gpus, one, other = ANCHORS[named]
    return anchored(find_model(named), find_gpu(gpu), num_gpus, one, other)


def roofline(
    model: str, gpu: str, num_gpus: int = 1, network: Network | None = None, *, overlap: bool = True
) -> Roofline:
    """Of a model on `num_gpus` devices that work as one (tensor parallel). Raises ConfigError.

    The share of the peak that RcLLM's anchors give for an A100 is taken for every device.
    """
    spec, device, found = find_model(model), find_gpu(gpu), reached(model.lower())
    if weight_bytes(spec) > device.memory_bytes * num_gpus:
        raise ConfigError(
            f"{model} has {weight_bytes(spec) / 1e9:.0f} GB of weights, more than {num_gpus} × {gpu} hold "
            f"({device.memory_bytes * num_gpus / 1e9:.0f} GB): give more GPUs per node"
        )
    return Roofline(
        flops_per_s=device.flops_per_s * num_gpus * found.share,
        memory_bytes_per_s=device.memory_bytes_per_s * num_gpus,
        host_bytes_per_s=device.host_bytes_per_s * num_gpus,
        overhead_s=found.overhead_s,
        weight_bytes=weight_bytes(spec),
        linear_flops_per_row=spec.linear_flops_per_token,
        attention_flops_per_pair=spec.attention_flops(1),
        network=network or Network(),
        overlap=overlap,
    )


def prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """Of a causal prefill; without the logits, which are read at one position."""
    return float(tokens * spec.linear_flops_per_token + spec.attention_flops(tokens * (tokens + 1) // 2))


# ---- fitted ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One measured pass."""

    shape: PassShape
    seconds: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fixed part, and seconds per row, pair and byte of cached KV; none is negative."""

    overhead_s: float
    row_s: float
    pair_s: float
    byte_s: float
    residual: float  # root mean square of (fitted − measured) / measured
    worst: float  # the largest of them
    num_points: int
    network: Network = Network()

    def pass_s(self, shape: PassShape) -> float:
        varying = shape.rows * self.row_s + shape.pairs * self.pair_s + shape.kv_bytes * self.byte_s
        return self.overhead_s + varying

    def rows_s(self, rows: float) -> float:
        return rows * self.row_s

    def fetch_s(self, num_bytes: float) -> float:
        return self.network.fetch_s(num_bytes)


def fit(points: Sequence[Point], network: Network | None = None) -> Fitted:
    """Least squares of relative errors, no coefficient below zero. Raises DataError for too few points."""
    if len(points) < _MIN_POINTS:
        raise DataError(f"expected at least {_MIN_POINTS} measured passes to fit a cost model to, got {len(points)}")
    shapes = np.array([[1.0, p.shape.rows, p.shape.pairs, p.shape.kv_bytes] for p in points])
    seconds = np.array([p.seconds for p in points])
    relative = shapes / seconds[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(relative / scale, np.ones(len(points)))
    coefficients = found / scale
    errors = np.abs(shapes @ coefficients / seconds - 1)
    overhead_s, row_s, pair_s, byte_s = coefficients.tolist()
    return Fitted(
        overhead_s,
        row_s,
        pair_s,
        byte_s,
        residual=float(np.sqrt((errors**2).mean())),
        worst=float(errors.max()),
        num_points=len(points),
        network=network or Network(),
    )


def read_points(path: Path) -> list[Point]:
    """The passes in a file that `benchmarks.pass_costs` wrote: flat metrics `point_N_…`. Raises DataError."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        count = int(metrics["num_points"])
        return [_point(metrics, f"point_{number}_") for number in range(count)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected a result of `python -m benchmarks.pass_costs`, with metrics num_points and "
            f"point_0_rows, …_pairs, …_kv_bytes, …_ms; got {type(error).__name__}: {error}"
        ) from error


def _point(metrics: Mapping[str, float], prefix: str) -> Point:
    shape = PassShape(*(metrics[prefix + name] for name in ("rows", "pairs", "kv_bytes")))
    return Point(shape, metrics[prefix + "ms"] / 1e3)
