"""Reads `adapter_config.json` as `peft` writes it: which scale and rank each module has.

Knows nothing of tensors and never imports torch. Invariant: a list says what is understood. A setting outside of it is
refused by name unless it is switched off, so that an adapter of a new kind is never merged as if it were plain LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcllm.errors import ModelError
from rcllm.plain_json import read_json

CONFIG = "adapter_config.json"

# These say where an adapter came from or how it was trained. The merged weights do not depend on them.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",  # the file's own tensors say which modules are adapted
}
_READ = {"base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_VALUES: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # all leave the base model as it is
}
_CONVERT = (
    "its training changed the base model's own weights. Save it again with peft: "
    "model.save_pretrained(folder, path_initial_model_for_weight_conversion=folder of the adapter before training)"
)
_MERGE = "merge it into its base model with peft (merge_and_unload) and give the merged model"
_ADVICE = {
    "peft_type": f"only LoRA adapters are read; {_MERGE}",
    "init_lora_weights": _CONVERT,
    "alora_invocation_tokens": (
        "an activated LoRA acts only after its invocation tokens, so no merged model equals it; use a LoRA without them"
    ),
    "modules_to_save": f"whole modules are stored beside it; {_MERGE}",
    "trainable_token_indices": f"it changes embeddings; {_MERGE}",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Ranks and scales. A pattern is a regular expression for the end of a module's name."""

    base: str  # name or path of the model that it was trained for; "" where nobody says
    rank: int
    alpha: float
    rank_stabilised: bool = False  # divides by √rank instead of rank
    ranks: Mapping[str, int] = field(default_factory=dict)  # by pattern
    alphas: Mapping[str, float] = field(default_factory=dict)  # by pattern

    def rank_of(self, module: str) -> int:
        """The rank of `module`, such as `model.layers.0.self_attn.q_proj`."""
        return self.ranks.get(_matching(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What up · down is multiplied by."""
        rank, alpha = self.rank_of(module), self.alphas.get(_matching(self.alphas, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def load_config(folder: Path) -> LoraConfig:
    """Reads `folder/adapter_config.json`. Raises ModelError for a setting under which a plain merge would be wrong."""
    path = folder / CONFIG
    config = read_json(path, "the folder of a LoRA adapter")
    _check(path, {"peft_type": None} | config)
    try:
        return LoraConfig(
            base=str(config.get("base_model_name_or_path") or ""),
            rank=_positive(int(config["r"])),
            alpha=_finite(float(config["lora_alpha"])),
            rank_stabilised=bool(config.get("use_rslora")),
            ranks={_pattern(key): _positive(int(rank)) for key, rank in (config.get("rank_pattern") or {}).items()},
            alphas={_pattern(key): _finite(float(a)) for key, a in (config.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise ModelError(
            f"{path}: expected numbers r and lora_alpha, and patterns of them, as peft writes them ({error!r})"
        ) from error


def base_difference(config: LoraConfig, model: str, folder: Path) -> str:
    """One sentence where an adapter names another base model than `model` in `folder`; empty where it does not.

    Only names can be compared, so owners, places, quantised copies and punctuation do not count.
    """
    wanted = _plain(config.base)
    came_from = str(read_json(folder / "config.json").get("_name_or_path") or "")
    here = [plain for name in (model, str(folder.resolve()), came_from) if (plain := _plain(name))]
    if not wanted or any(name in wanted or wanted in name for name in here):
        return ""
    return (
        f"the adapter was trained for {config.base}, and is merged into {model}: their shapes fit, their names differ. "
        "If they are different models, the answers mean nothing"
    )


def _plain(name: str) -> str:
    """What distinguishes a model in its name or path: `/models/Qwen3_0.6B/` → `qwen3-0-6b`."""
    parts = [part for part in re.split(r"[/\\]", name) if part]
    snapshot = next((part for part in parts if part.startswith("models--")), None)  # the hub's cache
    return re.sub(r"[^a-z0-9]+", "-", (snapshot or (parts or [""])[-1]).lower()).strip("-")


def _check(path: Path, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _READ or key in _WITHOUT_EFFECT:
            continue
        if key in _VALUES:
            understood = any(value is known or (isinstance(known, str) and value == known) for known in _VALUES[key])
        else:
            understood = value is None or value is False or value in ("", [], {})  # switched off
        if not understood:
            advice = _ADVICE.get(key, f"a plain merge may be wrong under it; {_MERGE}")
            raise ModelError(f"{path}: {key} = {value!r} is not supported: {advice}")


def _matching(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that `module` ends in, as peft finds it; `module` itself where none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _pattern(text: str) -> str:
    re.compile(text)
    return text


def _positive(value: int) -> int:
    if value < 1:
        raise ValueError(f"{value} is not above 0")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number to scale by")
    return value
