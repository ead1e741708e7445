"""The configuration tree: frozen, unknown keys refused with the nearest name, resolved against the hardware once.

Never imports torch. Invariant: after `resolve` nothing that the hardware decides is "auto", and a component receives
its section or plain values, never the tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

from rcllm.annotated import Ge, Gt, Interval, MinLen, Opt, Rule, bare, check_regex, hints_of
from rcllm.core.requests import Level, RankOptions, Selection
from rcllm.errors import ConfigError
from rcllm.fields import check, parse
from rcllm.late import Late
from rcllm.words import nearest as nearest

if TYPE_CHECKING:
    import tomllib
else:
    tomllib = Late("tomllib")

MIB = 1 << 20
_MOST_QUEUED_MB = 256
_KV_BESIDE: Mapping[str, Literal["fp16", "bf16"]] = {"fp32": "fp16", "bf16": "bf16", "fp16": "fp16", "int8": "bf16"}
CONTEXTS = ("none", "bos", "instruction", "typical", "mean(n)")
_PREFIX = "RCLLM_"
_NOT_CONFIG = ("RCLLM_HOME", "RCLLM_NATIVE")  # variables that other rooms read
_PANEL = "Model and cache"
_STORE = "What is kept on disk"
_SERVER = "Server"


def context_samples(name: str) -> int:
    """How many sampled prompts a canonical context needs: 0 for none, bos and instruction. Raises ConfigError."""
    if name in ("none", "bos", "instruction"):
        return 0
    if name == "typical":
        return 1
    if name.startswith("mean(") and name.endswith(")") and name[5:-1].isdecimal() and int(name[5:-1]) > 0:
        return int(name[5:-1])
    raise ConfigError(f"unknown canonical context {name!r}: expected one of {', '.join(CONTEXTS)}")


def num_usable_cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_threads(threads: int) -> None:
    if threads > (cores := num_usable_cores()):
        raise ConfigError(f"expected at most {cores}, the cores that this process may use, got {threads}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, and how it computes."""

    path: Annotated[
        str,
        Opt(
            "What `rcllm pull` knows, a model folder, a .gguf file or a hub id.",
            metavar="NAME|FOLDER",
            name="--model",
            panel=_PANEL,
        ),
    ] = "smollm2-135m-instruct"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        Opt(
            "What products are computed in; on a CPU, bf16 rounds their operands and sums in fp32. int8: on a CPU with "
            "--weights int8, what matrices multiply is rounded to 8 bits, all else as in bf16. Calibrate them first.",
            metavar="fp32|bf16|fp16|int8",
            panel=_PANEL,
        ),
    ] = "auto"  # fp32 on CPU, bf16 on CUDA
    weights: Annotated[
        Literal["full", "int8"],
        Opt(
            "full: in 32 or 16 bits, as they are multiplied. int8: in at most 8, for less memory, quicker texts and "
            "searches; what a GGUF file holds in Q8_0, Q4_0 or Q4_1 keeps its every value.",
            metavar="full|int8",
            panel=_PANEL,
        ),
    ] = "full"
    attention: Literal["auto", "segmented", "gather", "triton"] = "auto"  # triton: on a GPU, where auto takes it
    adapter: Annotated[
        str,
        Opt(
            "LoRA adapter (of `rcllm tune`, or as peft saves it), merged into the model.",
            metavar="FOLDER",
            panel=_PANEL,
        ),
    ] = ""
    mask: Literal["auto", "causal", "blocks"] = "auto"  # tuned under; auto: as the adapter says, or causal
    max_positions: Annotated[int, Ge(1)] = 8192  # longer prompts are refused; the model's own limit if that is lower
    threads: Annotated[int, Ge(0), Rule(_check_threads), Opt("Cores to use; default all.", panel=_PANEL)] = (
        0  # torch's default
    )


def products_of(model: ModelConfig) -> str:
    """What matrices and attention multiply: on a CPU rows stay in fp32 beside bf16 and int8. `model`: resolved."""
    return model.dtype if model.device == "cpu" and model.dtype in ("bf16", "int8") else "fp32"


def rounds(model: ModelConfig) -> bool:
    """Whether scores on a CPU are those of less than fp32, by products or by weights. `model`: resolved."""
    return model.device == "cpu" and (model.dtype != "fp32" or model.weights != "full")


