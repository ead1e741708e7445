"""A fresh Python environment that holds what a wheel declares and nothing else, without downloading anything.

The distributions that the wheel's requirements lead to are linked from the environment of the tests, each with its
record; pip then installs the wheel beside them, and finds its requirements met. Invariant: a package that no
requirement leads to cannot be imported there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


@dataclass(frozen=True, slots=True)
class FreshEnvironment:
    folder: Path

    @classmethod
    def create(cls, folder: Path, wheel: Path, *extras: str) -> FreshEnvironment:
        """An environment in which `wheel` is installed with `extras`."""
        venv.create(folder, symlinks=True)
        made = cls(folder)
        linked = folder.with_name(f"{folder.name}-linked")  # outside, where pip removes nothing
        linked.mkdir()
        for distribution in _closure(wheel, extras).values():
            _link(distribution, linked)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "linked.pth").write_text(str(linked), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
        wanted = f"rcllm[{','.join(extras)}] @ {wheel.as_uri()}"
        ran = subprocess.run([*pip, "--no-index", wanted], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return made

    def run(self, *words: object, away: Path, path: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment at home in the folder `away`; `path`: where it finds other programs."""
        program, *arguments = map(str, words)
        variables = {"PATH": path, "HOME": str(away), "RCLLM_HOME": str(away), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.folder / "bin" / program, *arguments], cwd=away, env=variables, capture_output=True, text=True
        )


def _closure(wheel: Path, extras: Iterable[str]) -> Mapping[str, metadata.Distribution]:
    """The installed distributions that the wheel's requirements lead to, by name."""
    (info,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    requirements = (info / "METADATA").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    waiting = [
        (Requirement(line.removeprefix("Requires-Dist: ")), tuple(extras))
        for line in requirements
        if line.startswith("Requires-Dist: ")
    ]
    found: dict[str, metadata.Distribution] = {}
    asked = set[str]()
    while waiting:
        requirement, of = waiting.pop()
        if not _applies(requirement, of) or str(requirement) in asked:
            continue
        asked.add(str(requirement))
        distribution = metadata.distribution(requirement.name)
        found[requirement.name.lower()] = distribution
        waiting += [(Requirement(text), tuple(requirement.extras)) for text in distribution.requires or ()]
    return found


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _link(distribution: metadata.Distribution, folder: Path) -> None:
    """Links every file and folder that the distribution has at the top of its own site-packages."""
    tops = {file.parts[0] for file in distribution.files or ()} - {os.pardir, "__pycache__"}
    for top in tops:
        if not (folder / top).exists():
            (folder / top).symlink_to(str(distribution.locate_file(top)))
