"""`rcllm calibrate --cluster`: the same figures as one process measures, and each record once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.fidelity.calibration import Calibration
from tests.cli.conftest import Run, Shop, read_lines
from tests.on_ray.test_cluster import pytestmark as pytestmark

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rcllm[cluster]'")

TRIED = ("--readouts", "label", "--layouts", "history_first", "--label-places", "after", "--contexts", "none mean(2)")
ON = ("--candidates", "5", "--history", "3", "--timed", "0", "--count", "7", "--levels", "blocks tail(0.5)")


def test_two_processes_find_what_one_finds(run: Run, shop: Shop, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for out, cluster in ((one, ()), (two, ("--cluster", "local:2"))):
        shown = run("calibrate", *shop.on_dataset, *TRIED, *ON, *cluster, "--out", out)
        assert shown.exit_code == 0, shown.stderr
    found, same = Calibration.load(one), Calibration.load(two)
    assert [rung.configuration for rung in found.rungs] == [rung.configuration for rung in same.rungs]
    for left, right in zip(found.rungs, same.rungs, strict=True):
        assert left.summary.measures["tau"].mean == pytest.approx(right.summary.measures["tau"].mean, nan_ok=True)
    keys = [
        [row["key"] for row in read_lines(out.with_name(f"{out.name}.records.jsonl").read_text())] for out in (one, two)
    ]
    assert len(set(keys[1])) == len(keys[1]), "each once"
    assert set(keys[0]) == set(keys[1])
    before = two.with_name("two.json.records.jsonl").read_bytes()
    again = run("calibrate", *shop.on_dataset, *TRIED, *ON, "--cluster", "local:2", "--out", two)
    assert again.exit_code == 0, again.stderr
    assert two.with_name("two.json.records.jsonl").read_bytes() == before, "nothing is measured twice"
