"""Makes the parts of an engine from a configuration: decoder, prompter, pool.

Knows nothing of requests. Invariant: the pool's budget is what the configured memory leaves once the model is loaded
and the tiers in memory are full, so that the process as a whole stays within it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch

from rcllm.cache.pool import Pool
from rcllm.cache.room import PAGE_BYTES
from rcllm.config import MIB, CacheConfig, Config, Hardware, PromptConfig, products_of
from rcllm.core.ranking import RankRequest
from rcllm.data.live import LiveCatalogue
from rcllm.engine.fit import Fitted
from rcllm.engine.space import chosen_chat, namespace_of
from rcllm.engine.tiers import unfilled_bytes
from rcllm.errors import ConfigError, ModelError, ModelWarning
from rcllm.model.adapter import load_adapter, merge_layer
from rcllm.model.adapter_config import base_difference, load_config
from rcllm.model.attend.native import INSTRUCTIONS
from rcllm.model.attend.on_triton import LAID_BYTES
from rcllm.model.ceilings import measure_narrow, usable_memory_bytes
from rcllm.model.decoder import Decoder
from rcllm.model.spec import ModelSpec
from rcllm.model.static_passes import STATIC_ROWS
from rcllm.model.weights import load_spec, streamed_model
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.template import chat_format
from rcllm.prompt.tokenizer import Tokenizer, end_token
from rcllm.prototypes.pool import PrototypePool
from rcllm.schedule.admission import Identity
from rcllm.store.codec import DTYPES
from rcllm.store.contract import Store

_SMALLEST_POOL_TOKENS = 256
_PROBE_ROWS = 64


def this_machine() -> Hardware:
    """What `resolve` needs to know."""
    return Hardware(torch.cuda.is_available(), usable_memory_bytes())


def load_decoder(config: Config, folder: Path) -> Decoder:
    """Layer by layer, so that no matrix as loaded is held beside those that the decoder packs.

    Warns where the adapter names another base model, and where products are only imitated. Raises ModelError.
    """
    if different := _other_base(config, folder):
        warnings.warn(different, ModelWarning, stacklevel=3)  # at the line that calls Engine.build
    products = products_of(config.model)
    rows = DTYPES[config.model.dtype] if products == "fp32" else torch.float32
    loaded, change = rows if config.model.weights == "full" else None, None  # levels are made of what the files hold
    if config.model.adapter:
        change = partial(merge_layer, load_adapter(Path(config.model.adapter), load_spec(folder)))
        loaded = loaded or torch.float32  # adapters are merged before anything is rounded
    with streamed_model(folder, loaded, config.model.device, change) as (spec, weights):
        end = end_token(folder)
        if end is not None and end < spec.vocab_size:  # fine-tunes may name theirs there alone
            spec = replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, end))))
        options = (config.model.attention, config.model.max_positions, products, config.model.weights, rows)
        decoder = Decoder(spec, weights, *options)
    if decoder.emulates:
        warnings.warn(_emulated(decoder), ModelWarning, stacklevel=3)
    return decoder


def _emulated(decoder: Decoder) -> str:
    """What products cost where they are imitated, measured now."""
    quick = measure_narrow(decoder.products, decoder.spec, _PROBE_ROWS, decoder.kernels)
    missing = f"this processor has no {INSTRUCTIONS[decoder.products]}"
    why = missing if decoder.kernels else "torch alone computes this model, which is in fp32"
    return (
        f"model.dtype is {decoder.products}, but {why}: products are imitated, with the same scores, at {quick:.2f} "
        f"times the speed of fp32 (measured here, {_PROBE_ROWS} rows). Use model.dtype = 'fp32', unless memory is short"
    )


def _other_base(config: Config, folder: Path) -> str:
    """What to say where the adapter names another base model than this one; empty where it does not."""
    if not config.model.adapter:
        return ""
    return base_difference(load_config(Path(config.model.adapter)), config.model.path, folder)


def load_tokenizer(prompt: PromptConfig, folder: Path, spec: ModelSpec) -> Tokenizer:
    """The tokenizer in `folder`, held against the model. Raises ModelError."""
    tokenizer = Tokenizer.load(folder, prompt.item_tokens)
    if tokenizer.vocab_size > spec.vocab_size:
        raise ModelError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} tokens, the model {spec.vocab_size:,}; they do not "
            "belong together"
        )
    return tokenizer


def make_prompter(
    config: Config,
    folder: Path,
    model: bytes,
    decoder: Decoder,
    fitted: Fitted,
    samples: Sequence[RankRequest],
) -> Prompter:
    """`model`: the model's fingerprint, part of every content key. Raises ConfigError, ModelError."""
    tokenizer = load_tokenizer(config.prompt, folder, decoder.spec)
    template = fitted.template
    chat = chosen_chat(config.prompt, folder, tokenizer)
    notes = [*fitted.notes, *filter(None, [_other_base(config, folder)])]
    namespace = namespace_of(config, model, tokenizer, template, chat)
    return Prompter(
        template,
        chat_format(chat),
        tokenizer,
        LiveCatalogue(fitted.catalogue),
        namespace,
        decoder.max_positions,
        config.prompt.max_candidates,
        config.prompt.context,
        samples,
        fitted.learnt,
        tuple(notes),
        fitted.scores.fill if fitted.scores else None,
    )


