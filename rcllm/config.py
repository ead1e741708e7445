"""The configuration tree: frozen, unknown keys refused with the nearest name, resolved against the hardware once.

Never imports torch. Invariant: after `resolve` nothing that the hardware decides is "auto", and a component receives
its section or plain values, never the tree.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from rcllm.core.ranking import Level, RankOptions, Selection
from rcllm.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
MIB = 1 << 20
CONTEXTS = ("none", "bos", "instruction", "typical", "mean(n)")
_WORDS = {
    cls: {name: get_args(kind) for name, kind in get_type_hints(cls).items() if get_origin(kind) is Literal}
    for cls in (RankOptions, Selection)
}  # the options that are one of a few words


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, and how it computes."""

    path: str = "smollm2-135m-instruct"  # a name `rcllm pull` knows, a folder, a .gguf file, or a hub id
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # fp32 on CPU, bf16 on CUDA
    attention: Literal["auto", "segmented", "gather"] = "auto"
    adapter: str = ""  # folder of a LoRA adapter that is merged into the model
    mask: Literal["auto", "causal", "blocks"] = "auto"  # tuned under; auto: as the adapter says, or causal
    max_positions: int = 8192  # longer prompts are refused; the model's own limit if that is lower
    threads: int = 0  # 0: torch's default


@dataclass(frozen=True, slots=True)
class PromptConfig:
    template: str = "shopping"  # a bundled name or a .toml file
    chat: Literal["auto", "plain", "chatml", "llama3", "mistral", "llama2", "zephyr"] = (
        "auto"  # auto: as the model says
    )
    context: str = "instruction"  # canonical context of items and shared events; one of CONTEXTS
    max_candidates: int = 500
    max_item_tokens: int = 0  # longer texts are cut, and noted; 0: as the template says, as for the next two
    max_event_tokens: int = 0
    max_volatile_tokens: int = 0
    # regular expression of tokens that items may be written with though the tokenizer counts them as control tokens,
    # such as semantic IDs: "<[a-f]_\\d+>"
    item_tokens: str = ""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """`memory_mb` bounds the whole process on the CPU; the KV pool gets what weights and workspace leave of it."""

    memory_mb: int = 0  # 0: 60 % of the machine's memory
    pool_mb: int = 0  # 0: what memory_mb leaves
    host_mb: int = 0  # second tier in host memory, for pools on a GPU
    kv_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # fp16 beside fp32 compute, else the compute dtype
    semantic_pool: str = ""  # file of `rcllm pool build`, for history "semantic"
    pass_tokens: int = 2048  # most fresh tokens in one forward pass that computes missing blocks


@dataclass(frozen=True, slots=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    rank: RankOptions = field(default_factory=RankOptions)

    @classmethod
    def load(cls, path: Path) -> Config:
        """Reads a TOML file with the sections [model], [prompt], [cache], [rank]. Raises ConfigError."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return from_mapping(cls, values, str(path))


@dataclass(frozen=True, slots=True)
class Hardware:
    """What `resolve` needs to know of the machine."""

    has_cuda: bool
    memory_bytes: int


def resolve(config: Config, hardware: Hardware) -> Config:
    """Replaces every "auto" and 0 by the value for this machine. Raises ConfigError for what cannot work here."""
    model, cache = config.model, config.cache
    device = ("cuda" if hardware.has_cuda else "cpu") if model.device == "auto" else model.device
    if device == "cuda" and not hardware.has_cuda:
        raise ConfigError("model.device is cuda, but torch sees no GPU; use device = 'auto' or 'cpu'")
    dtype = ("bf16" if device == "cuda" else "fp32") if model.dtype == "auto" else model.dtype
    kv_dtype = ("fp16" if dtype == "fp32" else dtype) if cache.kv_dtype == "auto" else cache.kv_dtype
    memory_mb = cache.memory_mb or int(hardware.memory_bytes * 0.6) // MIB
    _check(config)
    return replace(
        config,
        model=replace(model, device=device, dtype=dtype),
        cache=replace(cache, kv_dtype=kv_dtype, memory_mb=memory_mb),
    )


def _check(config: Config) -> None:
    positive = {"prompt.max_candidates": config.prompt.max_candidates, "cache.pass_tokens": config.cache.pass_tokens}
    positive["model.max_positions"] = config.model.max_positions
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    context_samples(config.prompt.context)
    check_options(config.rank)
    try:
        re.compile(config.prompt.item_tokens)
    except re.error as error:
        raise ConfigError(f"prompt.item_tokens is no regular expression: {error}") from error


def check_options(options: RankOptions) -> None:
    """Raises ConfigError for values that are not there and combinations that mean nothing."""
    if not isinstance(options.level, Level):
        raise ConfigError(f"level must be a Level, got {options.level!r}; read one with Level.parse")
    _check_words(options)
    if options.level.name == "corrected":
        _check_selection(options.level, options.selection)
    if options.history == "semantic" and options.level.name == "corrected" and options.selection.policy == "static":
        raise ConfigError("policy static ranks the tokens of blocks that are cached; history 'semantic' has none")
    if options.layout == "items_first" and options.readout != "label":
        raise ConfigError(
            f"read-out {options.readout!r} needs layout history_first: its candidates are branches after the history"
        )
    if options.bias != "none" and options.readout != "label":
        raise ConfigError(f"bias {options.bias!r} corrects label letters; read-out {options.readout!r} has none")


def _check_words(options: RankOptions | Selection) -> None:
    for name, known in _WORDS[type(options)].items():
        if (value := getattr(options, name)) not in known:
            raise ConfigError(f"unknown {name} {value!r}; {nearest(str(value), known)}")


def _check_selection(level: Level, selection: Selection) -> None:
    _check_words(selection)
    shares = {"r_item": level.budget, "r_history": level.history_budget, "selection.divergence": selection.divergence}
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"{name} must be from 0 to 1, got {share}")
    for name, count in {"window": selection.window, "check_layer": selection.check_layer}.items():
        if count < 0:
            raise ConfigError(f"selection.{name} must be 0 or more, got {count}")
    if selection.policy == "k_difference" and selection.check_layer == 0:
        raise ConfigError(
            "policy k_difference needs selection.check_layer of 1 or more: "
            "in layer 0 a key depends on its token alone, and so none differs there"
        )


def context_samples(name: str) -> int:
    """How many sampled prompts a canonical context needs: 0 for none, bos and instruction. Raises ConfigError."""
    if name in ("none", "bos", "instruction"):
        return 0
    if name == "typical":
        return 1
    if name.startswith("mean(") and name.endswith(")") and name[5:-1].isdecimal() and int(name[5:-1]) > 0:
        return int(name[5:-1])
    raise ConfigError(f"unknown canonical context {name!r}: expected one of {', '.join(CONTEXTS)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """«did you mean X» where something is close, else the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from a mapping, recursively. Refuses unknown keys and wrong values by name."""
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
        built[key] = _value(hints[key], value, f"{where}: {key}")
    return cls(**built)


def as_json(value: DataclassInstance) -> dict[str, Any]:
    """A dataclass as JSON would give it back; NaN and infinity, for which JSON has no word, become None."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(value)), parse_constant=lambda name: None)
    return plain


def _value(kind: Any, value: Any, where: str) -> Any:
    if kind is Level:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be a text such as 'blocks' or 'linked(16)', got {value!r}")
        return Level.parse(value)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section, got {value!r}")
        return from_mapping(kind, value, where)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{where} must be one of {', '.join(get_args(kind))}, got {value!r}")
        return value
    if type(value) is not kind:
        raise ConfigError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
