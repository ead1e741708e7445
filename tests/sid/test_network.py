"""The trainable decoder: what padding, dropout and seeds may change, and what sizes cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rcllm.errors import ConfigError
from rcllm.sid.network import CodeNetwork, NetworkConfig

CONFIG = NetworkConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48, dropout=0.5)


def _network(seed: int = 0) -> CodeNetwork:
    network = CodeNetwork(CONFIG, CONFIG.hf_config(20, 64))
    network.reset(seed)
    return network.eval()


@torch.no_grad()
def test_what_follows_a_row_changes_nothing_before_it() -> None:
    network, row = _network(), torch.tensor([[1, 2, 9, 14]])
    alone = network(row)
    padded = network(torch.tensor([[1, 2, 9, 14, 0, 0], [1, 2, 5, 6, 7, 8]]))
    assert torch.allclose(alone[0], padded[0, :4], atol=1e-6)


@torch.no_grad()
def test_the_order_of_tokens_matters() -> None:
    network = _network()
    first, second = network(torch.tensor([[1, 9, 14, 3]])), network(torch.tensor([[1, 14, 9, 3]]))
    assert not torch.allclose(first[0, -1], second[0, -1], atol=1e-4)


def test_the_seed_decides_the_weights() -> None:
    one, again, other = (_network(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    network, row = _network(), torch.tensor([[1, 2, 9, 14]])
    assert torch.equal(network(row), network(row))
    network.train()
    assert not torch.equal(network(row), network(row))


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, num_layers=0),
        replace(CONFIG, num_heads=3, num_kv_heads=2),
        replace(CONFIG, head_dim=40),
        replace(CONFIG, dropout=1.0),
        replace(CONFIG, dropout=-0.1),
    ],
)
def test_sizes_that_cannot_be(config: NetworkConfig) -> None:
    with pytest.raises(ConfigError):
        config.check()
