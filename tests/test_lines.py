"""The count of lines that CI prints."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "lines.py"
SOURCE = '''"""A module.

Two lines of it.
"""

# a comment
TEXT = """one
two"""  # counts twice


def double(value: int) -> int:
    """A docstring."""
    return (
        2
        * value  # a comment beside code
    )
'''


def test_blank_lines_comments_and_docstrings_are_no_code(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE, encoding="utf-8")
    assert runpy.run_path(str(SCRIPT))["code_lines"](path) == 7


def test_the_table_names_every_room() -> None:
    table = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[0] for line in table[1:]]
    rooms = {
        f"rcllm/{path.name}/" for path in (SCRIPT.parents[1] / "rcllm").iterdir() if (path / "__init__.py").exists()
    }
    assert rooms <= set(names)
    assert names[-4:] == ["rcllm", "tests", "benchmarks", "scripts"]
