"""What lies where a job keeps its state, and is none, is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.describe.checkpoint import JobCheckpoint
from rcllm.errors import ConfigError

pytest.importorskip("pyarrow", reason="a job writes parquet")


@pytest.mark.parametrize("content", [b"", b"junk", b"[1]", b"\xff\xfe"])
def test_settings_that_are_no_settings(tmp_path: Path, content: bytes) -> None:
    work = tmp_path / "out.parquet.work"
    work.mkdir()
    (work / "settings.json").write_bytes(content)
    with (
        pytest.raises(ConfigError, match=r"out\.parquet\.work exists and is not of `rcllm describe`.*remove it"),
        JobCheckpoint(tmp_path / "out.parquet", {"kind": "user"}),
    ):
        pass


def test_an_output_that_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_bytes(b"junk")
    with (
        pytest.raises(ConfigError, match="is not of `rcllm describe`"),
        JobCheckpoint(tmp_path / "out.parquet", {"kind": "user"}),
    ):
        pass
