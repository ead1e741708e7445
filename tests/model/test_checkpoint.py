"""Checkpoints of trainings: what is no whole checkpoint is refused with what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from rcllm.errors import ConfigError, DataError
from rcllm.model.checkpoint import CHECKPOINT, Checkpoint


def checkpoint(folder: Path, width: int = 2, **settings: int) -> Checkpoint:
    network = torch.nn.Linear(width, width)
    return Checkpoint(folder, network, torch.optim.SGD(network.parameters(), lr=0.1), settings)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoint(tmp_path, seed=1).save({"steps": 3})
    assert checkpoint(tmp_path, seed=1).restore() == {"steps": 3}
    assert checkpoint(tmp_path / "other").restore() is None
    with pytest.raises(ConfigError, match="seed 1 → 2"):
        checkpoint(tmp_path, seed=2).restore()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04torn", pickle.dumps([1]), pickle.dumps({"settings": 1})])
def test_junk_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(
        DataError, match=r"checkpoint\.pt is not a whole checkpoint of this training .*remove it to begin"
    ):
        checkpoint(tmp_path).restore()


def test_a_torn_file_and_another_network_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path).save({"steps": 3})
    whole = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(DataError, match="not a whole checkpoint"):
        checkpoint(tmp_path, width=3).restore()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole checkpoint"):
        checkpoint(tmp_path).restore()
