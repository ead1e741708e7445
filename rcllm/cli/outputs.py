"""Whether a command can write where it was told to, asked before anything expensive begins.

Knows nothing of what is written. Invariant: no command replaces a file that it reads, by whatever name, link or folder
it reaches it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from rcllm.durable import check_writable
from rcllm.errors import ConfigError

STDIO = "-"


def check_file(out: Path | str | None, *reads: object, beside: Path | None = None) -> None:
    """Whether the file `out` can be written and is none of what is read. None and `-` are not files.

    `reads`: paths, names, and groups of options with such in them. `beside`: what stands beside `out` where an earlier
    run of this command made it; then it may lie in a folder that is read. Raises ConfigError, DataError.
    """
    if out is None or out == STDIO:
        return
    path = Path(out)
    check_writable(path)
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder: expected the name of a file, which may lie in that folder")
    if not path.exists():
        return
    own = beside is not None and beside.exists()
    for read in _paths(reads):
        if _is_same(path, read) or (read.is_dir() and not own and _is_in(path, read)):
            raise ConfigError(f"--out {path} would overwrite {read}, which this command reads: name another file")


def check_apart(**outs: Path | None) -> None:
    """Whether the files that a command writes are different ones, by the names of their options. Raises ConfigError."""
    paths = {name: path.resolve() for name, path in outs.items() if path is not None}
    if same := [name for name, path in paths.items() if list(paths.values()).count(path) > 1]:
        told = " and ".join(f"--{name}" for name in same)
        raise ConfigError(f"{told} name the same file: each needs its own")


def check_folder(out: Path, *reads: object) -> None:
    """Whether the folder `out` can be written and is none of what is read. Raises ConfigError, DataError."""
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: expected the name of a folder, which is made where there is none")
    for read in _paths(reads):
        if _is_same(out, read):
            raise ConfigError(f"--out {out} is a folder that this command reads: name another folder")


def _paths(value: object) -> Iterator[Path]:
    """Everything in `value` that may be the name of something that is there."""
    if isinstance(value, str | Path):
        path = Path(value)
        try:
            there = value not in ("", STDIO) and path.exists()  # an option left empty would be the current folder
        except (OSError, ValueError):  # a text that no file can have as its name
            there = False
        if there:
            yield path
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(each)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _paths(getattr(value, each.name))


def _is_same(one: Path, other: Path) -> bool:
    """Also through links, other spellings and hard links."""
    return one.exists() and os.path.samefile(one, other)


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
