"""From options to what commands work with: the catalogue, the configuration, the engine.

Knows nothing of commands. Invariant: what a user gave wrongly is said before the model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Any, TypeVar

from rcllm.cli.options import EngineOptions, ItemOptions, RankingOptions
from rcllm.cli.screen import busy, say
from rcllm.config import Config, check_options, context_samples
from rcllm.core.ranking import RankRequest
from rcllm.data import Catalogue, Dataset, ReadReport, build_requests, load_dataset
from rcllm.data.popularity import with_popularity
from rcllm.engine.engine import Engine
from rcllm.errors import ConfigError, DataError
from rcllm.prompt.template import Template
from rcllm.schedule.admission import AdmissionFactory, Open
from rcllm.wire.lines import Failure, read_lines

_Section = TypeVar("_Section")


@dataclass(frozen=True, slots=True)
class Inputs:
    catalogue: Catalogue
    dataset: Dataset | None = None  # None: there is a catalogue alone


def load_inputs(options: ItemOptions) -> Inputs:
    """Reads the catalogue and, where there is one, the data set; tells of rows that could not be used."""
    if options.items is None and options.dataset is None:
        raise ConfigError("there are no items: give --items FILE (a catalogue) or --dataset FOLDER")
    dataset = None
    with busy("reading items"):
        if options.dataset is not None:
            dataset = with_popularity(load_dataset(options.format, options.dataset))
            _tell(dataset.reports)
        if options.items is not None:
            catalogue, report = Catalogue.read(options.items, options.id_field, options.volatile or ())
            _tell([report])
        else:
            assert dataset is not None
            catalogue = dataset.catalogue
    return Inputs(catalogue, dataset)


def load_requests(
    path: str | None, inputs: Inputs, count: int, num_candidates: int, num_history: int, seed: int
) -> list[RankRequest]:
    """The first `count` requests of a file, or as many made from the data set. Raises DataError, ConfigError."""
    if path is not None:
        lines = read_lines(path)[:count]
        if bad := [line for line in lines if isinstance(line, Failure)]:
            raise DataError(f"{path}, line {bad[0].number}: {bad[0].error}")
        return [line.request for line in lines if not isinstance(line, Failure)]
    if inputs.dataset is None:
        raise ConfigError("there are no requests: give --in FILE, or --dataset FOLDER to make some from")
    return build_requests(inputs.dataset, count, num_candidates, num_history, seed=seed)


def make_config(engine: EngineOptions, ranking: RankingOptions | None = None) -> Config:
    """The configuration file, if any, the environment over it, and the options over both. Raises ConfigError."""
    config = Config.load(engine.config, os.environ)
    config = replace(
        config,
        model=_over(config.model, path=engine.model, adapter=engine.adapter, threads=engine.threads),
        prompt=_over(config.prompt, template=engine.template, context=engine.context),
        cache=_over(config.cache, memory_mb=engine.memory_mb, kv_dtype=engine.kv_dtype),
    )
    if ranking is not None:
        given = {"level": ranking.level, "readout": ranking.readout, "layout": ranking.layout}
        config = replace(config, rank=_over(config.rank, **given, label_place=ranking.label_place))
        if ranking.semantic_pool is not None:
            cache = replace(config.cache, semantic_pool=ranking.semantic_pool)
            config = replace(config, cache=cache, rank=replace(config.rank, history="semantic"))
    check_options(config.rank)
    Template.load(config.prompt.template)
    return config


def make_engine(
    config: Config, inputs: Inputs, like: Sequence[RankRequest] = (), admission: AdmissionFactory = Open.of
) -> Engine:
    """Loads the model. `like`: requests whose shape the sampled canonical contexts take."""
    samples = context_requests(config.prompt.context, inputs, like)
    with busy(f"loading {config.model.path}"):
        return Engine.build(inputs.catalogue, config, samples, admission)


def context_requests(context: str, inputs: Inputs, like: Sequence[RankRequest]) -> Sequence[RankRequest]:
    """Requests of training users, for the canonical contexts that are made from real prompts. Raises ConfigError."""
    if not (count := context_samples(context)):
        return ()
    if inputs.dataset is None:
        raise ConfigError(
            f"context {context!r} is made from requests of real users: give --dataset FOLDER, or use --context "
            "instruction"
        )
    num_candidates = median_low(len(request.candidates) for request in like) if like else 20
    num_history = median_low(len(request.history) for request in like) if like else 10
    return build_requests(
        inputs.dataset, count, num_candidates, max(1, num_history), split="train", min_history=max(1, num_history // 2)
    )


def _over(section: _Section, **options: object) -> _Section:
    """`section` with the options that were given, which were checked when the command line was read."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return replace(section, **given)  # type: ignore[type-var]


def _tell(reports: Sequence[ReadReport]) -> None:
    for report in reports:
        if report.rows_skipped:
            say(f"warning: {report}")
