"""The element-wise steps of the compiled and the GPU kernels against plain torch. Close: fp32, 1e-5."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rcllm.model.attend import native
from rcllm.model.attend.choose import prepare
from rcllm.model.attend.compiled import NativeSegmented
from rcllm.model.attend.native import Kernels, kernels
from rcllm.model.attend.segments import Group
from rcllm.model.layers import CompiledLayer, Copied, LayerParts
from rcllm.model.ops import NativeOps, Ops, TorchOps, TritonOps
from rcllm.model.packed import PACKINGS
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec
from tests.model.test_attention import DTYPES, SPEC, random_group, random_rows
from tests.reference import bf16


@pytest.fixture
def compiled() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


@pytest.fixture(params=["native", "triton"])
def fused(request: pytest.FixtureRequest) -> Callable[[ModelSpec, Rope], Ops]:
    """Steps that are not plain torch; those for GPUs in Triton's interpreter."""
    if request.param == "native":
        compiled: Kernels = request.getfixturevalue("compiled")
        return lambda spec, rope: NativeOps(spec, rope, compiled)
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'rcllm[gpu]'")
    return TritonOps


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (3, 3, 96)])
def test_rows_to_keep(
    fused: Callable[[ModelSpec, Rope], Ops], heads: int, kv_heads: int, head_dim: int, *, shifts: bool
) -> None:
    """Exact but for the order of a product and a sum; what is not to be kept is not touched."""
    spec = dataclasses.replace(SPEC, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    rope, qkv = Rope.of(spec, 64), torch.randn(20, spec.q_size + 2 * spec.kv_size)
    rows, back = torch.tensor([3, 4, 5, 11, 19]), torch.tensor([0, 0, 7, 40, 63]) if shifts else None
    found, expected = (torch.full((3, 2, kv_heads, 5, head_dim), 9.0) for _ in range(2))
    fused(spec, rope).keep(qkv, rows, back, found[1])
    TorchOps(spec, rope).keep(qkv, rows, back, expected[1])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    k = qkv[:, spec.q_size : spec.q_size + spec.kv_size].unflatten(1, (kv_heads, head_dim))[rows]
    own = k if back is None else rope.shift(k, -back)
    torch.testing.assert_close(expected[1, 0], own.transpose(0, 1), atol=0, rtol=0)


@pytest.mark.parametrize("size", [7, 576, 1000])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_norm(fused: Callable[[ModelSpec, Rope], Ops], size: int, with_delta: bool) -> None:
    rope = Rope.of(SPEC, 16)
    weight, delta = torch.randn(size), torch.randn(13, size) * 5 if with_delta else None
    residual = torch.randn(13, size) * 30
    mine, other = residual.clone(), residual.clone()
    got = fused(SPEC, rope).add_norm(mine, delta, weight)
    expected = TorchOps(SPEC, rope).add_norm(other, delta, weight)
    torch.testing.assert_close(mine, other, atol=0, rtol=0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [5, 16, 1536])
def test_swiglu_also_at_extreme_gates(fused: Callable[[ModelSpec, Rope], Ops], size: int) -> None:
    rope = Rope.of(SPEC, 16)
    x = torch.randn(9, 2 * size) * 8
    x[0, :5] = torch.tensor([0.0, -100.0, 100.0, -1e30, 1e30])
    got, expected = fused(SPEC, rope).swiglu(x), TorchOps(SPEC, rope).swiglu(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_rotate_turns_queries_and_keys_and_leaves_values(fused: Callable[[ModelSpec, Rope], Ops], norm: bool) -> None:
    spec = dataclasses.replace(SPEC, num_heads=6, num_kv_heads=2, qk_norm=norm)
    rope = Rope.of(spec, 64)
    weights = (torch.randn(32), torch.randn(32)) if norm else (None, None)
    qkv = torch.randn(11, spec.q_size + 2 * spec.kv_size)
    positions = torch.randint(0, 64, (11,))
    mine, other = qkv.clone(), qkv.clone()
    fused(spec, rope).rotate(mine, positions, *weights)
    TorchOps(spec, rope).rotate(other, positions, *weights)
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(mine[:, spec.q_size + spec.kv_size :], qkv[:, spec.q_size + spec.kv_size :])


def parts_of(ops: NativeOps | TorchOps, spec: ModelSpec, seed: int) -> LayerParts:
    """Random weights of a layer, with norms per head where the spec has them."""
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made) / shape[-1] ** 0.5

    fused = spec.q_size + 2 * spec.kv_size
    shapes = (
        (fused, spec.hidden_size),
        (spec.hidden_size, spec.q_size),
        (2 * spec.ffn_size, spec.hidden_size),
        (spec.hidden_size, spec.ffn_size),
    )
    matrices = [ops.linear(random(*shape), random(shape[0]) if spec.qk_norm else None) for shape in shapes]
    heads = [random(spec.head_dim) if spec.qk_norm else None for _ in range(2)]
    return LayerParts(random(spec.hidden_size), random(spec.hidden_size), *heads, *matrices)


def layer_spec(**fields: object) -> ModelSpec:
    return dataclasses.replace(SPEC, num_heads=6, num_kv_heads=2, hidden_size=80, ffn_size=100, **fields)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("with_delta", [True, False])
def test_a_layer_before_and_after_its_attention(compiled: Kernels, packing: str, norm: bool, with_delta: bool) -> None:
    """In bf16 an input near a tie may fall either way, so that its error is half a step."""
    spec = layer_spec(qk_norm=norm)
    rope, positions = Rope.of(spec, 64), torch.randint(0, 64, (11,))
    layers = [
        ops.layer(parts_of(ops, spec, 3))
        for ops in (NativeOps(spec, rope, compiled, packing), TorchOps(spec, rope, packing))
    ]
    assert isinstance(layers[0], CompiledLayer)
    close = {"atol": 1e-5, "rtol": 1e-5} if packing == "fp32" else {"atol": 2e-2, "rtol": 1e-2}
    first, delta, attended = torch.randn(11, 80) * 3, torch.randn(11, 80), torch.randn(11, spec.q_size)
    residuals = [first.clone(), first.clone()]
    rows = [
        layer.project(x, delta if with_delta else None, positions) for layer, x in zip(layers, residuals, strict=True)
    ]
    torch.testing.assert_close(*rows, **close)
    torch.testing.assert_close(*residuals, atol=0, rtol=0)
    fed = [layer.feed(x, attended) for layer, x in zip(layers, residuals, strict=True)]
    torch.testing.assert_close(*fed, **close)
    torch.testing.assert_close(*residuals, **close)


def test_gates_may_be_extreme(compiled: Kernels) -> None:
    """Up to thousands, where the exponential of a gate is no number of fp32."""
    spec, rope = layer_spec(), Rope.of(SPEC, 16)
    residual, nothing = torch.randn(9, 80), torch.zeros(9, spec.q_size)
    ops = both(spec, rope, compiled)
    parts = [dataclasses.replace(parts_of(each, spec, 4), post_norm=torch.full((80,), 1e3)) for each in ops]
    fed = [each.layer(own).feed(residual.clone(), nothing) for each, own in zip(ops, parts, strict=True)]
    assert torch.isfinite(fed[1]).all()
    torch.testing.assert_close(*fed, atol=1e-6 * float(fed[1].abs().max()), rtol=1e-5)


def both(spec: ModelSpec, rope: Rope, compiled: Kernels) -> tuple[NativeOps, TorchOps]:
    return NativeOps(spec, rope, compiled), TorchOps(spec, rope)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_layer_in_one_call_equals_its_steps(compiled: Kernels, packing: str, rows: int) -> None:
    """exact: bit for bit, with what is kept of it"""
    spec, rope = layer_spec(), Rope.of(SPEC, 64)
    layer = NativeOps(spec, rope, compiled, packing).layer(parts_of(NativeOps(spec, rope, compiled, packing), spec, 5))
    assert isinstance(layer, CompiledLayer)
    attend = prepare("segmented", spec, rope, [Group.causal(rows)], compiled, products=packing)
    assert isinstance(attend, NativeSegmented)
    first, delta, positions = torch.randn(rows, 80), torch.randn(rows, 80), torch.arange(rows)
    chosen = torch.arange(0, rows, 3)
    for before in (None, delta):
        stepwise, whole = first.clone(), first.clone()
        qkv = layer.project(stepwise, before, positions)
        expected = layer.feed(stepwise, attend(0, qkv).output)
        copied = Copied(chosen, torch.empty(2, spec.num_kv_heads, len(chosen), spec.head_dim))
        got = layer.run(whole, None if before is None else before.clone(), positions, 0, attend.reads, copied)
        assert torch.equal(got, expected)
        assert torch.equal(whole, stepwise)
        kv = qkv[chosen, spec.q_size :].unflatten(1, (2, spec.num_kv_heads, spec.head_dim))
        assert torch.equal(copied.to, kv.permute(1, 2, 0, 3))


@pytest.mark.parametrize("rows", [1, 3, 128, 513])
@pytest.mark.parametrize("size", [5, 48, 200])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_linear(compiled: Kernels, rows: int, size: int, with_bias: bool) -> None:
    weight, bias, x = torch.randn(size, 24), torch.randn(size) if with_bias else None, torch.randn(rows, 24)
    got = NativeOps(SPEC, Rope.of(SPEC, 16), compiled).linear(weight, bias)(x)
    expected = TorchOps(SPEC, Rope.of(SPEC, 16)).linear(weight, bias)(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 128, 513])
