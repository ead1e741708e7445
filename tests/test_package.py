"""The package as a whole: what importing costs, what it offers, and that the README is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rcllm

ROOT = Path(__file__).resolve().parents[1]


def test_importing_rcllm_imports_no_torch() -> None:
    script = "import sys, rcllm, rcllm.core.ranking, rcllm.data; assert 'torch' not in sys.modules, 'torch came along'"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_public_name_is_there() -> None:
    for name in rcllm.__all__:
        assert getattr(rcllm, name).__name__ == name


def test_only_named_modules_of_the_deciding_plane_are_loaded_without_torch() -> None:
    modules = (
        "reuse.plan",
        "prompt.blocks",
        "store.contract",
        "store.index",
        "cache.lookup",
        "config",
        "model.spec",
        "fidelity.measures",
    )
    modules += ("fidelity.calibration", "fidelity.report", "schedule.admission", "schedule.scheduler")
    imports = ", ".join(f"rcllm.{module}" for module in modules)
    script = f"import sys, {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^\s*rcllm ([a-z]+)", readme, flags=re.MULTILINE))
    assert commands >= {"rank", "explain", "doctor"}
    known = subprocess.run([sys.executable, "-m", "rcllm.cli.app", "--help"], capture_output=True, text=True, cwd=ROOT)
    for command in commands:
        assert command in known.stdout, f"README names `rcllm {command}`, which does not exist"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\s*make ([a-z]+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names `make {target}`"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On the real model, which is fetched when it is not there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "tokens reused" in capsys.readouterr().out
