"""The script that measures on a GPU, at mini size on the CPU: it ends, its figures are all there, its checks hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("full", "exact", "corrected", "linked", "tail", "blocks")
TTFT = ("prompt_tokens", "blocks_pass_ms", "blocks_pass_floor_share", "blocks_launched_pass_ms", "blocks_vs_exact")
WEIGHTS = ("full_pass_ms", "int8_pass_ms", "int8_floor_share", "gain", "logits_max_error", "logits_mean_error")
METRICS = {
    *("read_gb_per_s", "product_tflops", "logits_fp32_max_error", "logits_bf16_mean_error"),
    *(f"levels_fp32_max_error_{level}" for level in LEVELS),
    *(
        "beams_equal_share",
        "beams_max_error",
        "beams_without_waits",
        "drafts_plain_equal_share",
        "drafts_strict_equal_share",
    ),
    *(f"attention_mini{kept}_r3_b2_{name}" for kept in ("", "_int8") for name in ("us", "floor_share", "best_us")),
    *("attention_mini_r3_b2_sdpa_us", "attention_mini_causal_24_floor_share", "attention_mini_causal_24_sdpa_us"),
    *(f"ttft_mini_t160_c3_{level}_{p}_ms" for level in ("full", "exact", "blocks") for p in ("p50", "p99")),
    *(f"ttft_mini_t160_c3_{name}" for name in TTFT),
    *(f"batch_mini_b{n}_{name}" for n in (1, 2) for name in ("exact_per_s", "blocks_p99_ms", "blocks_vs_exact")),
    *("saturation_mini_exact_per_s", "saturation_mini_blocks_per_s", "saturation_mini_blocks_vs_exact"),
    *(f"beam_mini_t20_w4_{name}" for name in ("step_ms", "step_device_ms", "step_over_floor", "choose_ms")),
    *("speculation_mini_plain_per_s", "speculation_mini_known_per_s", "speculation_mini_tree3_pass_ms"),
    *(f"prefetch_mini_t160_c3_{way}_p50_ms" for way in ("pool", "overlapped", "before", "launched")),
    *(f"prefetch_mini_t160_c3_{name}" for name in ("host_share", "copy_ms", "gb_per_s", "hidden_share", "max_error")),
    *(f"prefetch_mini_t160_c3_exact_{way}_p50_ms" for way in ("alone", "handing_down")),
    *(f"weights_mini_r{rows}_{name}" for rows in (1, 5, 24) for name in WEIGHTS),
    *(f"weights_mini_{name}_r3_{how}us" for name in ("o", "gate_up") for how in ("", "best_", "widened_", "full_")),
    *("weights_mini_mb", "weights_mini_made_s", "weights_mini_making_mb"),
    *("peers_mini_transformers_t160_p50_ms", "peers_mini_transformers_t160_p99_ms"),
}


@pytest.mark.slow
def test_the_dry_run_has_every_metric_and_its_checks_hold(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'rcllm[gpu]'")
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    metrics = json.loads(out.read_text(encoding="utf-8"))["metrics"]
    assert METRICS - metrics.keys() == set()
    assert not [name for name in metrics if name.startswith("left_out")]
    assert max(metrics[f"levels_fp32_max_error_{level}"] for level in LEVELS) < 1e-4
    assert metrics["logits_fp32_max_error"] < 1e-4
    assert metrics["prefetch_mini_t160_c3_max_error"] < 1e-4
    assert metrics["prefetch_mini_t160_c3_host_share"] == 1.0
    assert max(metrics[f"weights_mini_r{rows}_logits_max_error"] for rows in (1, 5, 24)) < 1e-4
    shares = ("beams_equal_share", "beams_without_waits", "drafts_plain_equal_share", "drafts_strict_equal_share")
    assert [metrics[name] for name in shares] == [1.0] * 4