@pytest.mark.parametrize("size", [5, 48, 200])
@pytest.mark.parametrize("inner", [24, 77])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_linear_in_bf16(compiled: Kernels, rows: int, size: int, inner: int, with_bias: bool) -> None:
    weight, bias, x = torch.randn(size, inner), torch.randn(size) if with_bias else None, torch.randn(rows, inner)
    got = PACKINGS["bf16"](compiled, weight, bias)(x)
    torch.testing.assert_close(got.double(), bf16.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    emulated = TorchOps(SPEC, Rope.of(SPEC, 16), "bf16").linear(weight, bias)(x)
    torch.testing.assert_close(got, emulated, atol=1e-5, rtol=1e-5)


def test_inputs_are_rounded_as_torch_rounds(compiled: Kernels) -> None:
    """Ties, the largest and smallest normal values, zeros, infinities and NaN, through a matrix of ones."""
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(0)).int()
    special = [0x3F808000, 0x3F818000, 0x3F7FFFFF, 0x7F7FFFFF, 0x00800000, 0x7F800000, -0x00800000, 0x7F800001, 0]
    x = torch.cat([bits, torch.tensor(special).int()]).view(torch.float32)
    x = x[~((x != 0) & (x.abs() < 2.0**-126))][:, None]  # the instruction takes these for zeros
    got = PACKINGS["bf16"](compiled, torch.ones(1, 1), None)(x)
    torch.testing.assert_close(got, x.bfloat16().float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(packing: str, compiled: Kernels) -> None:
    product = NativeOps(SPEC, Rope.of(SPEC, 16), compiled, packing).linear(torch.randn(100, 576), None)
    x = torch.randn(700, 576)
    together = product(x)
    for first, stop in ((0, 1), (3, 8), (190, 207), (500, 700)):
        assert torch.equal(product(x[first:stop]), together[first:stop])


def test_without_a_compiler_there_are_no_kernels() -> None:
    script = "from rcllm.model.attend.native import kernels; assert kernels() is None"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "RCLLM_NATIVE": "0"})


