"""How a replica, and the HTTP side, make what they work with: a contract, so that this room needs no command line.

Never imports ray. Invariant: a recipe is pickled, and gives equal parts wherever it is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from rcllm.config import MIB, ClusterConfig, Config, num_usable_cores
from rcllm.core.ranking import Item, ItemId
from rcllm.engine.build import this_machine
from rcllm.engine.engine import Engine
from rcllm.engine.fit import fit
from rcllm.engine.space import chosen_chat
from rcllm.engine.tiers import budget_of, folder_of
from rcllm.model.pull import pull
from rcllm.prompt.chat import Chat
from rcllm.prompt.template import chat_format
from rcllm.prompt.texts import Texts as PromptTexts
from rcllm.prompt.tokenizer import Tokenizer
from rcllm.server.backend import Texts
from rcllm.server.on_engine import EngineBackend, EngineTexts
from rcllm.store.contract import Store

_SHARE = 0.6  # of a machine's memory, for all replicas that run on it


@dataclass(frozen=True, slots=True)
class Built:
    """What one replica answers with."""

    engine: Engine
    backend: EngineBackend
    close: Callable[[], None]  # of the engines, at the end


@dataclass(frozen=True, slots=True)
class Front:
    """What the HTTP side needs of a model without its weights."""

    catalogue: Mapping[ItemId, Item]
    texts: Texts
    prompt_texts: PromptTexts  # the texts of items, as the replicas write them


class Recipe(Protocol):
    """Everything that a cluster is made of, but for Ray."""

    @property
    def config(self) -> Config: ...

    def item_ids(self) -> tuple[ItemId, ...]:
        """Of the catalogue, in its order: what placements number."""

    def front(self) -> Front:
        """Loads the catalogue and the tokenizer."""

    def build(self, node: int, peers: Store | None) -> Built:
        """Loads the model. `peers`: a tier of what other replicas have; None: there is none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every process of one cluster is told."""

    recipe: Recipe
    cluster: ClusterConfig
    run: str  # names this start of the cluster: what it changed is not that of another one
    app: str = "rcllm"  # of Ray Serve


# ---- what recipes have in common ---------------------------------------------------------------------------------


def front_of(config: Config, catalogue: Mapping[ItemId, Item]) -> Front:
    """Of a configuration whose model is not loaded. Raises what loading it would raise of its files."""
    folder, fitted = pull(config.model.path), fit(catalogue, config)
    tokenizer = Tokenizer.load(folder, config.prompt.item_tokens)
    chat = chat_format(chosen_chat(config.prompt, folder, tokenizer))
    return Front(
        fitted.catalogue, EngineTexts(tokenizer, Chat(tokenizer, chat)), PromptTexts(fitted.template, tokenizer)
    )


def for_node(config: Config, cluster: ClusterConfig, node: int) -> Config:
    """The configuration of one replica: its share of a machine that it has with others, and its own store.

    Memory and disk that are configured are those of each replica. Where Ray spreads replicas over machines, each may
    take what one process takes by default.
    """
    threads = config.model.threads or min(max(int(cluster.cpus), 1), num_usable_cores())
    num_sharing = 1 if cluster.address else max(cluster.replicas, cluster.max_replicas)
    cache, store = config.cache, config.store
    if not cache.memory_mb and not cluster.gpus:
        cache = replace(cache, memory_mb=int(this_machine().memory_bytes * _SHARE / num_sharing) // MIB)
    if store.enabled:
        folder = folder_of(store)
        disk_mb = store.disk_mb or max(budget_of(store, folder) // num_sharing // MIB, 1)
        store = replace(store, folder=str(folder / f"node-{node}"), disk_mb=disk_mb)
    return replace(config, model=replace(config.model, threads=threads), cache=cache, store=store)