@dataclass(frozen=True, slots=True)
class PromptConfig:
    template: Annotated[
        str,
        Opt(
            "Prompt template: shopping, movies, titles, echo, or a .toml file.",
            metavar="NAME|FILE",
            panel=_PANEL,
        ),
    ] = "shopping"
    chat: Annotated[
        Literal["auto", "plain", "chatml", "llama3", "mistral", "llama2", "zephyr"],
        Opt("How turns are marked; default: as the model's chat template says.", panel=_PANEL),
    ] = "auto"
    context: Annotated[
        str,
        Rule(context_samples),
        Opt(
            "What stood before a block when its KV was computed. typical and mean(N) need --dataset, and cost nothing "
            "when ranking.",
            metavar="none|bos|instruction|typical|mean(N)",
            panel=_PANEL,
        ),
    ] = "instruction"  # of items and shared events
    max_candidates: Annotated[int, Ge(1)] = 500
    # longer texts are cut, and noted; 0: as the template says, as for the next two
    max_item_tokens: Annotated[
        int, Ge(0), Opt("Cut the texts of items to so many tokens; default: as the template says.", panel=_PANEL)
    ] = 0
    max_event_tokens: Annotated[int, Ge(0), Opt("The same, of events.", panel=_PANEL)] = 0
    max_volatile_tokens: Annotated[
        int, Ge(0), Opt("The same, of volatile texts, which are fresh in every request.", panel=_PANEL)
    ] = 0
    # regular expression of tokens that items may be written with though the tokenizer counts them as control tokens,
    # such as semantic IDs: "<[a-f]_\\d+>"
    item_tokens: Annotated[str, Rule(check_regex)] = ""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """`memory_mb` bounds the whole process on the CPU; the KV pool gets what weights, workspace and tiers leave of it.

    A decoder of semantic IDs that is served beside the model is loaded first; its pool is a 16th of what it leaves.
    """

    memory_mb: Annotated[int, Ge(0), Opt("Memory of the whole process; default 60 % of the machine.", panel=_PANEL)] = (
        0  # 0: the default
    )
    pool_mb: Annotated[int, Ge(0)] = 0  # 0: what memory_mb leaves
    # auto: fp16 beside fp32 compute, bf16 beside int8, else the compute dtype
    kv_dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16", "int8"],
        Opt("How cached KV is stored.", metavar="fp32|fp16|bf16|int8", panel=_PANEL),
    ] = "auto"
    semantic_pool: Annotated[
        str,
        Opt(
            "Read histories from this pool of token prototypes (`rcllm pool build`) instead of events' own KV.",
            metavar="FILE",
            panel="How to rank",
        ),
    ] = ""
    pass_tokens: Annotated[int, Ge(1)] = 2048  # most fresh tokens in one forward pass that computes missing blocks


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where KV is kept beside the pool: tiers that outlive the process, or hold more than the device does.

    Users' blocks are kept there as well, until they are erased or make way.
    """

    enabled: bool | None = None  # None: on for commands that rank, recommend, warm and serve; off in Python
    folder: Annotated[
        str,
        Opt(
            "Where it is kept; default $RCLLM_HOME/store, else ~/.cache/rcllm/store.",
            metavar="FOLDER",
            name="--store-folder",
            panel=_STORE,
        ),
    ] = ""
    disk_mb: Annotated[
        int, Ge(0), Opt("Disk that it may use; default a quarter of what is free. 0: default.", panel=_STORE)
    ] = 0
    host_mb: Annotated[int, Ge(0)] = 0  # a tier in host memory above the disk, for pools on a GPU
    shared: Annotated[
        str,
        Opt(
            "A Valkey or Redis server that several machines share: valkey://host:port/0.",
            metavar="URL",
            name="--shared-store",
            panel=_STORE,
        ),
    ] = ""
    # of blocks that wait to be written; what exceeds it is dropped, and counted; 0: a 32nd of memory_mb, at most 256
    queue_mb: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """What is taken in, by when it is answered, and who shares. 0 is no limit.

    None: no limit in Python; what `for_serving` says in a server.
    """

    max_waiting: Annotated[int | None, Ge(0)] = None  # requests that wait; one more is refused with OverloadedError
    max_wait_ms: Annotated[float, Ge(0)] = 0.0  # a request that would wait longer, by estimate, is refused as well
    deadline_ms: Annotated[float, Ge(0)] = 0.0  # of requests that bring none
    min_candidates: Annotated[int, Ge(1)] = 10  # fewer are never ranked to keep a deadline
    # users whose last scores are kept, for when nothing else keeps a deadline
    last_scores: Annotated[int | None, Ge(0)] = None
    other_rows: Annotated[int | None, Ge(0)] = None  # of texts and searches, beside rankings and until they enter
    # of the rows of prompts, where other tenants wait as well; 1 for those that are not named
    tenant_shares: Mapping[str, Annotated[float, Gt(0)]] = field(default_factory=dict)


def for_serving(config: ScheduleConfig) -> ScheduleConfig:
    """With the limits of a server, where the configuration says nothing: its clients are many, and do not wait."""
    return replace(
        config,
        max_waiting=256 if config.max_waiting is None else config.max_waiting,
        last_scores=10_000 if config.last_scores is None else config.last_scores,
        other_rows=64 if config.other_rows is None else config.other_rows,
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Of `rcllm serve`: where it listens, who may ask, and how much one request may be."""

    host: Annotated[str, Opt("Address to listen at.", metavar="ADDRESS", panel=_SERVER)] = "127.0.0.1"
    port: Annotated[int, Interval(ge=0, le=65535), Opt("Port; 0: any that is free.", panel=_SERVER)] = 8000
    served_name: Annotated[
        str, Opt("What clients call the model; default: as --model has it.", metavar="NAME", panel=_SERVER)
    ] = ""
    insecure: Annotated[bool, Opt("Listen at an address that others reach, without keys.", panel=_SERVER)] = False
    warm: Annotated[bool, Opt("Compute the items at once; /ready says when it is done.", panel=_SERVER)] = True
    # keys are no options, since every user of a machine sees its command lines
    api_keys: tuple[Annotated[str, MinLen(8)], ...] = field(default=(), repr=False)  # who may ask; empty: everybody
    # who may ask for one tenant alone, by tenant; other keys than these and the admin's may not name it
    tenant_keys: Mapping[str, Annotated[tuple[Annotated[str, MinLen(8)], ...], MinLen(1)]] = field(
        default_factory=dict, repr=False
    )
    admin_key: str = field(default="", repr=False)  # who may change what is served
    cors_origins: tuple[str, ...] = ()  # pages of other origins that may ask from a browser
    max_body_mb: Annotated[float, Gt(0)] = 8.0
    max_items: Annotated[int, Ge(1)] = 1000  # documents, scored items, or items of one change
    max_tokens: Annotated[int, Ge(1)] = 1024  # of an answer in text
    max_request_tokens: Annotated[int, Ge(1)] = 131_072  # of all items of a score, or of all prompts of a completion
    max_history: Annotated[int, Ge(1)] = 1000  # events of one request
    timeout_s: Annotated[float, Gt(0)] = 60.0  # of one request
    drain_s: Annotated[float, Ge(0)] = 30.0  # for requests under way, once the server is told to end
    kept_answers: Annotated[int, Ge(0)] = 1000  # whose receipts can be asked for, and which can be run again
    kept_users: Annotated[int, Ge(0)] = 10_000  # whose events are kept; the ones longest not used go first
    kept_events: Annotated[int, Ge(1)] = 100  # of one user; the oldest go first
    # of rankings, that the fidelity guard computes anew in idle time where a calibration allows reuse; 0: no guard
    guard_share: Annotated[float, Interval(ge=0, le=1)] = 0.05
    guard_cpu_share: Annotated[float, Interval(gt=0, le=1)] = 0.05  # of wall time that it may compute

    @property
    def has_keys(self) -> bool:
        """Whether nobody may ask without a key. The admin's alone leaves asking open to everybody."""
        return bool(self.api_keys or self.tenant_keys)


