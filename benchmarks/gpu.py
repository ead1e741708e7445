"""What does reuse beyond the prefix gain on a GPU, and how near is each part to what the GPU can do?

One prepared call, `python -m benchmarks.gpu`, for at most 8 minutes on one GPU of 80 GB. Parts check that the GPU
computes what the CPU does: `logits`, `levels`, `beams`, `drafts`. The others measure, in the shapes of Qwen3-0.6B and
Qwen3-8B with random weights in bf16: `ttft` by size of the prompt, `batch`, `attention` alone, `beam` steps,
`saturation`, `prefetch` from host memory, `speculation`, the same prompts on `peers`, and `weights` in int8. They run
in the order of PARTS, each is written as it ends, none begins after `MINUTES`, and one that fails is told of.

Ceiling: bytes that must be read over the bandwidth, or FLOPs over the rate of a large product, whichever takes longer;
both are measured in the same call. `floor_share` is that over the time, so 1 is the ceiling.

`--dry-run` proves the script on a CPU: every part and every metric at mini size, with the kernels in Triton's
interpreter. Its times mean nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.harness import Options, console, options, run_parts

QUESTION = "TTFT, throughput, beams, drafts and attention on a GPU, each beside its ceiling, and that results are right"
CHECKS = ("logits", "levels", "beams", "drafts")
PARTS = (  # in this order: what decides most comes first
    *("ceilings", "logits", "levels", "ttft", "batch", "beam", "beams", "drafts", "attention", "saturation"),
    *("prefetch", "weights", "speculation", "peers"),
)
MINUTES = 7.0


def main() -> None:
    run(options("gpu", QUESTION, PARTS, dry_run=True))


def run(chosen: Options) -> None:
    """Runs the parts that were chosen. Imports Triton, whose interpreter is chosen before."""
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks import gpu_checks, gpu_parts, gpu_prefetch, gpu_weights  # noqa: PLC0415 (see above)
    from benchmarks.gpu_setup import MINI, REAL  # noqa: PLC0415

    scale = MINI if chosen.dry_run else REAL
    started = time.monotonic()

    def in_time(name: str, part: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        if time.monotonic() - started > MINUTES * 60:
            console.print(f"[yellow]{name} is left out: {MINUTES:.0f} minutes are over")
            return {f"left_out_{name}": 1}
        begun = time.monotonic()
        try:
            metrics = part()
        except Exception:  # one call is all that there may be: the other parts go on
            console.print_exception(max_frames=8)
            return {f"failed_{name}": 1}
        console.print(f"{name}: {time.monotonic() - begun:.1f} s")
        return {**metrics, f"seconds_{name}": time.monotonic() - begun}

    ceilings = gpu_parts.ceilings_of(scale)
    others = {"prefetch": gpu_prefetch, "weights": gpu_weights}
    parts: dict[str, Callable[[], Mapping[str, float]]] = {"ceilings": ceilings.metrics}
    for name in PARTS[1:]:
        module = gpu_checks if name in CHECKS else others.get(name, gpu_parts)
        arguments = (scale, chosen) if name in CHECKS else (scale, ceilings, chosen)
        parts[name] = partial(getattr(module, name), *arguments)
    run_parts("gpu", QUESTION, chosen, {name: partial(in_time, name, part) for name, part in parts.items()})


if __name__ == "__main__":
    main()
