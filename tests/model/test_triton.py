"""The GPU kernels in Triton's interpreter: rows in 16 bits, ways to cut a pass, beams and trees; and that they compile.

What all backends are held to is in test_attention.py, and the steps of a layer in test_ops.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rcllm.codes.index import CodeIndex, CodeTokens
from rcllm.core.ranking import ItemId
from rcllm.decode.beam import BeamSearch
from rcllm.decode.beam_device import OnDevice
from rcllm.decode.beam_kv import beam_group
from rcllm.decode.beam_task import BeamPrompt, BeamTask
from rcllm.drafts.draft import DraftTree
from rcllm.engine.jobs.sequences import tree_group
from rcllm.errors import ConfigError
from rcllm.model.arrivals import Arrivals, Arriving, Part
from rcllm.model.attend import on_triton
from rcllm.model.attend.choose import resolved
from rcllm.model.attend.on_triton import HostTables, Tilings, TritonAttend
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.attend.triton_tables import Tiling
from rcllm.model.decoder import Decoder, Keep, Pass
from rcllm.model.rope import Rope
from rcllm.model.static_passes import Run, StaticPasses
from rcllm.model.weights import load_model
from tests.model.test_attention import DTYPES, SPEC, random_group, random_rows
from tests.reference import attend as reference
from tests.tiny_models import tiny_model

pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
ROPE = Rope.of(SPEC, SPEC.max_positions)
SMALL = Tiling(queries=16, keys=16, num_programs=1)  # nothing is divided
DIVIDED = Tiling(queries=16, keys=16, num_programs=1000)


@pytest.fixture(params=[0, 1 << 30], ids=["laid", "in place"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attending, however many rows there are."""
    monkeypatch.setattr(on_triton, "FEW_QUERIES", request.param)


both_ways = pytest.mark.usefixtures("way")


def close_to_reference(groups: list[Group], qkv: torch.Tensor, tiling: Tiling | None = None) -> None:
    tilings = None if tiling is None else Tilings(tiling, tiling)
    got, expected = (
        TritonAttend.of(SPEC, ROPE, groups, torch.float32, tilings)(1, qkv),
        reference.attend(SPEC, groups, 1, qkv),
    )
    torch.testing.assert_close(got.output.double(), expected.output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), expected.lse, atol=2e-5, rtol=1e-5)


@both_ways
@pytest.mark.parametrize("tiling", [SMALL, DIVIDED, Tiling(64, 32, 30)])
@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_however_a_pass_is_cut(tiling: Tiling, seed: int) -> None:
    groups = [random_group(seed, rows=30), random_group(seed + 1, dtype=torch.int8)]
    close_to_reference(groups, random_rows(groups), tiling)


def test_few_rows_over_many_keys_are_divided_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [random_group(seed, dtype=torch.float16, rows=90) for seed in (24, 28)]
    for few in (0, 1 << 30):
        monkeypatch.setattr(on_triton, "FEW_QUERIES", few)
        divided, whole = (
            HostTables(SPEC, groups, torch.float32, ROPE.cos.device, Tilings(tiling, tiling)).shape
            for tiling in (DIVIDED, SMALL)
        )
        some, others = (shape.in_place or shape.laid for shape in (divided, whole))
        assert some is not None
        assert others is not None
        assert some.merges > 0
        assert some.tasks > others.tasks
        assert others.merges == others.slots == 0


