"""A recipe of tiny engines, which processes of a cluster follow by the folder that the test made."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rcllm.config import CacheConfig, ClusterConfig, Config, ModelConfig, PromptConfig, ServerConfig, StoreConfig
from rcllm.core.ranking import Item, ItemId
from rcllm.engine.engine import Engine
from rcllm.errors import ModelError
from rcllm.on_ray.recipe import Built, Front, for_node, front_of
from rcllm.server.on_engine import EngineBackend
from rcllm.store.contract import Store
from rcllm.store.faulty import Faults, FaultyStore
from tests.engine import tiny

DAMAGE = "RCLLM_TEST_DAMAGED_PEERS"  # set in the environment of replicas: what comes from others has a wrong bit


@dataclass(frozen=True, slots=True)
class TinyRecipe:
    """See `on_ray.recipe.Recipe`."""

    config: Config
    cluster: ClusterConfig

    @classmethod
    def of(cls, cluster: ClusterConfig, store: Path | None = None, port: int = 0) -> TinyRecipe:
        """Makes the model's folder, for all processes of this machine."""
        config = Config(
            model=ModelConfig(path=str(tiny.model_folder()), threads=1),
            prompt=PromptConfig(template=str(tiny.template_path())),
            cache=CacheConfig(pool_mb=64, kv_dtype="fp32"),
            store=StoreConfig(enabled=store is not None, folder="" if store is None else str(store), disk_mb=64),
            server=ServerConfig(port=port, drain_s=5.0),
        )
        return cls(config, cluster)

    def item_ids(self) -> tuple[ItemId, ...]:
        return tiny.IDS

    def front(self) -> Front:
        return front_of(self.config, self._catalogue())

    def build(self, node: int, peers: Store | None) -> Built:
        config = for_node(self.config, self.cluster, node)
        if peers is not None and os.environ.get(DAMAGE):
            peers = FaultyStore(peers, Faults(flipped=1.0), random.Random(node))
        engine = Engine.build(self._catalogue(), config, peers=peers, node=f"node {node}")
        if peers is not None:  # a tiny model computes sooner than anything comes; so it has to learn that first
            engine.pool.rates.bytes_of["peer"].per_s = 1e12
        return Built(engine, EngineBackend(engine, "tiny"), engine.close)

    def _catalogue(self) -> Mapping[ItemId, Item]:
        return tiny.catalogue()


@dataclass(frozen=True, slots=True)
class BrokenRecipe(TinyRecipe):
    """No replica of it can begin."""

    def build(self, node: int, peers: Store | None) -> Built:
        raise ModelError("its weights are of another model")
