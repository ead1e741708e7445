"""`rcllm serve --cluster`: refused with words before anything begins; a cluster that answers and drains."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Run, Shop
from tests.cli.test_serve import serving

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ray is made of


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--cluster", "local:0"), "expected local:N"),
        (("--cluster", "local:many"), "expected local:N"),
        (("--cluster", "nowhere.toml"), "nowhere.toml"),
        (("--cluster", "a.toml", "--config", "b.toml"), "named twice"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, shop: Shop, words: tuple[str, ...], told: str) -> None:
    result = run("serve", *shop.on_items, *words)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "nowhere"), "unknown model 'nowhere'"),
        (("--template", "nowhere"), "nowhere"),
        (("--level", "blocks"), "reuse level blocks is not calibrated"),
    ],
)
def test_what_is_wrong_with_the_model_is_said_before_ray_is_begun(
    run: Run, shop: Shop, words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_ray(cluster: object) -> None:
        raise AssertionError("begun")

    monkeypatch.setattr("rcllm.on_ray.application.begin_ray", begin_ray)
    result = run("serve", *shop.on_items, "--port", "0", "--cluster", "local:2", *words)
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.output.split())


@pytest.mark.slow
def test_two_replicas_answer_and_drain(shop: Shop, tmp_path: Path) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text('[cluster]\nreplicas = 2\nroute = "ttft"\n[server]\nserved_name = "shop"\n')
    words = ("--cluster", str(config), "--readout", "pointwise", "--allow-uncalibrated")
    with serving(shop, *words) as (address, process):
        told = httpx.post(f"{address}/v1/rank", json={"candidates": ["i1", "i2"], "history": ["i3"]}, timeout=60)
        assert told.json()["readout"] == "pointwise"
        changed = httpx.put(f"{address}/v1/items/x", json={"fields": {"title": "new"}}, timeout=60).json()
        assert changed["acknowledged"] == ["node 0", "node 1"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
