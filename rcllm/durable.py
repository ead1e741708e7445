"""Files and folders that are whole or not there, whatever kills the process or the machine.

Knows nothing of what they hold. Invariant: a path gets its name when all of it is on the disk; partial work has a name
that begins with a dot and ends in `.partial`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rcllm.errors import DataError


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns what the system says of full disks and missing rights into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{where}: cannot be written: {error}. What was finished before is kept; make room, or name a place that "
            "can be written, and run the same command again to go on"
        ) from error


@contextlib.contextmanager
def renamed(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which then gets the name `target`; nothing written, nothing renamed.

    Replaces a file at once. A folder makes way for a folder only: it is moved aside first, so that a kill in between
    leaves none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)
    try:
        yield partial
        if not partial.exists():
            return
        for path in [*partial.rglob("*"), partial]:
            _let_read(path)
            _sync(path)
        if partial.is_dir() and target.is_dir():
            aside = target.with_name(f".{target.name}.old.partial")
            remove(aside)
            target.replace(aside)
            partial.replace(target)
            remove(aside)
        else:
            partial.replace(target)
        _sync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


def check_writable(out: Path) -> None:
    """Whether a file or folder can be made at `out`, whose folders may be missing. Makes none. Raises DataError."""
    try:
        out.exists()  # a name that is too long is refused here
        nearest = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written: {error.strerror or error}; name a place that can be written"
        ) from error


def _let_read(path: Path) -> None:
    """Whoever may read a new file may read this one: safetensors writes files for their owner alone."""
    if path.is_file() and not path.is_symlink():
        mask = os.umask(0o022)  # there is no other way to ask for it
        os.umask(mask)
        path.chmod(path.stat().st_mode | 0o444 & ~mask)


def write(target: Path, content: bytes) -> None:
    with renamed(target) as partial:
        partial.write_bytes(content)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_torn(folder: Path) -> None:
    """What killed processes left half-written."""
    for path in folder.glob(".*.partial"):
        remove(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
