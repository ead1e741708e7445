"""Cost models: the paper's anchors, known coefficients found again, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rcllm.errors import ConfigError, DataError
from rcllm.sim.cost import Fitted, Network, PassShape, Point, fit, prefill_flops, reached, read_points, roofline
from rcllm.sim.hardware import MODELS, find_gpu, find_model, weight_bytes


def full(tokens: int) -> PassShape:
    return PassShape(tokens, tokens * (tokens + 1) / 2)


@pytest.mark.parametrize(("model", "gpus", "times"), [("qwen3-8b", 1, (0.10, 1.05)), ("qwen2.5-72b", 4, (0.5, 4.5))])
def test_the_anchors_of_the_paper(model: str, gpus: int, times: tuple[float, float]) -> None:
    costs = roofline(model, "a100", gpus)
    assert [costs.pass_s(full(n)) for n in (1000, 10_000)] == pytest.approx(times, rel=1e-6)
    assert 0.2 < reached(model).share < 0.6


def test_sizes_of_the_known_models() -> None:
    """Against their published sizes, and the paper's 147,456 bytes of KV per token in 16 bits."""
    sizes = {name: find_model(name).num_weights / 1e9 for name in MODELS}
    expected = {"qwen3-8b": 8.19, "qwen2.5-72b": 72.7, "qwen3-0.6b": 0.596, "smollm2-135m": 0.1345}
    assert sizes == pytest.approx(expected, rel=0.01)
    assert find_model("qwen3-8b").kv_bytes_per_token(2) == 147_456


def test_prefill_flops_by_hand() -> None:
    spec = find_model("smollm2-135m")
    per_layer = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert prefill_flops(spec, 3) == 3 * 2 * 30 * per_layer + 4 * 30 * 576 * 6


def test_a_pass_is_bound_by_whatever_takes_longest() -> None:
    costs = roofline("qwen3-8b", "a100")
    memory = PassShape(1, 0, kv_bytes=10e9)
    assert costs.pass_s(memory) - costs.overhead_s == pytest.approx((costs.weight_bytes + 10e9) / 2.039e12)
    copied = PassShape(1, 0, copied_bytes=25e9)
    assert costs.pass_s(copied) - costs.overhead_s == pytest.approx(1.0)
    apart = roofline("qwen3-8b", "a100", overlap=False)
    assert apart.pass_s(copied) > costs.pass_s(copied)


def test_a_faster_device_is_faster_and_costs_never_fall() -> None:
    times = {gpu: roofline("qwen3-8b", gpu).pass_s(full(2500)) for gpu in ("l4", "a100", "h100")}
    assert times["h100"] < times["a100"] < times["l4"]
    costs = roofline("qwen3-8b", "h100")
    small = PassShape(100, 1e4, 1e8, 1e8)
    for grown in (PassShape(1), PassShape(0, 1e6), PassShape(0, 0, 1e11), PassShape(0, 0, 0, 1e11)):
        assert costs.pass_s(small + grown) >= costs.pass_s(small)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="145 GB of weights, more than 1 × a100"):
        roofline("qwen2.5-72b", "a100")
    with pytest.raises(ConfigError, match="did you mean 'a100'"):
        find_gpu("a10")
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_model("no-such-model")


def test_a_model_is_read_from_its_folder(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find_model(str(tmp_path)).kv_bytes_per_token(4) == 2 * 2 * 32 * 4
    assert weight_bytes(find_model(str(tmp_path))) > 0


def test_a_fetch_is_latency_and_bandwidth() -> None:
    assert Network(10e9, 0.001).fetch_s(10e9) == pytest.approx(1.001)


# ---- fitted ---------------------------------------------------------------------------------------------------------

TRUE = Fitted(0.03, 1e-3, 2e-7, 5e-11, 0.0, 0.0, 0)


def measured(noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    shapes = [
        PassShape(rows, rows * keys, keys * 23_040.0) for rows in (1, 20, 100, 500, 2000) for keys in (0, 500, 2500)
    ]
    return [Point(shape, TRUE.pass_s(shape) * (1 + noise * rng.standard_normal())) for shape in shapes]


def test_known_coefficients_are_found_again() -> None:
    found = fit(measured())
    assert (found.overhead_s, found.row_s) == pytest.approx((0.03, 1e-3), rel=1e-6)
    assert (found.pair_s, found.byte_s) == pytest.approx((2e-7, 5e-11), rel=1e-4)
    assert found.residual < 1e-6


def test_the_residual_is_told() -> None:
    found = fit(measured(noise=0.1))
    assert 0.03 < found.residual < 0.15
    assert found.worst >= found.residual
    assert min(found.overhead_s, found.row_s, found.pair_s, found.byte_s) >= 0


def test_points_are_read_from_a_result_file(tmp_path: Path) -> None:
    points = measured()[:6]
    metrics: dict[str, float] = {"num_points": len(points)}
    for number, point in enumerate(points):
        shape = point.shape
        values = {"rows": shape.rows, "pairs": shape.pairs, "kv_bytes": shape.kv_bytes, "ms": point.seconds * 1e3}
        metrics |= {f"point_{number}_{name}": value for name, value in values.items()}
    path = tmp_path / "pass_costs.json"
    path.write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    read = read_points(path)
    assert [point.shape for point in read] == [point.shape for point in points]
    assert [point.seconds for point in read] == pytest.approx([point.seconds for point in points])
    with pytest.raises(DataError, match="at least 5"):
        fit(read[:4])
    path.write_text('{"metrics": {}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"benchmarks\.pass_costs"):
        read_points(path)
