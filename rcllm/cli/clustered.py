"""`rcllm serve --cluster`: what its processes are told, and how each makes its part.

Knows nothing of Ray. Invariant: a recipe holds options alone, so that every process reads model and items for itself,
and what is wrong with them is said before the first one is begun.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rcllm.cache.heap import share_arenas
from rcllm.cli.calibrated import admission_from, check_level
from rcllm.cli.inputs import Inputs, context_requests, load_inputs
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions
from rcllm.config import ClusterConfig, Config, ModelConfig
from rcllm.core.ranking import ItemId
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import ConfigError, ModelWarning, StoreWarning, TextWarning
from rcllm.late import Late
from rcllm.sid.load import load_recommender
from rcllm.store.contract import Store

if TYPE_CHECKING:
    from rcllm.on_ray import application, recipe
    from rcllm.server import guarding, on_engine
else:
    application, recipe = Late("rcllm.on_ray.application"), Late("rcllm.on_ray.recipe")
    guarding, on_engine = Late("rcllm.server.guarding"), Late("rcllm.server.on_engine")

_LOCAL = "local:"
_DECODER_SHARE = 1 / 16  # of the memory that a decoder finds, for its KV; the ranking engine has the rest


def _is_file(cluster: str) -> bool:
    """Whether the option names a configuration file."""
    return not cluster.startswith(_LOCAL)


def configured_by(options: EngineOptions, cluster: str) -> EngineOptions:
    """The options, with the file that `--cluster` names as their configuration, if it names one. Raises ConfigError."""
    if not _is_file(cluster):
        return options
    if options.config is not None:
        raise ConfigError(
            f"the configuration is named twice, as --config {options.config} and as --cluster {cluster}; put the "
            "section [cluster] into the one file, and name it by --cluster"
        )
    return replace(options, config=Path(cluster))


def cluster_of(cluster: str, config: Config) -> ClusterConfig:
    """What `--cluster` says: `local:4`, or the section [cluster] of the file that it names. Raises ConfigError."""
    if _is_file(cluster):
        return config.cluster
    number = cluster.removeprefix(_LOCAL)
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--cluster: expected local:N with N of 1 or more, or a file, got {cluster!r}")
    return application.local(config.cluster, int(number))


def check_extra() -> None:
    """Raises ConfigError where what a cluster is made of is not installed."""
    try:
        application.running  # noqa: B018  (the first look imports it)
    except ImportError as error:
        raise ConfigError(f"a cluster needs Ray ({error}): pip install 'rcllm[cluster,server]'") from error


@dataclass(frozen=True, slots=True)
class ServeRecipe:
    """See `on_ray.recipe.Recipe`."""

    config: Config
    cluster: ClusterConfig
    items: ItemOptions
    fidelity: FidelityOptions
    decoder: Path | None = None

    def item_ids(self) -> tuple[ItemId, ...]:
        return tuple(self._inputs().catalogue)

    def front(self) -> recipe.Front:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TextWarning)  # said by the command
            return recipe.front_of(self.config, self._inputs().catalogue)

    def build(self, node: int, peers: Store | None) -> recipe.Built:
        share_arenas()
        config, inputs = recipe.for_node(self.config, self.cluster, node), self._inputs()
        samples = context_requests(config.prompt.context, inputs, [])
        with warnings.catch_warnings():
            for known in (TextWarning, ModelWarning, StoreWarning):
                warnings.simplefilter("default", known)
            recommender = None if self.decoder is None else recommender_of(config, self.decoder, inputs)
            engine = Engine.build(
                inputs.catalogue,
                config,
                samples,
                admission_from(self.fidelity),
                peers=peers,
                node=f"node {node}",
                beside=None if recommender is None else recommender.engine.pool,
            )
        check_level(engine)
        guard = guarding.guard_of(engine, config.server)
        backend = on_engine.EngineBackend(engine, config.model.path, recommender, guard)
        return recipe.Built(engine, backend, partial(_close, engine, recommender))

    def _inputs(self) -> Inputs:
        return load_inputs(self.items)


def _close(engine: Engine, recommender: Recommender | None) -> None:
    engine.close()
    if recommender is not None and recommender.engine is not engine:
        recommender.engine.close()


def recommender_of(config: Config, decoder: Path, inputs: Inputs) -> Recommender:
    """The decoder of semantic IDs beside the engine of `config`, which is loaded after it, beside its pool."""
    share_arenas()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)
        model = ModelConfig(path=str(decoder), device=config.model.device, threads=config.model.threads)
        config = Config(model=model, cache=config.cache, schedule=config.schedule, store=config.store)
        return load_recommender(config, items=inputs.catalogue, share=_DECODER_SHARE)