RouteName = Literal["affinity", "ttft", "hit_only", "load_only", "round_robin", "power_of_two"]


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Of `rcllm serve --cluster`: replicas of the engine on Ray Serve, and which of them answers a request."""

    replicas: Annotated[int, Ge(1)] = 2
    max_replicas: Annotated[int, Ge(0)] = 0  # as many are begun while queues are long; 0: `replicas`, always
    target_requests: Annotated[float, Gt(0)] = 4.0  # under way at a replica, that Ray Serve scales for
    address: str = ""  # of a Ray cluster, such as "auto" or "ray://host:10001"; empty: one is begun on this machine
    cpus: Annotated[float, Gt(0)] = 1.0  # of each replica, as Ray counts them; `model.threads` follows unless it is set
    gpus: Annotated[float, Ge(0)] = 0.0
    placement: str = ""  # a file of `rcllm place build`; empty: items are dealt by the hash of their id
    route: RouteName = "ttft"
    alpha: Annotated[float, Ge(0)] = 1.0  # affinity: weight of the hits
    beta: Annotated[float, Ge(0)] = 0.5  # affinity: weight of 1 - load
    full_queue_ms: Annotated[float, Gt(0)] = 1000.0  # the queue that counts as load 1
    report_ms: Annotated[float, Ge(50)] = 500.0  # how often replicas publish what they hold and their queue
    attempts: Annotated[int, Ge(1)] = 4  # replicas that a request is sent to, one after another, as they die
    hedge_ms: Annotated[float, Ge(0)] = 0.0  # without an answer by then, a second replica is asked; 0: never
    peers: bool = True  # blocks may come from other replicas, where that is estimated to be sooner than computing
    peer_timeout_ms: Annotated[float, Gt(0)] = 2000.0  # of one question to another replica


@dataclass(frozen=True, slots=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    rank: RankOptions = field(default_factory=RankOptions)
    store: StoreConfig = field(default_factory=StoreConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @classmethod
    def load(cls, path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
        """A TOML file with the sections that the fields name ([model], [cache], …), and the variables RCLLM_… over it.

        A variable is named after its section and key, such as RCLLM_CACHE_MEMORY_MB. Raises ConfigError.
        """
        config = cls() if path is None else parse(cls, _read_toml(path), str(path))
        values = _from_environment(environ or {})
        return parse(
            cls, values, "environment", base=config, name=lambda key: _PREFIX + "_".join(map(str, key)).upper()
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The variables with our prefix, as the sections of a file would hold them."""
    known = {_PREFIX + "_".join(key).upper(): (key, kind) for key, kind in _leaves(Config)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable in _NOT_CONFIG:
            continue
        if variable not in known:
            raise ConfigError(f"environment: unknown variable {variable}; {nearest(variable, [*known, *_NOT_CONFIG])}")
        (*sections, name), kind = known[variable]
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = _from_text(text, kind)
    return values


def _leaves(kind: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The place of every value of the tree, and its type."""
    for name, hint in hints_of(kind).items():
        inner = bare(hint)
        if is_dataclass(inner) and inner is not Level:
            yield from (((name, *key), leaf) for key, leaf in _leaves(inner))
        else:
            yield (name,), inner


def _from_text(text: str, kind: Any) -> Any:
    """A text as TOML reads it, where a number or true and false is wanted; what is neither stays a text."""
    if kind is str or kind is Level or get_origin(kind) is Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


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
    if model.weights == "int8" and (device, dtype) == ("cpu", "fp16"):
        raise ConfigError("model.weights int8 on a CPU is for dtype fp32, bf16 or int8, got fp16; use weights = 'full'")
    if dtype == "int8" and device == "cuda":
        raise ConfigError("model.dtype int8 is for CPUs, got device cuda; use dtype = 'auto', 'bf16' or 'fp16' there")
    if dtype == "int8" and model.weights == "full":
        raise ConfigError(
            "model.dtype int8 multiplies weights in levels, got model.weights full; set weights = 'int8' as well "
            "(--weights int8)"
        )
    kv_dtype = _KV_BESIDE[dtype] if cache.kv_dtype == "auto" else cache.kv_dtype
    memory_mb = cache.memory_mb or int(hardware.memory_bytes * 0.6) // MIB
    queue_mb = config.store.queue_mb or min(_MOST_QUEUED_MB, max(memory_mb // 32, 1))
    check(config)
    check_options(config.rank)
    return replace(
        config,
        model=replace(model, device=device, dtype=dtype),
        cache=replace(cache, kv_dtype=kv_dtype, memory_mb=memory_mb),
        store=replace(config.store, queue_mb=queue_mb),
    )


def check_options(options: RankOptions) -> None:
    """Raises ConfigError for values that are not there and combinations that mean nothing."""
    check(options)
    if options.level.name == "corrected":
        _check_selection(options.selection)
    if options.history == "semantic" and options.level.name == "corrected" and options.selection.policy == "static":
        raise ConfigError("policy static ranks the tokens of blocks that are cached; history 'semantic' has none")
    if options.layout == "items_first" and options.readout != "label":
        raise ConfigError(
            f"read-out {options.readout!r} needs layout history_first: its candidates are branches after the history"
        )
    if options.bias != "none" and options.readout != "label":
        raise ConfigError(f"bias {options.bias!r} corrects label letters; read-out {options.readout!r} has none")


def _check_selection(selection: Selection) -> None:
    if selection.policy == "k_difference" and selection.check_layer == 0:
        raise ConfigError(
            "policy k_difference needs selection.check_layer of 1 or more: "
            "in layer 0 a key depends on its token alone, and so none differs there"
        )
