"""The package as a whole: what importing costs, and what it offers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import rcllm

ROOT = Path(__file__).resolve().parents[1]


def test_importing_rcllm_imports_no_torch() -> None:
    script = "import sys, rcllm, rcllm.core.ranking, rcllm.data; assert 'torch' not in sys.modules, 'torch came along'"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_public_name_is_there() -> None:
    for name in rcllm.__all__:
        assert getattr(rcllm, name).__name__ == name


def test_what_decides_loads_no_torch() -> None:
    """All modules that the contract in pyproject.toml names, in one process; the linter sees imports, this the run."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (deciding,) = (each["source_modules"] for each in contracts if each["name"] == "what decides never imports torch")
    modules = [module for name in deciding for module in _with_its_modules(name)]
    assert len(modules) > len(deciding)
    script = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules, 'torch came along'"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def _with_its_modules(name: str) -> list[str]:
    folder = ROOT.joinpath(*name.split("."))
    inside = [path.stem for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    return [name, *(f"{name}.{module}" for module in inside)]
