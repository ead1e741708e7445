"""Attention over segments: all backends against the fp64 reference. Close: 2e-5; KV in fewer bits, once widened."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rcllm.model.attend import on_triton
from rcllm.model.attend.choose import prepare
from rcllm.model.attend.contract import Attend, merge
from rcllm.model.attend.native import kernels
from rcllm.model.attend.segments import Group, Keys, Segment
from rcllm.model.kv_int8 import kept, widen
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec, RopeSpec
from tests.reference import attend as reference
from tests.reference import bf16

BACKENDS = ("native", "native gather", "segmented", "gather", "triton in place", "triton laid")  # in its interpreter
QUICK = (*BACKENDS[:4], pytest.param("triton in place", marks=pytest.mark.slow), "triton laid")  # by default
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of cached KV
SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=96,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    ffn_size=64,
    vocab_size=100,
    rms_eps=1e-5,
    qkv_bias=False,
    o_bias=False,
    qk_norm=False,
    tied_embeddings=True,
    rope=RopeSpec(theta=10_000.0),
    max_positions=2048,
    bos_id=None,
    eos_ids=(),
)


def make(name: str, spec: ModelSpec, groups: list[Group], products: str = "fp32") -> Attend:
    rope = Rope.of(spec, spec.max_positions)
    compiled = kernels()
    if name.startswith("native"):
        if compiled is None:
            pytest.skip("no C++ compiler on this machine")
        backend = name.removeprefix("native ") if " " in name else "segmented"
        return prepare(backend, spec, rope, groups, compiled, products=products)
    if name.startswith("triton"):
        if find_spec("triton") is None:
            pytest.skip("triton is not installed: pip install 'rcllm[gpu]'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(on_triton, "FEW_QUERIES", 0 if name == "triton laid" else 1 << 30)
            return prepare("triton", spec, rope, groups, None)
    return prepare(name, spec, rope, groups, None)


def random_group(seed: int, spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32, rows: int = 0) -> Group:
    """Blocks, some reused whole, some in part, some fresh, with a random strictly lower triangular mask."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 8))
    sees = np.tril(rng.random((count, count)) < 0.7, k=-1)
    segments, block, offset = [], [], []
    for index in range(count):
        size = int(rng.integers(1, 120 if rng.random() < 0.1 else 9))
        fresh_from, fresh_to = sorted(rng.integers(0, size + 1, 2).tolist()) if rng.random() < 0.7 else (0, size)
        if index == count - 1:
            size = size + rows
            fresh_from, fresh_to = 0, size
        shape = (spec.num_layers, 2, spec.num_kv_heads, size, spec.head_dim)
        kv = kept(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)), dtype, torch.device("cpu"))
        base = int(rng.integers(0, 1500)) * int(rng.random() < 0.8)
        for start, stop in ((0, fresh_from), (fresh_to, size)):
            if start < stop:
                segments.append(Segment(kv, base, start, stop, index))
        block += [index] * (fresh_to - fresh_from)
        offset += range(fresh_from, fresh_to)
    return Group(tuple(segments), np.array(block, np.int32), np.array(offset, np.int32), sees)


def random_rows(groups: list[Group], spec: ModelSpec = SPEC) -> torch.Tensor:
    size = spec.q_size + 2 * spec.kv_size
    return torch.randn(sum(g.num_rows for g in groups), size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), num_groups=st.integers(1, 3))
