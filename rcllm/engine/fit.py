"""Holds a catalogue and a configuration against the template, and against what a ranker was tuned on.

One routine for Python, the command line and benchmarks, before the model is loaded. Invariant: a ranker that is asked
with other text than it learnt from is told of: to whoever builds the engine, and in every receipt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcllm.config import Config
from rcllm.core.ranking import Item, ItemId, RankOptions
from rcllm.data.catalogue import Catalogue, field_shares
from rcllm.data.popularity import FIELD, with_made_fields
from rcllm.data.requests import told_unknown
from rcllm.data.scores import ScoreField, made_scores
from rcllm.errors import DataError, TextWarning
from rcllm.model.adapter import adapter_record
from rcllm.prompt.draft import listed
from rcllm.prompt.learnt import Learnt
from rcllm.prompt.template import Template, chat_format

_NAMED = 8  # fields that a message lists


@dataclass(frozen=True, slots=True)
class Fitted:
    """What an engine is built of, and what is to be said of it."""

    catalogue: Mapping[ItemId, Item]  # with the fields that could be made
    template: Template
    learnt: Learnt  # what the adapter was asked in training; empty without an adapter or a record
    notes: tuple[str, ...]  # for every receipt
    scores: ScoreField | None = None  # what the template shows of item-kNN, where it can be made
    asides: tuple[str, ...] = ()  # for whoever builds the engine, and for no receipt

    def remarks(self, asked: Sequence[RankOptions] = ()) -> tuple[str, ...]:
        """What a person is told before the model is loaded; `asked`: what requests will ask for."""
        of_options = (note for options in asked for note in self.learnt.option_differences(options))
        return tuple(dict.fromkeys([*self.notes, *self.asides, *of_options]))

    def warn(self) -> None:
        """Says the same to those who build an engine in Python, with the line that calls Engine.build."""
        for note in (*self.notes, *self.asides):
            warnings.warn(note, TextWarning, stacklevel=3)


def fit(catalogue: Mapping[ItemId, Item], config: Config) -> Fitted:
    """Raises DataError where no item shows any text, ConfigError and ModelError for files that cannot be used."""
    template, learnt = Template.of(config.prompt), _learnt(config.model.adapter)
    chat = None if config.prompt.chat == "auto" else chat_format(config.prompt.chat)
    notes = [*learnt.text_differences(template, chat, config.prompt.context, config.model.mask)]
    scores, asides = made_scores(catalogue, template.shown_fresh), list[str]()
    if catalogue:  # an empty one may be filled later
        given, catalogue = catalogue, with_made_fields(catalogue, template.shown)
        asides += _unknown(given) if scores or catalogue is not given else []
        shares = field_shares(catalogue, template.shown)
        notes += _textless(catalogue, template, shares) + _unlike(learnt, shares)
    return Fitted(catalogue, template, learnt, tuple(notes), scores, tuple(asides))


def _learnt(adapter: str) -> Learnt:
    record = adapter_record(Path(adapter)) if adapter else {}
    return Learnt.of(record, adapter)


def _textless(catalogue: Mapping[ItemId, Item], template: Template, shares: Mapping[str, float]) -> list[str]:
    """Raises DataError where no candidate would have a text; in open prompts, events may be in users' own words."""
    if any(shares.values()) or not shares:
        return []
    there = list(dict.fromkeys(name for item in catalogue.values() for name in item.fields))
    way_out = f"name the column that holds one with --field {template.shown[0]}={_likely(there)}, or " if there else ""
    said = (
        f"no item has any of {', '.join(template.shown)}, which template {template.name} shows; the items have "
        f"{listed(there, _NAMED) or 'no text at all'}: {way_out}give a --template that shows what there is"
    )
    if not template.open:
        raise DataError(said)
    return [said]


def _unknown(catalogue: Mapping[ItemId, Item]) -> list[str]:
    """Of a catalogue of whose interactions something is made: that some are with items which it lacks."""
    told = told_unknown(catalogue.interactions, catalogue) if isinstance(catalogue, Catalogue) else ""
    return [told] if told else []


def _likely(columns: Sequence[str]) -> str:
    """The column that looks most like a title."""
    return next((name for word in ("title", "name") for name in columns if word in name.lower()), columns[0])


def _unlike(learnt: Learnt, shares: Mapping[str, float]) -> list[str]:
    """How the items' fields differ from those of the training, with a way to the one that can be made."""
    way_out = (
        f"{FIELD!r} is made of interactions: give --dataset FOLDER; in Python, the catalogue of `load_dataset`, or "
        "`catalogue.knowing(interactions)`"
    )
    return [*learnt.field_differences(shares), *([way_out] if FIELD in learnt.missing(shares) else [])]