@pytest.mark.parametrize(
    "flags",
    [
        ("-mno-avx512bf16", "-mno-avx512vnni"),
        ("-mno-avx512f",),
        ("-mno-avx",),
        ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=alignment"),
    ],
)
def test_kernels_of_other_processors(
    flags: tuple[str, ...], compiled: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same source for narrower vectors, and once with traps at undefined behaviour: equal results."""
    if platform.machine() != "x86_64":
        pytest.skip("the flags are x86's")
    monkeypatch.setenv("RCLLM_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    narrow = native.kernels.__wrapped__()
    assert narrow is not None
    rope = Rope.of(SPEC, SPEC.max_positions)
    narrow_kv = [random_group(seed, dtype=dtype) for dtype in DTYPES for seed in (21, 23)]
    assert all(any(group.segments for group in narrow_kv[at : at + 2]) for at in range(0, len(narrow_kv), 2))
    groups = [*narrow_kv, random_group(22, rows=250)]
    qkv = random_rows(groups)
    wide = prepare("segmented", SPEC, rope, groups, compiled)(1, qkv)
    got = prepare("segmented", SPEC, rope, groups, narrow)(1, qkv)
    torch.testing.assert_close(got.output, wide.output, atol=1e-5, rtol=1e-5)
    x = torch.randn(9, 2 * 40)
    torch.testing.assert_close(
        NativeOps(SPEC, rope, narrow).swiglu(x), TorchOps(SPEC, rope).swiglu(x), atol=1e-5, rtol=1e-5
    )
    weight = torch.randn(100, 80)
    torch.testing.assert_close(
        NativeOps(SPEC, rope, narrow).linear(weight, None)(x), x @ weight.T, atol=1e-4, rtol=1e-4
    )
    _check_rounding(compiled, narrow, groups, qkv)


def _check_rounding(compiled: Kernels, narrow: Kernels, groups: list[Group], qkv: torch.Tensor) -> None:
    """Emulated or not: equal bits on all processors that fuse a product with its sum."""
    weight, x, rope = torch.randn(100, 80), torch.randn(9, 80), Rope.of(SPEC, SPEC.max_positions)
    pairs = [[PACKINGS[name](each, weight, None)(x) for each in (compiled, narrow)] for name in ("bf16", "int8")]
    attended = [prepare("segmented", SPEC, rope, groups, each, products="bf16")(1, qkv) for each in (compiled, narrow)]
    if narrow.panel == 12:  # four lanes: no AVX, and nothing is fused
        for ours, theirs in pairs:
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
        assert (attended[0].output - attended[1].output).abs().mean() < 1e-4
    else:
        for ours, theirs in pairs:
            assert torch.equal(theirs, ours)
        assert torch.equal(attended[0].output, attended[1].output)


def test_a_compiler_that_fails_means_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("RCLLM_HOME", str(tmp_path))
    assert native.kernels.__wrapped__() is None
