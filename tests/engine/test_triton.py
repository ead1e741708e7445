"""The engine on the kernels for GPUs, in Triton's interpreter: against the dense fp64 twin and the compiled kernels."""

from __future__ import annotations

from typing import Any

import pytest

from rcllm.engine.engine import Engine
from tests.engine import tiny
from tests.engine.test_reference import assert_close, expected

pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")


@pytest.fixture(scope="module")
def on_triton() -> Engine:
    return tiny.build(attention="triton")


@pytest.mark.parametrize("level", ["full", "blocks"])
def test_scores_are_those_of_the_dense_twin(on_triton: Engine, one_compute_thread: None, level: str) -> None:
    asked = tiny.request((0, 7), (30,), level=level)
    response = on_triton.rank(asked)
    assert response.receipt.backend == "triton"
    assert response.receipt.kv_bytes_copied == 0
    assert_close(response.scores, expected(on_triton, asked, level))


@pytest.mark.slow
@pytest.mark.parametrize("shape", tiny.SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("level", tiny.LEVELS)
@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_every_level_and_shape_equals_the_compiled_kernels(
    one_compute_thread: None, level: str, shape: dict[str, Any], kv_dtype: str
) -> None:
    asked = tiny.request((0, 1, 7), (30, 31), level=level, **shape)
    scores = [tiny.build(attention=name, kv_dtype=kv_dtype).rank(asked).scores for name in ("auto", "triton")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3 if kv_dtype == "int8" else 1e-5)