def identity(config: Config, prompter: Prompter, model_id: str, semantic_pool: PrototypePool | None) -> Identity:
    """What a calibration of the engine made of these holds for. `config`: resolved."""
    tokenizer, template = prompter.tokenizer.fingerprint, prompter.text_fingerprint
    assert config.model.mask != "auto", "mask is resolved by declared_mask"
    return Identity(
        model_id,
        tokenizer.hex()[:12],
        template.hex()[:12],
        prompter.chat.fingerprint,
        config.model.dtype,
        config.cache.kv_dtype,
        config.model.mask,
        config.model.weights,
        semantic_pool.identity if semantic_pool else "",
    )


def open_prototypes(config: Config, decoder: Decoder, prompter: Prompter) -> PrototypePool | None:
    """The pool that the configuration names, if any. Raises ConfigError, ModelError."""
    if not config.cache.semantic_pool:
        return None
    return PrototypePool.open(Path(config.cache.semantic_pool), decoder, prompter.namespace)


def make_pool(
    config: Config,
    decoder: Decoder,
    store: Store | None = None,
    space: str = "",
    *,
    share: float = 1.0,
    beside: Pool | None = None,
) -> Pool:
    """The pool that process, model, workspace and tiers leave of the configured memory. Raises ConfigError.

    `store`: below it. `share`: of what they leave, where an engine that is loaded later is to have the rest. `beside`:
    the pool of one that was loaded before, which may yet fill its budget.
    """
    spec, cache = decoder.spec, config.cache
    activations = (6 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + 3 * spec.ffn_size) * 4
    workspace = decoder.max_positions * activations + 2 * cache.pass_tokens * spec.kv_bytes_per_token(4) + 64 * MIB
    workspace += decoder.lm_head.nbytes if decoder.kernels else 0  # its packed copy, once something is generated
    resident = psutil.Process().memory_info().rss + unfilled_bytes(store)
    if beside is not None:
        resident += unfilled_bytes(beside.store)
        resident += beside.free_bytes if beside.device.type == "cpu" else 0  # on a GPU its pages are taken already
    least = spec.kv_bytes_per_token(4) * _SMALLEST_POOL_TOKENS
    if decoder.device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took for a while
        workspace += LAID_BYTES + STATIC_ROWS * (activations + spec.kv_bytes_per_token(decoder.dtype.itemsize))
        free = torch.cuda.mem_get_info(decoder.device)[0] - workspace
    else:
        free = cache.memory_mb * MIB - resident - workspace
    budget = cache.pool_mb * MIB or int(free * share)
    if budget < least:
        wanted = least if cache.pool_mb else int(least / share)
        wanted += int(least - free) // 8 if beside is not None else 0  # whose pool grows with the memory, if by less
        raise ConfigError(_too_little(cache, resident, workspace, wanted, decoder.device.type))
    page_bytes = PAGE_BYTES if decoder.device.type == "cuda" else 0
    return Pool(budget, DTYPES[cache.kv_dtype], decoder.device, store, space=space, page_bytes=page_bytes)


def _too_little(cache: CacheConfig, resident: int, workspace: int, least: int, device: str) -> str:
    """Why there is no room for KV, and how much would be enough; all in bytes."""
    if cache.pool_mb:
        return f"cache.pool_mb = {cache.pool_mb} is too small: give at least {math.ceil(least / MIB)}"
    needed = f"passes need {workspace / MIB:,.0f} MB and cached KV at least {math.ceil(least / MIB)} MB"
    smaller = "lower cache.pass_tokens or model.max_positions"
    if device == "cuda":
        return f"the GPU has too little free memory: beside the model, {needed}. Free some, or {smaller}"
    enough = math.ceil((resident + workspace + least) / MIB)
    return (
        f"cache.memory_mb = {cache.memory_mb:,} is too small: the process with its model and tiers takes "
        f"{resident / MIB:,.0f} MB, {needed}. Raise cache.memory_mb (--memory-mb) to at least {enough}, or {smaller}"
    )