def test_groups_of_one_pass_are_read_as_suits_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in place, many laid, in any order; beyond the room for keys that are laid, in place as well."""
    groups = [random_group(seed, rows=rows) for seed, rows in ((2, 60), (3, 1), (5, 50), (6, 0), (7, 70))]
    shape = HostTables(SPEC, groups, torch.float32, ROPE.cos.device).shape
    assert shape.in_place is not None
    assert shape.laid is not None
    close_to_reference(groups, random_rows(groups))
    monkeypatch.setattr(on_triton, "LAID_BYTES", 100 * 2 * SPEC.kv_size * 4)
    less = HostTables(SPEC, groups, torch.float32, ROPE.cos.device).shape
    assert less.laid is None or less.laid.keys < shape.laid.keys
    close_to_reference(groups, random_rows(groups))


def test_keys_that_are_not_numbers_reach_no_other_group() -> None:
    groups = [random_group(seed, rows=60) for seed in (2, 3)]
    qkv = random_rows(groups)
    expected = TritonAttend.of(SPEC, ROPE, groups, torch.float32)(1, qkv).output
    broken = qkv.clone()
    broken[groups[0].num_rows :, SPEC.q_size :] = float("nan")
    got = TritonAttend.of(SPEC, ROPE, groups, torch.float32)(1, broken).output
    assert torch.equal(got[: groups[0].num_rows], expected[: groups[0].num_rows])


@both_ways
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_16_bits_round_the_operands_of_products_alone(dtype: torch.dtype, kept: torch.dtype) -> None:
    """Close: turned queries, keys and weights are rounded once each, to 2^-11 or 2^-8 of themselves."""
    groups = [random_group(5, dtype=kept), random_group(6, dtype=kept, rows=20)]
    qkv = random_rows(groups).to(dtype)
    got, expected = TritonAttend.of(SPEC, ROPE, groups, dtype)(1, qkv), reference.attend(SPEC, groups, 1, qkv)
    error, off = (got.output.double() - expected.output).abs(), (got.lse.double() - expected.lse).abs()
    print(f"output: max {error.max():.1e}, mean {error.mean():.1e}; lse: max {off.max():.1e}")
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert got.output.dtype == dtype
    assert error.max() < 6 * step
    assert error.mean() < step / 2
    assert off.max() < 6 * step


@both_ways
def test_beams_read_their_prompt_and_themselves() -> None:
    segments = [dataclasses.replace(s, block=i) for i, s in enumerate(random_group(4, dtype=torch.float16).segments)]
    groups = [beam_group(segments, 21), beam_group(segments[:1], 3)]
    close_to_reference(groups, random_rows(groups), SMALL)


@both_ways
def test_nodes_of_a_draft_tree_see_their_ancestors() -> None:
    kv = torch.randn(SPEC.num_layers, 2, SPEC.num_kv_heads, 50, SPEC.head_dim)
    parents = np.array([0, 1, 1, 3, 0, 5, 6, 2], np.int32)
    tree = DraftTree(np.arange(8, dtype=np.int32), parents, np.ones(8, np.float32))
    groups = [tree_group(Segment(kv, 0, 0, 41, 0), tree), tree_group(Segment(kv, 0, 0, 50, 0), tree)]
    close_to_reference(groups, random_rows(groups), SMALL)


@both_ways
def test_blocks_in_another_order_than_the_prompts() -> None:
    group = random_group(12, rows=3)
    order = np.argsort(-group.block, kind="stable")
    turned = dataclasses.replace(group, block=group.block[order], offset=group.offset[order])
    close_to_reference([turned], random_rows([turned]), SMALL)


@both_ways
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
    attending = {"attend 16", "attend 128", "attend nothing cached", "merge", "lay", "join"}
    attending |= {"laid 64", "laid 64, by blocks"}
    products = {f"product {bits} {rows}" for bits in (8, 4) for rows in (16, 32, 64, 128)}
    assert set(found) == attending | products | {"add_norm", "rotate", "keep", "swiglu", "widen 8", "widen 4", "sum"}
    for name in ("attend 16", "attend 128", "laid 64"):
        assert found[name]["bytes_per_load"] == 16, "K and V are read in whole vectors"
        assert found[name]["spilled_bytes"] <= 32
        assert found[name]["shared_bytes"] <= 227 * 1024
    for name in products:
        assert found[name]["spilled_bytes"] == 0
        assert found[name]["warp_group_products"] > 0, "levels are widened in the registers of the tensor cores"
        assert found[name]["bytes_per_load"] == 16, "rows are read in whole vectors"
        assert found[name]["bytes_per_copy"] >= 4, "levels and scales are read ahead, 32 threads in whole lines"
        assert found[name]["other_loads"] <= 2, "hardly anything is read that was not copied ahead"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "all"])
def test_every_dtype_compiles_for_every_kind_of_gpu(arch: str, dtype: str) -> None:
    limit = {"80": 163, "90": 227, "100": 227}[arch] * 1024
    assert all(each["shared_bytes"] <= limit for each in compiled(arch, dtype).values())


@pytest.mark.parametrize("way", [0], ids=["laid"], indirect=True)
@pytest.mark.usefixtures("way")
def test_short_passes_in_fixed_shapes_give_what_passes_give(tmp_path: Path) -> None:
    """Padded rows, tables and tasks change nothing, nor does a pass of the same shape in between; KV is a copy."""
    spec, weights = load_model(tiny_model("qwen3", tmp_path))
    decoder = Decoder(spec, weights, "triton")
    static = StaticPasses(decoder, lambda run: run)
    passes = [static_example(seed, decoder) for seed in (3, 4, 3)]
    expected = [decoder.forward(work) for work in passes]
    assert [static.forward(work) for work in passes[:2]] == [None, None], "the first of a shape runs as it is"
    found = [static.forward(work) for work in passes]
    for got, wanted in zip(found, expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got.hidden, wanted.hidden, atol=1e-5, rtol=1e-5)
        for some, others in zip(got.kept, wanted.kept, strict=True):
            torch.testing.assert_close(some, others, atol=1e-5, rtol=1e-5)
        assert (got.backend, got.num_rows) == (wanted.backend, wanted.num_rows)


def static_example(seed: int, decoder: Decoder) -> Pass:
    """Two groups over cached blocks; the KV of rows of each is kept, at a base of its own."""
    groups = [within(random_group(each, decoder.spec, rows=2), 100) for each in (seed, seed + 20)]
    count = sum(group.num_rows for group in groups)
    generator = torch.Generator().manual_seed(seed)
    tokens, positions = (torch.randint(0, 200, (count,), generator=generator) for _ in range(2))
    return Pass(tokens, positions, groups, torch.tensor([count - 1, 0]), (Keep(0, 2, 0), Keep(count - 2, count, 7)))


def within(group: Group, positions: int) -> Group:
    """The same with bases that a small model knows."""
    segments = [dataclasses.replace(segment, base=segment.base % positions) for segment in group.segments]
    return dataclasses.replace(group, segments=tuple(segments))


def test_a_replay_in_parts_waits_for_what_each_part_reads(tmp_path: Path) -> None:
    """And gives what a replay at once gives, as soon as its shape has come before."""
    decoder, events = Decoder(*load_model(tiny_model("qwen3", tmp_path, num_hidden_layers=5)), "triton"), list[str]()

    def replayed(run: Run) -> Run:
        def told() -> object:
            events.append("run")
            return run()

        return told

    static, work = StaticPasses(decoder, replayed), static_example(3, decoder)
    expected = [static.forward(work) for _ in range(2)][-1]
    assert expected is not None
    assert events == ["run"]
    parts = tuple(Part(layer, Passing(str(layer), events)) for layer in (0, 2, 4))
    for number in range(3):
        events.clear()
        got = static.forward(dataclasses.replace(work, arrivals=[Arrivals([Arriving(parts)])]))
        assert (got is None) == (number == 0), "the first of a shape runs as it is"
        if got is not None:
            torch.testing.assert_close(got.hidden, expected.hidden, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(got.kept, expected.kept, atol=1e-6, rtol=1e-6)
    assert events == ["0", "run", "2", "run", "4", "run"]


@dataclasses.dataclass(frozen=True)
class Passing:
    """A mark that has not been passed, and notes who waits for it."""

    name: str
    events: list[str]

    def wait(self) -> None:
        self.events.append(self.name)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise AssertionError("the host waits for nothing")


def test_long_passes_run_as_they_are(tmp_path: Path) -> None:
    decoder = Decoder(*load_model(tiny_model("qwen3", tmp_path)), "triton")
    static = StaticPasses(decoder, lambda run: run)
    short = static_example(3, decoder)
    for rows, keep in ((513, short.keep), (2049, ())):
        long = dataclasses.replace(short, token_ids=torch.zeros(rows, dtype=torch.int64), keep=keep)
        assert [static.forward(long) for _ in range(2)] == [None, None]


@pytest.mark.parametrize("way", [1 << 30], ids=["in place"], indirect=True)
@pytest.mark.usefixtures("way")
def test_beams_in_fixed_shapes_find_what_beams_find(tmp_path: Path) -> None:
    """The same search again and again, in one buffer: from the second on its passes are replayed."""
    decoder = Decoder(*load_model(tiny_model("qwen3", tmp_path)), "triton")
    codes = np.random.default_rng(0).integers(0, 6, (200, 4)).astype(np.int32)
    code_index = CodeIndex.build(codes, [ItemId(f"i{i}") for i in range(len(codes))], (6,) * 4)
    tokens = CodeTokens(tuple(np.arange(level * 6, level * 6 + 6, dtype=np.int32) for level in range(4)))
    segments = tuple(within(random_group(4, decoder.spec), 100).segments[:1])
    search = BeamSearch(decoder, OnDevice(tokens, decoder.device), 5)
    found = []
    for number in range(4):
        decoder.static = StaticPasses(decoder, lambda run: run) if number == 1 else decoder.static
        hidden = torch.randn(decoder.spec.hidden_size, generator=torch.Generator().manual_seed(number % 2))
        search.begin([BeamTask(BeamPrompt(segments, 50, hidden), code_index, None, 5, "mask")], unmeasured)
        while not search.ended:
            search.take(decoder.forward(search.next_pass()), unmeasured)
        found += search.found()
    assert decoder.static is not None
    assert len(decoder.static._made) == 3, "one shape for each level that is fed to the model"
    for first, again in ((found[0], found[2]), (found[1], found[3])):
        assert np.array_equal(first.leaves, again.leaves)
        np.testing.assert_allclose(first.scores, again.scores, atol=1e-5)


@contextmanager
def unmeasured(stage: str) -> Iterator[None]:
    yield
