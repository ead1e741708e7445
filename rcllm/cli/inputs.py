"""From options to what commands work with: the catalogue, the configuration, the engine.

Knows nothing of commands. Invariant: what a user gave wrongly is said before the model is loaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any, Protocol, TypeVar

from rcllm.cache.heap import share_arenas
from rcllm.cache.pool import Pool
from rcllm.cli.options import EngineOptions, ItemOptions, RankingOptions, StoreOptions
from rcllm.cli.screen import busy, say, warm_with_progress
from rcllm.config import Config, PromptConfig, StoreConfig, check_options, context_samples
from rcllm.core.ranking import RankOptions, RankRequest
from rcllm.data import (
    Catalogue,
    Dataset,
    InteractionColumns,
    ReadReport,
    Table,
    build_requests,
    load_dataset,
    named_items,
)
from rcllm.data.requests import told_unknown
from rcllm.engine.engine import Engine
from rcllm.engine.fit import fit
from rcllm.errors import ConfigError, DataError, TextWarning
from rcllm.prompt.template import Template
from rcllm.schedule.admission import AdmissionFactory, Open
from rcllm.wire.lines import Failure, read_lines

_OF_ITEMS = ("id_field", "field", "volatile", "delimiter", "encoding")  # options that describe the file of --items
_COUNTED = 10_000  # items whose texts are looked at before a run; tokenising them takes seconds
_Section = TypeVar("_Section")


@dataclass(frozen=True, slots=True)
class Inputs:
    catalogue: Catalogue
    dataset: Dataset | None = None  # None: there is a catalogue alone


def load_inputs(options: ItemOptions) -> Inputs:
    """Reads the catalogue and, where there is one, the data set; tells of rows that could not be used."""
    if options.items is None and options.dataset is None:
        raise ConfigError("there are no items: give --items FILE (a catalogue) or --dataset FOLDER")
    _check_used(options)
    dataset = None
    with busy("reading items"):
        if options.dataset is not None:
            dataset = load_dataset(options.format, options.dataset, columns=columns_of(options))
            tell_read(dataset.reports, dataset.notes)
        if options.items is not None:
            names, volatile = _names(options.field or ()), options.volatile or ()
            catalogue, report = Catalogue.read(
                options.items, options.id_field, volatile, names=names, table=_table(options)
            )
            tell_read([report])
            if dataset is not None:
                dataset = _over_items(dataset, catalogue, str(options.items))
                catalogue = dataset.catalogue
        else:
            assert dataset is not None
            catalogue = dataset.catalogue
    return Inputs(catalogue, dataset)


def load_inputs_given(options: ItemOptions) -> Inputs | None:
    """The same where there may be no items at all; None where none are given."""
    _check_used(options)
    return None if options.items is None and options.dataset is None else load_inputs(options)


def _over_items(dataset: Dataset, catalogue: Catalogue, named: str) -> Dataset:
    """The data set over another catalogue; tells of interactions with items that it lacks, which are left out.

    Raises DataError where that is all of them.
    """
    known = tuple(row for row in dataset.interactions if row.item_id in catalogue)
    if dataset.interactions and not known:
        raise DataError(
            f"no interaction of {dataset.name} is with an item of {named}, such as "
            f"{dataset.interactions[0].item_id!r}: give the items that the interactions name"
        )
    if told := told_unknown(dataset.interactions, catalogue):
        say(f"note: {told}")
    return replace(dataset, catalogue=catalogue.knowing(known), interactions=known)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of requests that are made from a data set: what was asked for, or else the usual of the command."""

    candidates: int | None
    history: int | None
    usual: tuple[int, int]  # candidates, events

    @property
    def num_candidates(self) -> int:
        return self.usual[0] if self.candidates is None else self.candidates

    @property
    def num_history(self) -> int:
        return self.usual[1] if self.history is None else self.history

    def check_unused(self) -> None:
        """Raises ConfigError where something was asked for beside a file, whose requests are as they are."""
        given = [name for name in ("candidates", "history") if getattr(self, name) is not None]
        if given:
            options = " and ".join(f"--{name}" for name in given)
            raise ConfigError(
                f"--in gives the requests as they are, and {options} would shape others: drop one of them"
            )


def load_requests(path: str | None, inputs: Inputs, count: int, shape: Shape, seed: int) -> list[RankRequest]:
    """The first `count` requests of a file, or as many made from the data set. Raises DataError, ConfigError."""
    if path is not None:
        shape.check_unused()
        return read_requests(path, count)
    if inputs.dataset is None:
        raise ConfigError("there are no requests: give --in FILE, or --dataset FOLDER to make some from")
    return build_requests(inputs.dataset, count, shape.num_candidates, shape.num_history, seed=seed)


def read_requests(path: str, count: int | None = None) -> list[RankRequest]:
    """The first `count` requests of a file; None: all. Raises DataError for the first that cannot be read."""
    lines = read_lines(path)[:count]
    if bad := [line for line in lines if isinstance(line, Failure)]:
        raise DataError(f"{path}, line {bad[0].number}: {bad[0].error}")
    return [line.request for line in lines if not isinstance(line, Failure)]


