"""The report says what the calibration holds, on one page that needs nothing else."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.errors import ConfigError
from rcllm.fidelity.calibration import Calibration
from rcllm.fidelity.report import write_report
from tests.fidelity.test_calibration import CALIBRATION, rung, summary

PNG = b"\x89PNG\r\n\x1a\n"
WHOLE = replace(
    CALIBRATION,
    rungs=(rung("full", summary(0.0, 0.0, 1.0, ms=900.0), context="", label_place="before"), *CALIBRATION.rungs),
    recommended=CALIBRATION.rungs[3].configuration,
    notes=("pointwise <left out>",),
)


def write(calibration: Calibration, folder: Path) -> tuple[str, bytes]:
    write_report(calibration, folder / "f.html", folder / "f.png")
    return (folder / "f.html").read_text(encoding="utf-8"), (folder / "f.png").read_bytes()


def test_the_page_holds_its_figure_and_every_rung(tmp_path: Path) -> None:
    page, figure = write(WHOLE, tmp_path)
    assert figure.startswith(PNG)
    (embedded,) = re.findall(r"data:image/png;base64,([^']+)'", page)
    assert base64.b64decode(embedded) == figure
    assert not re.findall(r"(?:src|href)='(?!data:)", page), "nothing is fetched"
    for each in WHOLE.rungs:
        assert f"<td>{each.configuration}</td>" in page
    assert "Recommended: <b>tail(0.1), label, history_first, label after, context instruction</b>" in page
    assert "pointwise &lt;left out&gt;" in page
    assert page.count("class='best'") == 1
    assert "NDCG@10 -0.0300 at worst" in page
    assert "-0.0010 [-0.0040, +0.0020]" in page


def test_without_times_or_positives_there_is_still_a_report(tmp_path: Path) -> None:
    unknown = [replace(r, summary=replace(r.summary, timing=None)) for r in CALIBRATION.rungs]
    page, figure = write(replace(CALIBRATION, rungs=tuple(unknown)), tmp_path)
    assert figure.startswith(PNG)
    assert "answers exactly" in page


def test_matplotlib_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"rcllm\[report\]"):
        write(WHOLE, tmp_path)
