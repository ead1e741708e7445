"""Checkpoints: what was saved comes back; junk, other settings and other networks are named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rcllm.errors import ConfigError, ModelError
from rcllm.model.checkpoint import CHECKPOINT, Checkpoint


def checkpoint(folder: Path, width: int = 3, seed: int = 0) -> Checkpoint:
    network = torch.nn.Linear(width, 2)
    return Checkpoint(folder, network, torch.optim.SGD(network.parameters(), 0.1, momentum=0.9), {"seed": seed})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path), checkpoint(tmp_path)
    assert second.restore() is None
    first.save({"step": 4})
    assert second.restore() == {"step": 4}
    assert torch.equal(first.network.weight, second.network.weight)
    with pytest.raises(ConfigError, match="seed 0 → 1"):
        checkpoint(tmp_path, seed=1).restore()


def test_a_checkpoint_of_another_network_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path).save({})
    with pytest.raises(ModelError, match=r"checkpoint\.pt is not a checkpoint of this training .*delete it"):
        checkpoint(tmp_path, width=5).restore()


def test_junk_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path).save({"step": 4})
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    noise = random.Random(0).randbytes(200)
    for content in (b"", b"junk", b"\x80\x04K\x01.", noise, whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"checkpoint\.pt is not a checkpoint of this training"):
            checkpoint(tmp_path).restore()
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="expected settings, network, optimiser, state"):
        checkpoint(tmp_path).restore()
