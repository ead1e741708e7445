"""From a model that generates semantic IDs to a recommender: a folder of `rcllm sid train`, or any model that has the
tokens in its vocabulary, with codes from a file.

Knows nothing of requests. Invariant: every code of the catalogue is one token of the model, the items of histories are
written with the codes by which they can be recommended, and no item is recommended that the catalogue lacks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace

from rcllm.codes.index import CodeIndex, LiveCodes
from rcllm.codes.sid_files import STYLE, check_style
from rcllm.codes.updates import Update
from rcllm.config import Config
from rcllm.core.ranking import Item, ItemId
from rcllm.engine.engine import Engine
from rcllm.engine.jobs.recommend import BEAM_ROWS, Recommender
from rcllm.errors import ConfigError, ModelWarning
from rcllm.model.pull import pull
from rcllm.prompt.template import Template
from rcllm.sid.model_folder import load_codes, load_knn, load_max_items
from rcllm.sid.vocabulary import find_code_tokens, items_of_codes, with_semantic_ids

TEMPLATE = "sid"  # of the decoders that `rcllm sid train` makes


def load_recommender(
    config: Config,
    code_index: CodeIndex | None = None,
    items: Mapping[ItemId, Item] | None = None,
    *,
    style: str = STYLE,
    beam_rows: int = BEAM_ROWS,
    share: float = 1.0,
) -> Recommender:
    """Loads the model that `config` names, with an empty cache.

    A model of `rcllm sid train` carries its codes and an item-kNN, and is asked with its own template: leave
    `code_index` at None. For another model give what `read_codes` reads from its index file; `config.prompt.template`
    then says how the model is asked, and {sid} in it is an item's semantic ID. `items` is the catalogue that is served,
    with the texts that templates use; None: all items that have codes. Those that it lacks are left out, with a
    warning. `style` is how the model's vocabulary writes a code, `share` what its cache has of the memory that is left.
    Of a history, the model reads as many events as its folder says that it was trained on. Raises ConfigError,
    ModelError, FetchError.
    """
    check_style(style)
    folder, knn = pull(config.model.path), None
    if code_index is None:
        code_index, knn = load_codes(folder), load_knn(folder)
        config = replace(config, prompt=replace(config.prompt, template=TEMPLATE))
    if not Template.load(config.prompt.template).open:
        raise ConfigError(
            f"template {config.prompt.template!r} is for rankings: give one for open prompts (`open = true`) that ends "
            "where the model is to write a semantic ID, and writes items as it was trained to, with {sid}"
        )
    config = replace(config, prompt=replace(config.prompt, item_tokens=_pattern(style)))
    code_index = code_index if items is None else _served(code_index, items)
    catalogue = items_of_codes(code_index, style) if items is None else with_semantic_ids(items, code_index, style)
    engine = Engine.build(catalogue, config, share=share)
    tokens = find_code_tokens(engine.prompter.tokenizer, code_index.sizes, style)
    max_items = load_max_items(folder)
    return Recommender(engine, LiveCodes(code_index), tokens, knn=knn, max_items=max_items, beam_rows=beam_rows)


def _served(code_index: CodeIndex, items: Mapping[ItemId, Item]) -> CodeIndex:
    """The codes of those items that the catalogue has; warns where that leaves some out."""
    lacking = [item_id for item_id in code_index.item_ids if item_id not in items]
    if not lacking:
        return code_index
    warnings.warn(
        f"{len(lacking):,} of {code_index.num_items:,} items with semantic IDs are not in the catalogue, such as "
        f"{lacking[0]!r}; they are not recommended",
        ModelWarning,
        stacklevel=3,  # at the line that calls load_recommender
    )
    return code_index.changed(Update(remove=frozenset(lacking)))


def _pattern(style: str) -> str:
    """A regular expression of all codes."""
    escaped = re.escape(style)
    return escaped.replace(re.escape("{level}"), "[a-z]").replace(re.escape("{code}"), r"\d+")
