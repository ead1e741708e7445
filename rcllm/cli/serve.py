"""`rcllm serve`. Knows nothing of HTTP or of how answers come about.

Invariant: what a user gave wrongly, the address among it, is said before the model is loaded.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rcllm.cli.calibrated import admission_from, check_level, check_level_of
from rcllm.cli.checkout import DECODER, RANKER, RANKER_TEMPLATE
from rcllm.cli.clustered import ServeRecipe, check_extra, cluster_of, configured_by, recommender_of
from rcllm.cli.commands.serve import ServerOptions
from rcllm.cli.inputs import Inputs, load_inputs, make_config, make_engine
from rcllm.cli.options import EngineOptions, FidelityOptions, ItemOptions, RankingOptions, StoreOptions
from rcllm.cli.screen import busy, say
from rcllm.config import Config, ModelConfig, PromptConfig, ServerConfig, for_serving
from rcllm.core.ranking import RankOptions
from rcllm.data import fetch_movielens
from rcllm.engine.fit import fit
from rcllm.engine.jobs.recommend import Recommender
from rcllm.errors import ConfigError
from rcllm.fields import given
from rcllm.late import Late

if TYPE_CHECKING:
    from rcllm.on_ray import application
    from rcllm.server import guarding, keys, logs, on_engine, run, spans, viewers
else:
    application = Late("rcllm.on_ray.application")
    guarding, keys, logs, on_engine, run, spans, viewers = (
        Late(f"rcllm.server.{name}") for name in ("guarding", "keys", "logs", "on_engine", "run", "spans", "viewers")
    )


def serve_command(
    engine_options: EngineOptions,
    item_options: ItemOptions,
    ranking: RankingOptions,
    fidelity: FidelityOptions,
    store: StoreOptions,
    server: ServerOptions,
    name: str | None,
    decoder: Path | None,
    cluster: str | None,
    demo: bool,
) -> None:
    """Serves until a signal comes."""
    if cluster is not None:
        engine_options = configured_by(engine_options, cluster)
    if name is not None and engine_options.model is not None:
        raise ConfigError(f"the model is named twice, as {name} and as --model {engine_options.model}; name it once")
    engine_options = replace(engine_options, model=name or engine_options.model)
    config = make_config(engine_options, ranking, store)
    config = _demo(config, engine_options, ranking, item_options) if demo else config
    config = replace(config, server=_over(config.server, server), schedule=for_serving(config.schedule))
    _check_extra()
    keys.check_address(config.server)
    run.check_free(config.server)
    if decoder is not None and not decoder.is_dir():
        raise ConfigError(f"--decoder {decoder}: there is no such folder; `rcllm sid train` makes one")
    if cluster is not None:
        _serve_cluster(config, item_options, fidelity, decoder, cluster, demo=demo)
        return
    traces = spans.open_spans(os.environ, config.server.served_name or config.model.path)
    inputs = _movielens() if demo else load_inputs(item_options)
    if demo and decoder is None and DECODER.is_dir():
        decoder = DECODER
    recommender = _recommender(config, decoder, inputs) if decoder is not None else None
    beside = None if recommender is None else recommender.engine.pool
    engine = make_engine(config, inputs, admission=admission_from(fidelity), asked=[config.rank], beside=beside)
    check_level(engine)
    guard = guarding.guard_of(engine, config.server)
    backend = on_engine.EngineBackend(engine, config.model.path, recommender, guard)
    logs.configure()
    with engine, nullcontext() if recommender is None else recommender.engine:
        shown = viewers.viewers_of(inputs.dataset.interactions) if demo and inputs.dataset is not None else ()
        run.serve(backend, config.server, lambda address: _tell(address, config.server, inputs), shown, traces)


def _serve_cluster(
    config: Config, items: ItemOptions, fidelity: FidelityOptions, decoder: Path | None, cluster: str, *, demo: bool
) -> None:
    """The same with replicas on Ray."""
    check_extra()
    if demo:
        raise ConfigError("--demo has one process: name --items and --model to serve them with --cluster")
    section = cluster_of(cluster, config)
    inputs = load_inputs(items)
    for remark in fit(inputs.catalogue, config).remarks([config.rank]):
        say(f"warning: {remark}")
    check_level_of(config, fidelity)
    recipe = ServeRecipe(config, section, items, fidelity, decoder)
    say(f"starting {section.replicas} replicas", "dim")
    application.run(recipe, section, lambda address: _tell(address, config.server, inputs))


def _over(section: ServerConfig, options: ServerOptions) -> ServerConfig:
    """The section with the options that were given; --insecure can only allow, --no-warm only leave out."""
    named = {name: getattr(options, name) for name in ("host", "port", "served_name")}
    section = replace(section, **{name: value for name, value in named.items() if value is not None})
    return replace(section, insecure=section.insecure or options.insecure, warm=section.warm and options.warm)


def _check_extra() -> None:
    """Raises ConfigError where what the server is made of is not installed."""
    try:
        run.HttpServer  # noqa: B018  (the first look imports it)
    except ImportError as error:
        raise ConfigError(f"serving needs fastapi, uvicorn and more ({error}): pip install 'rcllm[server]'") from error


def _demo(config: Config, engine: EngineOptions, ranking: RankingOptions, items: ItemOptions) -> Config:
    """With the demo's own model, template and read-out, beside its own items. Raises ConfigError for others of them."""
    made, usual = _with_ranker(config), Config()
    lost = [f"--{name.replace('_', '-')}" for name in given(items)]
    for options, name, section, key in (
        (engine, "model", "model", "path"),
        (engine, "adapter", "model", "adapter"),
        (engine, "template", "prompt", "template"),
        (engine, "context", "prompt", "context"),
        (ranking, "readout", "rank", "readout"),
    ):
        asked, own, default = (getattr(getattr(each, section), key) for each in (config, made, usual))
        if getattr(options, name) not in (None, own) or asked not in (own, default):
            lost.append(f"--{name}")
    if lost:
        raise ConfigError(f"--demo brings its own model and items: leave out {' and '.join(lost)}")
    return made


def _with_ranker(config: Config) -> Config:
    """The committed ranker where this is a checkout, else the bare model, which ranks by how likely a title is."""
    model = replace(config.model, path=ModelConfig().path, adapter=str(RANKER) if RANKER.is_dir() else "")
    if not RANKER.is_dir():
        prompt = replace(config.prompt, template="movies")
        return replace(config, model=model, prompt=prompt, rank=replace(config.rank, readout="likelihood"))
    rank: RankOptions = replace(config.rank, readout="pointwise")
    prompt = replace(config.prompt, template=RANKER_TEMPLATE, context=PromptConfig().context)
    return replace(config, model=model, prompt=prompt, rank=rank)


def _movielens() -> Inputs:
    with busy("fetching MovieLens-100K"):
        dataset = fetch_movielens()
    return Inputs(dataset.catalogue, dataset)


def _recommender(config: Config, decoder: Path, inputs: Inputs) -> Recommender:
    with busy(f"loading {decoder}"):
        return recommender_of(config, decoder, inputs)


def _tell(address: str, config: ServerConfig, inputs: Inputs) -> None:
    item_id = next(iter(inputs.catalogue))
    keyed = "with" if config.has_keys else "without"
    say(f"serving at {address}, {keyed} keys; ready when {address}/ready says so", "")
    key = "-H 'Authorization: Bearer YOUR-KEY' " if config.has_keys else ""
    say(f"""try: curl {key}{address}/v1/rank -d '{{"candidates": ["{item_id}"]}}'""", "dim")
