"""Which attention backend wins where: number of fresh tokens × number of segments, with and without compiled kernels?

Regime: one forward pass of SmolLM2-135M's shape with random weights over segments of 80 tokens, every fresh row
seeing every segment, fp32 compute over fp16 KV. Ceiling: FLOPs / GEMM rate at that row count + KV bytes / bandwidth.
The rule that `rcllm.model.attend.choose.prepare` applies is read off this table.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.harness import median_seconds, options, report, show
from benchmarks.ttft import floor_seconds, gemm_rate
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.ceilings import measure_bandwidth
from rcllm.model.decoder import Decoder, Pass
from rcllm.model.pull import pull
from rcllm.model.weights import load_model

QUESTION = "Forward pass of each attention backend over its floor, by fresh tokens and segments"
FRESH = (1, 8, 32, 64, 128)
SEGMENTS = (1, 10, 20, 40)
LENGTH = 80


def main() -> None:
    chosen = options("attend", QUESTION)
    spec, weights = load_model(pull("smollm2-135m-instruct"))
    decoders = {
        "kernel": Decoder(spec, weights, "segmented"),
        "gather": Decoder(spec, weights, "gather"),
        "segmented": Decoder(spec, weights, "segmented"),
    }
    decoders[
        "segmented"
    ].kernels = None  # torch attention; the same layers around each, so that attention alone differs
    bandwidth, rows = measure_bandwidth(), []
    metrics: dict[str, float] = {}
    generator = torch.Generator().manual_seed(chosen.seed)
    for fresh in FRESH[1::2] if chosen.quick else FRESH:
        rate = gemm_rate(fresh, spec)
        for count in SEGMENTS[1::2] if chosen.quick else SEGMENTS:
            work = make_pass(decoders["kernel"], fresh, count, generator)
            floor = floor_seconds(spec, work, rate, bandwidth)
            took = {
                name: median_seconds(decoder.forward, work, 3 if chosen.quick else 7)
                for name, decoder in decoders.items()
            }
            metrics |= {f"floor_ratio_{name}_f{fresh}_s{count}": value / floor for name, value in took.items()}
            best = min(took, key=lambda name: took[name])
            rows.append([str(fresh), str(count), f"{floor * 1e3:.1f}"])
            rows[-1] += [*(f"{value * 1e3:.1f} ({value / floor:.2f}×)" for value in took.values()), best]
    columns = ["fresh", "segments", "floor ms", "compiled, in place", "torch gather", "torch segmented", "best"]
    show("One forward pass, ms (times its floor)", columns, rows)
    report("attend", QUESTION, chosen, metrics)


def make_pass(decoder: Decoder, fresh: int, count: int, generator: torch.Generator) -> Pass:
    spec = decoder.spec
    shape = (spec.num_layers, 2, spec.num_kv_heads, LENGTH, spec.head_dim)
    segments = tuple(
        Segment(torch.randn(shape, generator=generator).half(), i * LENGTH, 0, LENGTH, i) for i in range(count)
    )
    sees = np.tri(count + 1, k=-1, dtype=bool)
    group = Group(segments, np.full(fresh, count, np.int32), np.arange(fresh, dtype=np.int32), sees)
    ids = torch.randint(0, spec.vocab_size, (fresh,), generator=generator)
    return Pass(ids, torch.arange(fresh) + count * LENGTH, (group,), torch.tensor([fresh - 1]))


if __name__ == "__main__":
    main()
