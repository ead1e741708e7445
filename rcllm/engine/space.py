"""By what blocks are made: the namespace of their keys, and the name of the space that they lie in.

Knows nothing of blocks. Invariant: whatever changes the KV of every block, such as model, adapter, tokenizer, template,
chat format or dtype, changes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

from blake3 import blake3

from rcllm.config import Config, Hardware, PromptConfig, resolve
from rcllm.errors import ConfigError
from rcllm.model.adapter import adapter_fingerprint, adapter_mask
from rcllm.model.pull import pull
from rcllm.model.weights import fingerprint
from rcllm.prompt.template import Template
from rcllm.prompt.tokenizer import Tokenizer


def declared_mask(config: Config) -> Config:
    """Replaces mask `auto` by what the adapter was tuned under, `causal` where there is none. Raises ModelError."""
    if config.model.mask != "auto":
        return config
    mask = adapter_mask(Path(config.model.adapter)) if config.model.adapter else "causal"
    return replace(config, model=replace(config.model, mask=mask))


def model_fingerprint(config: Config, folder: Path) -> bytes:
    """32 bytes that change with any weight of the model or of its adapter. Raises ModelError."""
    model = fingerprint(folder)
    return blake3(model + adapter_fingerprint(Path(config.model.adapter))).digest() if config.model.adapter else model


def chosen_chat(prompt: PromptConfig, folder: Path, tokenizer: Tokenizer) -> str:
    """The name of the chat format: as configured, else as the model says. Raises ConfigError."""
    if prompt.chat != "auto":
        return prompt.chat
    if tokenizer.chat_format is None:
        known = [name for name in get_args(get_type_hints(PromptConfig)["chat"]) if name != "auto"]
        raise ConfigError(
            f"the chat template of {folder} (chat_template.jinja or tokenizer_config.json) is none that rcllm writes: "
            f"set prompt.chat to the nearest of {', '.join(known)} (plain: no marks around turns)"
        )
    return tokenizer.chat_format


def namespace_of(config: Config, model: bytes, tokenizer: Tokenizer, template: Template, chat: str) -> bytes:
    """What the keys of all blocks begin with. `config`: resolved; `model`: its fingerprint."""
    dtypes = f"{config.model.dtype} {config.cache.kv_dtype}"
    if config.model.weights != "full":
        dtypes += f" {config.model.weights}"
    return b"".join((model, tokenizer.fingerprint, template.fingerprint, chat.encode(), dtypes.encode()))


def space_of(namespace: bytes) -> str:
    """Names what blocks are made by."""
    return blake3(namespace).hexdigest(8)


def current_space(config: Config, hardware: Hardware) -> str:
    """The space of a configuration, whose model is not loaded. Raises what loading it would raise of its files."""
    config = resolve(config, hardware)
    folder = pull(config.model.path)
    tokenizer = Tokenizer.load(folder, config.prompt.item_tokens)
    template, chat = Template.of(config.prompt), chosen_chat(config.prompt, folder, tokenizer)
    return space_of(namespace_of(config, model_fingerprint(config, folder), tokenizer, template, chat))


def about(config: Config, model_id: str) -> Mapping[str, str]:
    """What a person is told of a space."""
    return {
        "model": config.model.path,
        "model_id": model_id,
        "adapter": config.model.adapter,
        "template": config.prompt.template,
        "context": config.prompt.context,
        "dtype": config.model.dtype,
        "weights": config.model.weights,
        "kv_dtype": config.cache.kv_dtype,
    }
