"""Compiles the GPU kernels to machine code, which needs no GPU, and says what each takes, as one line of JSON.

`python -m tests.model.compile_kernels ARCH DTYPE`, with TRITON_INTERPRET=0: a kernel is interpreted or compiled, never
both in one process. ARCH: 80, 90, …; DTYPE: of cached KV and, but for int8 and all, of the rows.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rcllm.decode import beam_kernels
from rcllm.model import layer_kernels, level_kernels
from rcllm.model.attend import triton_in_place, triton_kernels, triton_laid, triton_laid_kernels, triton_way
from rcllm.model.attend.triton_tables import KINDS, Tiling
from rcllm.model.level_products import LevelProduct, ProductTiling
from rcllm.model.ops import TritonOps
from rcllm.model.quantised import GROUP, Quantised
from rcllm.model.rope import Rope
from tests.model.test_attention import SPEC

QWEN3_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 4096, "qk_norm": True}
NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
COUNTS = (
    "layer",
    "num_steps",
    "most_rows",
    "most_steps",
    "size",
    "inner",
    "groups",
    "steps",
    "num_keys",
    "num_kept",
    "num_rows",
    "num_splits",
)
INTS = dict.fromkeys((*COUNTS, "pitch", "qkv_pitch", "x_pitch"), "i32") | {"scale": "fp32", "eps": "fp32"}
TABLES = dict.fromkeys(("tasks", "visits", "rows_table", "keys_table", "merges"), "*i32")
TABLES |= {"tiles": "*i64", "bits": "*u8"}
FP32 = ("anchor", "cos", "sin", "lse", "part_output", "part_lse", "parts")
ALIGNED = ("num_keys", "qkv_pitch", "pitch", "size", "inner", "groups", "x_pitch")
LEVELS = {8: "*i16", 4: "*u8"}


def compile_for(kernel: Any, rows: torch.dtype, constants: dict[str, object], arch: int, **options: int) -> Any:
    types = {**INTS, **TABLES, **dict.fromkeys(FP32, "*fp32"), **dict.fromkeys(("positions", "rows", "back"), "*i64")}
    types |= {"scales": "*fp16", "least": "*fp16", "levels": LEVELS.get(constants.get("BITS"), "")}  # type: ignore[call-overload]
    signature, aligned = {}, {}
    for number, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, POINTERS[rows])
        if signature[name].startswith("*") or name in ALIGNED:
            aligned[number,] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", arch, 32), options)


def facts(compiled: Any) -> dict[str, float]:
    """bytes_per_load: of the copies to shared memory that feed products, the least; 0 where there are none.

    Those past the L1 cache, of 16 bytes; with `bytes_per_copy`, all.
    """
    ptx = compiled.asm["ptx"]
    sizes, copies = (
        [int(size, 16) for size in re.findall(rf"cp\.async\.{kind}\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)]
        for kind in ("cg", "c[ag]")
    )
    scalars = len(re.findall(r"ld\.global\.b16", ptx))
    return {
        "bytes_per_copy": min(copies, default=0),
        "other_loads": len(re.findall(r"ld\.global", ptx)),
        "warp_group_products": len(re.findall(r"wgmma\.mma_async", ptx)),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": _spilled(compiled.asm["cubin"]),
        "bytes_per_load": (2 if scalars > 8 else min(sizes, default=0)),
    }


def _spilled(cubin: bytes) -> int:
    """Bytes of stack for each thread: registers that did not fit."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", told.stdout)[0])


def main(arch: int, kept: str) -> dict[str, dict[str, float]]:
    spec = dataclasses.replace(SPEC, **QWEN3_8B)
    rows = torch.bfloat16 if kept in ("int8", "all") else NAMES[kept]
    kinds = 15 if kept == "all" else 1 << KINDS.index(NAMES[kept])
    found = {}
    for num_rows, read in ((1, kinds), (30, kinds), (30, 0)):
        tiling = triton_in_place.tiling_of(spec, num_rows, rows, cores=132)
        constants = triton_in_place.constants(spec, tiling, read, rows)
        name = f"attend {tiling.queries}" if read else "attend nothing cached"
        found[name] = facts(compile_for(triton_kernels.attend_kernel, rows, constants, arch, **_options(tiling)))
    merging = triton_way.merge_constants(spec, 4)
    found["merge"] = facts(compile_for(triton_kernels.merge_kernel, rows, merging, arch, num_warps=1))
    joining = triton_way.head_constants(spec)
    found["join"] = facts(compile_for(beam_kernels.join_steps_kernel, rows, joining, arch))
    laying = triton_laid.lay_constants(spec, kinds)
    found["lay"] = facts(compile_for(triton_laid_kernels.lay_kernel, rows, laying, arch))
    tiling = triton_laid.tiling_of(rows, cores=132)
    for told in (False, True):
        constants = triton_laid.laid_constants(spec, tiling, rows, told=told)
        name = f"laid {tiling.queries}, by blocks" if told else f"laid {tiling.queries}"
        found[name] = facts(compile_for(triton_laid_kernels.laid_kernel, rows, constants, arch, **_options(tiling)))
    ops = TritonOps(spec, Rope.of(spec, 16))
    for name, kernel, constants in (
        ("add_norm", layer_kernels.add_norm_kernel, {"ADDS": True, "SIZE_PADDED": 4096}),
        ("rotate", layer_kernels.rotate_kernel, ops.rotate_constants(norms=True)),
        ("keep", layer_kernels.keep_kernel, ops.keep_constants(shifts=True)),
        ("swiglu", layer_kernels.swiglu_kernel, {"COLUMNS": 1024}),
    ):
        found[name] = facts(compile_for(kernel, rows, constants, arch))
    return found | of_levels(rows, arch)


def of_levels(rows: torch.dtype, arch: int) -> dict[str, dict[str, float]]:
    """Products with matrices of 4,096 inputs in levels, for tiles of few rows and of many."""
    found = {}
    for bits in (8, 4):
        shapes = torch.empty(1, 4096 * bits // 8, dtype=torch.int8), torch.empty(1, 4096 // GROUP)
        weight = Quantised(4096, *shapes, None if bits == 8 else shapes[1], False)
        for num_rows in (1, 20, 40, 100):
            tiling = ProductTiling.on_gpu(num_rows, rows)
            options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
            constants = LevelProduct.constants(tiling, weight, BIAS=False)
            compiled = compile_for(level_kernels.product_kernel, rows, constants, arch, **options)
            found[f"product {bits} {tiling.rows}"] = facts(compiled)
        widening = LevelProduct.widen_constants(weight)
        found[f"widen {bits}"] = facts(compile_for(level_kernels.widen_kernel, rows, widening, arch))
    summing = {"BIAS": True, "COLUMNS": 1024}
    return found | {"sum": facts(compile_for(level_kernels.sum_kernel, rows, summing, arch))}


def _options(tiling: Tiling) -> dict[str, int]:
    return {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
