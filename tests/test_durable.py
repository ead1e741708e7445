"""Files that are whole or not there. `tests/describe/test_job.py` kills a job at every sync and rename."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rcllm.durable import renamed, write, writing
from rcllm.errors import DataError


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    write(target, b"old")

    def fail() -> None:
        with renamed(target) as partial:
            partial.write_bytes(b"half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_nothing_written_renames_nothing(tmp_path: Path) -> None:
    with renamed(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with renamed(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "b"]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    kept = tmp_path / "folder" / "kept"
    write(kept, b"")
    with pytest.raises(DataError, match="cannot be written"), writing(kept.parent):
        write(kept.parent, b"file")
    assert kept.exists()
    assert list(tmp_path.iterdir()) == [kept.parent]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int, mode: int) -> None:
    """A server may run as another user than a training, and safetensors' files are for their owner alone."""
    before = os.umask(mask)
    try:
        with renamed(tmp_path / "model.safetensors") as partial:
            save_file({"weight": np.zeros(3)}, partial)
        with renamed(tmp_path / "folder") as partial:
            partial.mkdir()
            save_file({"weight": np.zeros(3)}, partial / "inside")
    finally:
        os.umask(before)
    for name in ("model.safetensors", "folder/inside"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
