"""The ceilings are numbers that a machine can have, and the description is filled in."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from rcllm.model.ceilings import describe_hardware, measure_bandwidth, measure_gemm, usable_memory_bytes
from rcllm.model.spec import ModelSpec

SPEC = ModelSpec.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_gemm_rate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcllm.model.ceilings._SECONDS", 0.0)
    assert 0.001 < measure_gemm(8, SPEC, dtype) < 100_000


def test_bandwidth_is_that_of_memory() -> None:
    assert 1e8 < measure_bandwidth() < 1e13


def test_description() -> None:
    machine = describe_hardware()
    assert machine.cpu
    assert machine.instruction_set
    assert machine.torch_version == torch.__version__
    assert machine.num_cores >= 1
    assert machine.num_threads == torch.get_num_threads()
    assert machine.memory_bytes > 1 << 28


@pytest.mark.parametrize(
    ("name", "told", "limit"),
    [
        ("memory.max", "1000000\n", 1_000_000),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "1000000\n", 1_000_000),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("elsewhere", "1000000\n", None),
    ],
)
def test_a_container_has_no_more_memory_than_its_limit(tmp_path: Path, name: str, told: str, limit: int | None) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(told)
    assert usable_memory_bytes(tmp_path) == (limit or psutil.virtual_memory().total)