def make_config(
    engine: EngineOptions, ranking: RankingOptions | None = None, store: StoreOptions | None = None
) -> Config:
    """The configuration file, if any, the environment over it, and the options over both. Raises ConfigError.

    Commands that have no options of the store leave nothing behind.
    """
    config = Config.load(engine.config, os.environ)
    config = replace(
        config,
        model=_over(
            config.model,
            path=engine.model,
            adapter=engine.adapter,
            dtype=engine.dtype,
            weights=engine.weights,
            threads=engine.threads,
        ),
        prompt=_over(
            config.prompt,
            template=engine.template,
            context=engine.context,
            max_item_tokens=engine.max_item_tokens,
            max_event_tokens=engine.max_event_tokens,
            max_volatile_tokens=engine.max_volatile_tokens,
        ),
        cache=_over(config.cache, memory_mb=engine.memory_mb, kv_dtype=engine.kv_dtype),
        store=_stored(config.store, store),
    )
    if ranking is not None:
        check_ranks(config.prompt)
        given = {"level": ranking.level, "readout": ranking.readout, "layout": ranking.layout}
        config = replace(config, rank=_over(config.rank, **given, label_place=ranking.label_place))
        if ranking.semantic_pool is not None:
            cache = replace(config.cache, semantic_pool=ranking.semantic_pool)
            config = replace(config, cache=cache, rank=replace(config.rank, history="semantic"))
    check_options(config.rank)
    Template.of(config.prompt)
    return config


def _stored(config: StoreConfig, given: StoreOptions | None) -> StoreConfig:
    """On, unless the options, the file or the environment say no; where it would be is known in any case."""
    if given is None:
        return replace(config, enabled=False)
    over = _over(config, folder=given.store_folder, disk_mb=given.disk_mb, shared=given.shared_store)
    return replace(over, enabled=given.store and config.enabled is not False)


def check_ranks(prompt: PromptConfig) -> None:
    """Raises ConfigError for a template that asks for a text, before a model is loaded for it."""
    if Template.of(prompt).open:
        raise ConfigError(f"template {prompt.template!r} is for open prompts and ranks no candidates; use another")


def make_engine(
    config: Config,
    inputs: Inputs,
    like: Sequence[RankRequest] = (),
    admission: AdmissionFactory = Open.of,
    *,
    asked: Sequence[RankOptions] | None = None,
    beside: Pool | None = None,
) -> Engine:
    """Loads the model, and says what it will be asked otherwise than it should be, and which texts are cut.

    `like`: the requests to come; sampled canonical contexts take their shape. `asked`: their options, where they do not
    say so themselves. `beside`: the pool of another engine of this process.
    """
    share_arenas()
    samples = context_requests(config.prompt.context, inputs, like)
    options = [request.options or config.rank for request in like] if asked is None else asked
    fitted = fit(inputs.catalogue, config)
    for remark in fitted.remarks(options):
        say(f"warning: {remark}")
    with busy(f"loading {config.model.path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", TextWarning)  # said above
        engine = Engine.build(fitted.catalogue, config, samples, admission, beside=beside)
    if told := engine.prompter.text_counts(named_items(like)[:_COUNTED]).told(engine.prompter.template):
        say(told, "dim")
    return engine


def warm_engine(
    config: Config,
    items: ItemOptions,
    requests: str | None,
    count: int,
    shape: Shape,
    seed: int,
) -> tuple[Engine, list[RankRequest]]:
    """An engine, and the requests of `load_requests` to measure it with, whose items are warm."""
    inputs = load_inputs(items)
    asked = load_requests(requests, inputs, count, shape, seed)
    engine = make_engine(config, inputs, asked, asked=[config.rank])
    warm_with_progress(engine, named_items(asked))
    return engine, asked


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


def _names(given: Sequence[str]) -> dict[str, str]:
    """«title=Book-Title», a field and its column. Raises ConfigError."""
    pairs = [text.partition("=") for text in given]
    if bad := [text for text, (name, _, column) in zip(given, pairs, strict=True) if not name or not column]:
        raise ConfigError(f"--field {bad[0]}: expected NAME=COLUMN, such as title=Book-Title")
    return {name: column for name, _, column in pairs}


def check_of_items(options: _OfItems) -> None:
    """Options that describe --items would be ignored where there is none. Raises ConfigError."""
    given = [name for name in _OF_ITEMS if getattr(options, name, None) not in (None, ())]
    if options.items is None and given:
        told = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"how --items is laid out is said by {told}: give --items FILE, or leave them out (--item-field names the "
            "id of a data set's items)"
        )


def _check_used(options: ItemOptions) -> None:
    """Options that describe a file which is not there would be ignored. Raises ConfigError."""
    check_of_items(options)
    if options.dataset is None and columns_of(options) != InteractionColumns():
        raise ConfigError(
            "--user-field, --item-field and --time-field name columns of --dataset: give --dataset FOLDER, or leave "
            "them out (--id-field names the id of --items)"
        )


class _OfItems(Protocol):
    """Options that may describe a catalogue."""

    @property
    def items(self) -> Path | None: ...


class _Named(Protocol):
    """Options that say what the columns of interactions are called."""

    @property
    def user_field(self) -> str | None: ...
    @property
    def item_field(self) -> str | None: ...
    @property
    def time_field(self) -> str | None: ...


def columns_of(options: _Named) -> InteractionColumns:
    """What the columns are called; None where that is left to the usual names."""
    return InteractionColumns(options.user_field, options.item_field, options.time_field)


def _table(options: ItemOptions) -> Table | None:
    """The layout of --items, as far as it is said; None where nothing is. Raises ConfigError."""
    if options.delimiter is None and options.encoding is None:
        return None
    tab = options.delimiter in ("\\t", "tab")
    return Table("\t" if tab else options.delimiter, encoding=options.encoding)


def tell_read(reports: Sequence[ReadReport], notes: Sequence[str] = ()) -> None:
    """Says what was guessed of a folder, and what of its files was guessed or could not be used."""
    for note in notes:
        say(f"note: {note}", "dim")
    for report in reports:
        if report.has_news:
            say(f"{'warning' if report.rows_skipped else 'note'}: {report}")
