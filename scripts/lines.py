"""How much code there is: prints lines of code per room, without blank lines, comments and docstrings.

    python scripts/lines.py

Needs no package. Invariant: a line counts once, whatever stands on it.
"""

from __future__ import annotations

import ast
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True, slots=True)
class Room:
    name: str
    num_files: int
    num_lines: int


def code_lines(path: Path) -> int:
    """Lines of a Python file that hold code."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    lines = {line for token in tokens if token.type not in _NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - _docstring_lines(ast.parse(path.read_text(encoding="utf-8"))))


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def rooms(folder: Path) -> list[Room]:
    """One per folder directly below `folder`; its own files count as one room."""
    files, lines = Counter[str](), Counter[str]()
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        name = f"{folder.name}/{inside[0]}/" if len(inside) > 1 else f"{folder.name}/*.py"
        files[name] += 1
        lines[name] += code_lines(path)
    return [Room(name, files[name], lines[name]) for name in sorted(files)]


def whole(name: str) -> Room:
    parts = rooms(ROOT / name)
    return Room(name, sum(room.num_files for room in parts), sum(room.num_lines for room in parts))


def main() -> None:
    print(f"{'lines of code':22}{'files':>6}{'lines':>8}")
    for room in (*rooms(ROOT / "rcllm"), *map(whole, ("rcllm", "tests", "benchmarks", "scripts"))):
        print(f"{room.name:22}{room.num_files:6,}{room.num_lines:8,}")


if __name__ == "__main__":
    main()
