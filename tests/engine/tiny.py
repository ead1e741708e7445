"""A tiny engine for tests: a random model, a real tokenizer, a short template, a small catalogue.

Knows nothing of what is tested. Invariant: everything is a function of its arguments, so two engines of one family give
equal scores.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from rcllm.cache.pool import Pool
from rcllm.config import CacheConfig, Config, ModelConfig, PromptConfig, ScheduleConfig
from rcllm.core.ranking import Event, Item, ItemId, Level, RankOptions, RankRequest, UserId
from rcllm.data.live import LiveCatalogue
from rcllm.engine.engine import Engine
from rcllm.store.contract import Store
from tests.tiny_models import tiny_model

NATIVE, TORCH = "qwen3", "llama"  # head_dim 32: the compiled kernels; head_dim 16: plain torch
# what engines in fewer bits are held to: every kind of level, and shapes of requests that read the cache differently
LEVELS = ("full", "exact", "corrected(0.3,0.3)", "linked(4)", "tail(0.3)", "blocks")
SHAPES: list[dict[str, Any]] = [
    {},
    {"layout": "items_first"},
    {"label_place": "after", "parallel": True},
    {"readout": "pointwise"},
    {"readout": "likelihood"},
    {"history": "chain"},
]
VOCAB = 512
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = r"""
name = "tiny"
version = 1
system = "You rank things."
instruction = "Pick one."
history_head = "\nBought:"
event = ["\n- {title}"]
event_text = "\n- {text}"
items_head = "\nOffers:"
item = ["{title}", " | {brand}", " | {categories}", " | {description}"]
volatile = [" | price: {price}", " | stock: {stock}"]
label_before = ["\n(", ") "]
label_after = [" (", ")\n"]
question = "\nWhich one?"
answer = "Answer: ("
pointwise_question = "\nWill they? Answer:"
pointwise_answers = [" yes", " no"]
likelihood_head = "\nNext:\n- "
likelihood_item = ["{title}"]
max_item_tokens = 40
max_event_tokens = 24
"""


def computing_in(dtype: str) -> dict[str, Any]:
    """Fields of ModelConfig; int8 multiplies weights in levels."""
    return {"dtype": dtype, "weights": "int8" if dtype == "int8" else "full"}


def _titles() -> list[str]:
    nouns = ("lamp", "kettle", "Stuhl", "自転車", "книга", "crème brûlée", "chair 🪑", "tea")
    return [f"{('red', 'blue', 'old', 'new')[i % 4]} {nouns[i % len(nouns)]} {i}" for i in range(60)]


def catalogue() -> dict[ItemId, Item]:
    """60 items; some lack fields, one lacks all, one is far too long, some have volatile fields."""
    items: dict[ItemId, Item] = {}
    for i, title in enumerate(_titles()):
        fields = {"title": title, "brand": f"brand {i % 7}", "categories": "home, garden" if i % 2 else ""}
        if i % 3 == 0:
            fields["description"] = f"made of {'wood' if i % 2 else 'steel'}, number {i}"
        if i == 58:
            fields = {}
        if i == 59:
            fields["description"] = "very " * 200 + "long"
        volatile = {"price": f"{i}.99"} if i % 5 == 0 else {}
        items[ItemId(f"i{i}")] = Item(ItemId(f"i{i}"), fields, volatile)
    return items


IDS = tuple(catalogue())


def request(
    candidates: int | tuple[int, ...] = 5,
    events: tuple[int | str, ...] = (30, 31, 32),
    *,
    user: str | None = "u1",
    name: str = "r1",
    **options: Any,
) -> RankRequest:
    """Candidates and events by number in the catalogue (a string: the user's own words); `options`: of RankOptions."""
    numbers = tuple(range(candidates)) if isinstance(candidates, int) else candidates
    history = tuple(Event(text=e) if isinstance(e, str) else Event(IDS[e]) for e in events)
    if isinstance(level := options.get("level", "blocks"), str):
        options["level"] = Level.parse(level)
    return RankRequest(
        name,
        tuple(IDS[i] for i in numbers),
        history,
        UserId(user) if user is not None else None,
        options=RankOptions(**options),
    )


def asking(asked: RankRequest, **options: Any) -> RankRequest:
    """The same request with other options."""
    if isinstance(level := options.get("level"), str):
        options["level"] = Level.parse(level)
    assert asked.options is not None
    return replace(asked, options=replace(asked.options, **options))


@functools.cache
def folder() -> Path:
    """A folder for the whole test run, removed at exit."""
    holder = tempfile.TemporaryDirectory(prefix="rcllm-tiny-")
    _HOLDERS.append(holder)
    return Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def template_path() -> Path:
    path = folder() / "tiny.toml"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


@functools.cache
def model_folder(family: str = NATIVE) -> Path:
    path = tiny_model(family, folder(), vocab_size=VOCAB, max_position_embeddings=8192)
    if not (shared := folder() / "tokenizer.json").exists():
        train_tokenizer().save(str(shared))
    shutil.copy(shared, path / "tokenizer.json")
    return path


def train_tokenizer() -> BackendTokenizer:
    """Byte-level BPE over the catalogue and the template; numbers of two digits are partly one token, partly two."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [text for item in catalogue().values() for text in item.fields.values()] * 2 + [
        TEMPLATE,
        " yes no",
        "(10) (27) (33)",
    ] * 6
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def config(family: str = NATIVE, **sections: Any) -> Config:
    """A configuration for `build`; `kv_dtype`, `context`, `mask`, … override fields of the sections they belong to."""
    model = {
        key: sections.pop(key) for key in ("dtype", "weights", "mask", "attention", "max_positions") if key in sections
    }
    names = ("context", "max_candidates", "max_item_tokens", "template")
    prompt = {key: sections.pop(key) for key in names if key in sections}
    cache = {"kv_dtype": "fp32", "pool_mb": 64, **sections}
    return Config(
        ModelConfig(path=str(model_folder(family)), device="cpu", **model),
        PromptConfig(**{"template": str(template_path()), **prompt}),
        CacheConfig(**cache),
    )


def build(family: str = NATIVE, samples: tuple[RankRequest, ...] = (), **sections: Any) -> Engine:
    return Engine.build(catalogue(), config(family, **sections), samples)


@functools.cache
def _prototype(family: str, dtype: str, weights: str) -> Engine:
    return build(family, dtype=dtype, weights=weights)


def fresh(
    family: str = NATIVE,
    *,
    pool_tokens: int | None = None,
    dtype: str = "fp32",
    weights: str = "full",
    kv_dtype: str = "fp32",
    store: Store | None = None,
    items: dict[ItemId, Item] | None = None,
    other_rows: int = 0,
) -> Engine:
    """An engine with an empty pool (of `pool_tokens` tokens) over a model that is loaded once.

    `other_rows`: of ScheduleConfig.
    """
    engine = _prototype(family, dtype, weights)
    prompter = copy.copy(engine.prompter)
    prompter.catalogue = LiveCatalogue(catalogue() if items is None else items)
    kept_in: torch.dtype = DTYPES[kv_dtype]
    per_token = engine.decoder.spec.kv_bytes_per_token(kept_in.itemsize)
    budget = engine.pool.budget if pool_tokens is None else pool_tokens * per_token
    made = Pool(budget, kept_in, engine.decoder.device, store)
    config = replace(engine.config, schedule=ScheduleConfig(other_rows=other_rows))
    return Engine(config, engine.decoder, prompter, made, engine.model_id)
