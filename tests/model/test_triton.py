"""The GPU kernels in Triton's interpreter: rows in 16 bits, ways to cut a pass, beams and trees; and that they compile.

What all backends are held to is in test_attention.py, and the steps of a layer in test_ops.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.decode.beam_kv import beam_group
from rcllm.drafts.draft import DraftTree
from rcllm.engine.jobs.sequences import tree_group
from rcllm.errors import ConfigError
from rcllm.model.attend.choose import resolved
from rcllm.model.attend.on_triton import TritonAttend
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.attend.triton_tables import Tables, Tiling
from rcllm.model.rope import Rope
from tests.model.test_attention import DTYPES, SPEC, random_group, random_rows
from tests.reference import attend as reference

pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
ROPE = Rope.of(SPEC, SPEC.max_positions)
SMALL = Tiling(queries=16, keys=16, num_programs=1)  # nothing is divided
DIVIDED = Tiling(queries=16, keys=16, num_programs=1000)


def close_to_reference(groups: list[Group], qkv: torch.Tensor, tiling: Tiling | None = None) -> None:
    got, expected = TritonAttend(SPEC, ROPE, groups, tiling)(1, qkv), reference.attend(SPEC, groups, 1, qkv)
    torch.testing.assert_close(got.output.double(), expected.output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), expected.lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", [SMALL, DIVIDED, Tiling(64, 32, 30)])
@pytest.mark.parametrize("seed", [1, 9])
def test_however_a_pass_is_cut(tiling: Tiling, seed: int) -> None:
    groups = [random_group(seed, rows=30), random_group(seed + 1, dtype=torch.int8)]
    close_to_reference(groups, random_rows(groups), tiling)


def test_few_rows_over_many_keys_are_divided_and_merged() -> None:
    groups = [random_group(seed, dtype=torch.float16) for seed in (24, 28)]
    divided, whole = (Tables(SPEC, groups, tiling, ROPE.cos) for tiling in (DIVIDED, SMALL))
    assert divided.num_merges > 0
    assert divided.num_tasks > whole.num_tasks
    assert whole.num_merges == 0


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_16_bits_round_the_operands_of_products_alone(dtype: torch.dtype, kept: torch.dtype) -> None:
    """Close: turned queries, keys and weights are rounded once each, to 2^-11 or 2^-8 of themselves."""
    groups = [random_group(5, dtype=kept), random_group(6, dtype=kept, rows=20)]
    qkv = random_rows(groups).to(dtype)
    got, expected = TritonAttend(SPEC, ROPE, groups)(1, qkv), reference.attend(SPEC, groups, 1, qkv)
    error, off = (got.output.double() - expected.output).abs(), (got.lse.double() - expected.lse).abs()
    print(f"output: max {error.max():.1e}, mean {error.mean():.1e}; lse: max {off.max():.1e}")
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert got.output.dtype == dtype
    assert error.max() < 6 * step
    assert error.mean() < step / 2
    assert off.max() < 6 * step


def test_beams_read_their_prompt_and_themselves() -> None:
    segments = [dataclasses.replace(s, block=i) for i, s in enumerate(random_group(4, dtype=torch.float16).segments)]
    groups = [beam_group(segments, 21), beam_group(segments[:1], 3)]
    close_to_reference(groups, random_rows(groups), SMALL)


def test_nodes_of_a_draft_tree_see_their_ancestors() -> None:
    kv = torch.randn(SPEC.num_layers, 2, SPEC.num_kv_heads, 50, SPEC.head_dim)
    parents = np.array([0, 1, 1, 3, 0, 5, 6, 2], np.int32)
    tree = DraftTree(np.arange(8, dtype=np.int32), parents, np.ones(8, np.float32))
    groups = [tree_group(Segment(kv, 0, 0, 41, 0), tree), tree_group(Segment(kv, 0, 0, 50, 0), tree)]
    close_to_reference(groups, random_rows(groups), SMALL)


def test_blocks_in_another_order_than_the_prompts() -> None:
    group = random_group(12, rows=3)
    order = np.argsort(-group.block, kind="stable")
    turned = dataclasses.replace(group, block=group.block[order], offset=group.offset[order])
    close_to_reference([turned], random_rows([turned]), SMALL)


def test_a_block_that_is_a_view_into_a_larger_tensor() -> None:
    """As a pool in one tensor hands them out, anywhere before or after what offsets count from."""
    group = random_group(5, dtype=torch.bfloat16)
    room = torch.zeros(sum(s.kv.numel() for s in group.segments) + 64, dtype=torch.bfloat16)
    at, segments = 16, []
    for segment in group.segments:
        view = room[at : at + segment.kv.numel()].view(segment.kv.shape)
        segments.append(dataclasses.replace(segment, kv=view.copy_(segment.kv)))
        at += -(-segment.kv.numel() // 16) * 16
    close_to_reference([dataclasses.replace(group, segments=tuple(segments))], random_rows([group]))


def test_triton_is_refused_where_it_cannot_run() -> None:
    odd = dataclasses.replace(SPEC, head_dim=24)
    with pytest.raises(ConfigError, match="multiple of 16, got device cpu and heads of 24"):
        resolved("triton", odd, torch.device("cpu"))
    assert resolved("auto", SPEC, torch.device("cpu")) == "auto"
    assert resolved("auto", SPEC, torch.device("cuda")) == "triton"


def compiled(*arguments: str) -> dict[str, dict[str, float]]:
    """What `compile_kernels.py` says of each kernel; in a process of its own, without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.model.compile_kernels", *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2]
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, dict[str, float]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_the_kernels_compile_for_a_gpu() -> None:
    """To its machine code, which needs none: bf16 rows and KV in Qwen3-8B's shape, few rows and many."""
    found = compiled("90", "bf16")
    assert set(found) == {"attend 16", "attend 128", "merge", "add_norm", "rotate", "swiglu"}
    for name in ("attend 16", "attend 128"):
        assert found[name]["bytes_per_load"] == 16, "K and V are read in whole vectors"
        assert found[name]["spilled_bytes"] == 0
        assert found[name]["shared_bytes"] <= 227 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "all"])
def test_every_dtype_compiles_for_every_kind_of_gpu(arch: str, dtype: str) -> None:
    limit = {"80": 163, "90": 227, "100": 227}[arch] * 1024
    assert all(each["shared_bytes"] <= limit for each in compiled(arch, dtype).values())