def test_backend_is_close_to_the_reference(backend: str, dtype: torch.dtype, seed: int, num_groups: int) -> None:
    groups = [random_group(seed + i, dtype=dtype) for i in range(num_groups)]
    qkv = random_rows(groups)
    got, expected = make(backend, SPEC, groups)(1, qkv), reference.attend(SPEC, groups, 1, qkv)
    torch.testing.assert_close(got.output.double(), expected.output, atol=2e-5, rtol=1e-5)
    if backend != "gather":
        torch.testing.assert_close(got.lse.double(), expected.lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 32), (8, 2, 64), (14, 2, 64), (16, 1, 128), (32, 1, 96)]
)
@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_every_grouping_of_heads(dtype: torch.dtype, backend: str, heads: int, kv_heads: int, head_dim: int) -> None:
    spec = dataclasses.replace(SPEC, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    groups = [random_group(3, spec, dtype), random_group(4, spec, dtype)]
    qkv = random_rows(groups, spec)
    got, expected = make(backend, spec, groups)(1, qkv), reference.attend(spec, groups, 1, qkv)
    torch.testing.assert_close(got.output.double(), expected.output, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_int8_is_read_as_the_values_that_it_stands_for(backend: str, head_dim: int, seed: int) -> None:
    """Exact: a level times its scale rounds nothing, so the bits are those of a block of these values in fp32."""
    spec = dataclasses.replace(SPEC, head_dim=head_dim)
    narrow = random_group(seed, spec, torch.int8)
    wide = dataclasses.replace(narrow, segments=tuple(dataclasses.replace(s, kv=widen(s.kv)) for s in narrow.segments))
    qkv = random_rows([narrow], spec)
    got, expected = (make(backend, spec, [group])(1, qkv) for group in (narrow, wide))
    assert torch.equal(got.output, expected.output)
    assert torch.equal(got.lse, expected.lse) or backend == "gather"  # which has none


@pytest.mark.parametrize("backend", ["native", "native gather"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_products_in_bf16_round_their_operands_and_nothing_else(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Close: an operand near a tie may be rounded either way, which is 2^-8 of it; so the mean tells."""
    groups = [random_group(seed, dtype=dtype), random_group(seed + 1, dtype=dtype, rows=40)]
    qkv = random_rows(groups)
    got, expected = make(backend, SPEC, groups, "bf16")(1, qkv), bf16.attend(SPEC, groups, 1, qkv)
    error, off = (got.output.double() - expected.output).abs(), (got.lse.double() - expected.lse).abs()
    print(f"output: max {error.max():.1e}, mean {error.mean():.1e}; lse: max {off.max():.1e}, mean {off.mean():.1e}")
    assert error.max() < 2e-2
    assert error.mean() < 1e-4
    assert off.max() < 1e-2
    assert off.mean() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_of_all_dtypes_in_one_group(backend: str) -> None:
    """A prompt that goes on has its cached blocks in int8 and its own rows in the compute dtype."""
    segments = [
        next(segment for seed in range(20) for segment in random_group(seed, dtype=dtype).segments) for dtype in DTYPES
    ]
    count = len(segments)
    mixed = Group(
        tuple(dataclasses.replace(segment, block=i) for i, segment in enumerate(segments)),
        np.full(3, count, np.int32),
        np.arange(3, dtype=np.int32),
        np.tri(count + 1, k=-1, dtype=bool),
    )
    qkv = random_rows([mixed])
    got, expected = make(backend, SPEC, [mixed])(1, qkv), reference.attend(SPEC, [mixed], 1, qkv)
    torch.testing.assert_close(got.output.double(), expected.output, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_causal_rows_equal_torch(backend: str) -> None:
    """Many row and key tiles, where the slow reference would take minutes: against torch's own attention."""
    spec = dataclasses.replace(SPEC, num_heads=6, num_kv_heads=2)
    group = Group.causal(701)
    qkv = random_rows([group], spec)
    q, k, v = qkv.unflatten(1, (-1, 32)).transpose(0, 1).split((6, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, enable_gqa=True
    )
    got = make(backend, spec, [group])(0, qkv).output
    torch.testing.assert_close(got, expected[0].transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-5)


def test_rows_of_large_groups_agree_between_backends() -> None:
    spec = dataclasses.replace(SPEC, num_heads=6, num_kv_heads=2)
    groups = [random_group(11, spec, rows=300), random_group(12, spec, rows=150), random_group(13, spec)]
    qkv = random_rows(groups, spec)
    native, gather = make("native", spec, groups)(1, qkv), make("gather", spec, groups)(1, qkv)
    torch.testing.assert_close(native.output, gather.output, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["native", "native gather"])
@pytest.mark.parametrize("loud", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.float32, "fp32"), (torch.int8, "fp32"), (torch.float32, "bf16"), (torch.int8, "bf16")],
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 329))
@example(seed=2249, cut=1)  # a product that lies half-way between two fp32 numbers, beside a masked key
def test_compiled_rows_depend_on_their_keys_alone(
    backend: str, loud: float, dtype: torch.dtype, products: str, seed: int, cut: int
) -> None:
    """To the bit: however the keys are divided among segments, tiles and fresh rows, with masked keys among them.

    loud: of the queries; the larger, the oftener the running maximum moves, and the more keys weigh next to nothing.
    dtype: of the segments; their values are those of the fresh rows.
    """
    rng = np.random.default_rng(seed)
    qkv = random_rows([Group.causal(330)])
    qkv[:, : SPEC.q_size] *= loud
    k, v = qkv[:, SPEC.q_size :].unflatten(1, (2, 1, SPEC.head_dim)).unbind(1)
    kv = kept(torch.stack([k, v]).transpose(1, 2)[None], dtype, torch.device("cpu"))  # [1, 2, KV, rows, D]
    qkv[:, SPEC.q_size :] = widen(kv)[0].permute(2, 0, 1, 3).flatten(1)
    whole = make(backend, SPEC, [Group.causal(330)], products)(0, qkv)

    sees = np.tri(2, k=-1, dtype=bool)
    stops = sorted({*rng.integers(1, cut + 1, 3).tolist(), cut})
    segments = tuple(Segment(kv, 0, a, b, 0) for a, b in zip([0, *stops], stops, strict=False))
    rest = Group(segments, np.ones(330 - cut, np.int32), np.arange(330 - cut, dtype=np.int32), sees)
    got = make(backend, SPEC, [rest], products)(0, qkv[cut:])
    assert torch.equal(got.output, whole.output[cut:])
    assert torch.equal(got.lse, whole.lse[cut:])

    branch = rng.integers(0, 2, 330 - cut)  # the rows of one do not see those of the other
    mixed = make(backend, SPEC, [_branches(segments, branch)], products)(0, qkv[cut:])
    rows = torch.from_numpy(branch == 0)
    alone = make(backend, SPEC, [_branches(segments, branch[branch == 0])], products)(0, qkv[cut:][rows])
    assert torch.equal(alone.output, mixed.output[rows])


def _branches(segments: tuple[Segment, ...], branch: np.ndarray) -> Group:
    """Each row a block of its own, which sees the segments and the earlier rows of its branch."""
    n = len(branch)
    sees = np.zeros((n + 1, n + 1), dtype=bool)
    sees[1:, 0] = True
    sees[1:, 1:] = np.tril(branch[:, None] == branch, k=-1)
    return Group(segments, np.arange(1, n + 1, dtype=np.int32), np.zeros(n, np.int32), sees)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segmented_reads_published_kv_without_copying_it(dtype: torch.dtype) -> None:
    """Zero copies, shown: the kernel's table holds the addresses of the published tensors, and nothing else is made."""
    groups = [random_group(5, dtype=dtype)]
    attend = make("native", SPEC, groups)
    pointers = attend._segments[:, 0].tolist()  # type: ignore[attr-defined]
    assert pointers == [segment.kv.data_ptr() for segment in groups[0].segments]
    before = [segment.kv.clone() for segment in groups[0].segments]
    attend(0, random_rows(groups))
    assert attend.bytes_copied == 0
    for segment, kv in zip(groups[0].segments, before, strict=True):
        assert torch.equal(segment.kv, kv)


@pytest.mark.parametrize("backend", ["gather", "native gather"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_says_what_it_copied(backend: str, dtype: torch.dtype) -> None:
    group = random_group(5, dtype=dtype)
    attend = make(backend, SPEC, [group])
    attend(0, random_rows([group]))
    parts = [segment.kv[:, :, :, segment.start : segment.stop] for segment in group.segments]
    assert [segment.num_bytes for segment in group.segments] == [part.numel() * part.itemsize for part in parts]
    assert attend.bytes_copied == sum(segment.num_bytes for segment in group.segments) // SPEC.num_layers


def test_merge_joins_disjoint_keys() -> None:
    group = Group.causal(5)
    qkv = random_rows([group])
    q, k, v = qkv.unflatten(1, (-1, 32)).split((3, 1, 1), dim=1)
    backend = make("segmented", SPEC, [group])
    everything = torch.ones(5, 5, dtype=torch.bool)
    whole = backend.part(q, k, v, everything)  # type: ignore[attr-defined]
    parts = [backend.part(q, k[a:b], v[a:b], everything[:, a:b]) for a, b in ((0, 2), (2, 5))]  # type: ignore[attr-defined]
    joined = merge(parts)
    torch.testing.assert_close(joined.output, whole.output)
    torch.testing.assert_close(joined.lse, whole.lse)


def test_merge_of_a_part_in_which_a_row_saw_nothing() -> None:
    group = Group.causal(3)
    q, k, v = random_rows([group]).unflatten(1, (-1, 32)).split((3, 1, 1), dim=1)
    backend = make("segmented", SPEC, [group])
    some = backend.part(q, k, v, torch.ones(3, 3, dtype=torch.bool))  # type: ignore[attr-defined]
    none = backend.part(q, k, v, torch.zeros(3, 3, dtype=torch.bool))  # type: ignore[attr-defined]
    torch.testing.assert_close(merge([some, none]).output, some.output)
    assert not merge([none, none]).output.isnan().any()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_reach_agrees_with_the_dense_mask(seed: int) -> None:
    group = random_group(seed)
    mask = group.row_mask()
    keys = Keys.of(dataclasses.replace(group, segments=()))
    for row, (first, last, dense) in enumerate(group.reach(keys).tolist()):
        seen = np.flatnonzero(mask[row])
        assert (first, last) == (seen[0], seen[-1] + 1)
        assert dense == (len(seen) == last - first)


@pytest.mark.parametrize("backend", ["native", "gather", "triton"])
def test_keys_of_a_scaled_rope_are_shifted_without_the_scale(backend: str) -> None:
    """YaRN scales cos and sin: a stored key already carries the scale, and turning it on must not apply it twice."""
    spec = dataclasses.replace(SPEC, rope=RopeSpec(theta=1e4, kind="yarn", factor=4.0, original_max_positions=512))
    rope = Rope.of(spec, 2048)
    raw = torch.randn(6, 1, 32)
    local, shifted = rope.rotate(raw, torch.arange(6)), rope.rotate(raw, torch.arange(6) + 700)
    torch.testing.assert_close(rope.shift(local, torch.full((6,), 700)), shifted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope.shift(shifted, torch.full((6,), -700)), local, atol=1e-5, rtol=1e-5)
    kv = torch.stack([local, raw]).transpose(1, 2)[None].repeat(2, 1, 1, 1, 1).contiguous()
    last = Group((Segment(kv, 700, 0, 6, 0),), np.ones(1, np.int32), np.zeros(1, np.int32), np.tri(2, k=-1, dtype=bool))
    qkv = random_rows([last], spec)
    got = make(backend, spec, [last])(0, qkv)
    torch.testing.assert_close(got.output.double(), reference.attend(spec, [last], 0, qkv).output, atol=2e-5, rtol=1e-5)


def scraps(sees_all: bool, length: int) -> Group:
    """Rows of ten isolated or ordinary candidates over six segments of `length` tokens in each."""
    kv = torch.zeros(SPEC.num_layers, 2, SPEC.num_kv_heads, 12 * length, SPEC.head_dim)
    starts = range(0, 12 * length, 2 * length)
    segments = tuple(Segment(kv, 0, start, start + length, block) for block in range(10) for start in starts)
    sees = np.zeros((20, 20), bool)
    for candidate in range(10):
        sees[10 + candidate, :10] = sees_all
        sees[10 + candidate, candidate] = True
    return Group(segments, np.arange(10, 20, dtype=np.int32), np.zeros(10, np.int32), sees)


@pytest.mark.parametrize(
    ("sees_all", "length", "chosen"), [(True, 3, "gather"), (False, 3, "segmented"), (True, 40, "segmented")]
)
def test_scraps_that_most_rows_see_are_copied_first(sees_all: bool, length: int, chosen: str) -> None:
    compiled = kernels()
    if compiled is None:
        pytest.skip("no C++ compiler on this machine")
    rope = Rope.of(SPEC, SPEC.max_positions)
    assert prepare("auto", SPEC, rope, [scraps(sees_all, length)], compiled).name == chosen
