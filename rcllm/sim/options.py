"""What a simulation or a plan is told. Each field is an option of `rcllm sim` or `rcllm plan`.

Imports nothing that computes, so that `--help` is quick. Invariant: options that were not given have the values that
stand here, whoever runs the simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rcllm.annotated import Ge, Gt, Interval, Of, Opt
from rcllm.config import RouteName
from rcllm.core.requests import Level, Mask
from rcllm.errors import ConfigError

Arrivals = Literal["poisson", "bursty"]
KvDtype = Literal["fp32", "fp16", "bf16", "int8"]
PlacedBy = Literal["topics", "hash", "metis", "halo", "learned"]

_BLOCKS = Level("blocks")
_WHAT, _WHEN, _LONG = "What is asked for", "When", "How long prompts are"
_NODES, _KV, _POLICY, _WRONG = "Nodes", "KV and where it is", "Policies", "What goes wrong"


@dataclass(frozen=True, slots=True)
class Workload:
    """What users ask for, and when."""

    items: Annotated[int, Ge(1), Opt("Items in the catalogue.", panel=_WHAT)] = 100_000
    candidates: Annotated[int, Ge(1), Opt("Candidates of a request, in the median.", panel=_WHAT)] = 20
    candidates_spread: Annotated[
        float, Ge(0), Opt("Standard deviation of the logarithm of that number.", panel=_WHAT)
    ] = 0.0
    zipf: Annotated[float, Ge(0), Opt("Exponent of popularity; 0: all items alike.", panel=_WHAT)] = 0.8
    locality: Annotated[
        float, Interval(ge=0, le=1), Opt("Share of candidates from the topic of the request.", panel=_WHAT)
    ] = 0.85
    topics: Annotated[int, Ge(1), Opt("Topics of the catalogue, in a ring; neighbours are alike.", panel=_WHAT)] = 1000
    spread: Annotated[
        float, Ge(0), Opt("How far around the ring candidates stray from their topic, in the mean.", panel=_WHAT)
    ] = 0.001
    topic_zipf: Annotated[float, Ge(0), Opt("Exponent of the popularity of topics; 0: all alike.", panel=_WHAT)] = 0.3
    users: Annotated[int, Ge(1), Opt("Users; each has a topic.", panel=_WHAT)] = 1_000_000
    session: Annotated[float, Ge(1), Opt("Requests of a user in a row, in the mean.", panel=_WHAT)] = 1.0
    qps: Annotated[float, Gt(0), Opt("Requests a second.", panel=_WHEN)] = 40.0
    arrivals: Annotated[Arrivals, Opt("bursty: 2.6 times the rate for a fifth of the time.", panel=_WHEN)] = "poisson"
    burst_s: Annotated[float, Gt(0), Opt("Mean length of a burst.", panel=_WHEN)] = 2.0
    updates: Annotated[float, Ge(0), Opt("Items a second whose text changes.", panel=_WHEN)] = 0.0
    instruction_tokens: Annotated[int, Ge(0), Opt("Of the instruction.", panel=_LONG)] = 207
    item_tokens: Annotated[float, Ge(1), Opt("Of an item, in the mean.", panel=_LONG)] = 87.0
    item_spread: Annotated[float, Ge(0), Opt("Standard deviation of its logarithm.", panel=_LONG)] = 0.5
    history_tokens: Annotated[float, Ge(0), Opt("Of a user's history, in the median.", panel=_LONG)] = 400.0
    history_spread: Annotated[float, Ge(0), Opt("Standard deviation of its logarithm.", panel=_LONG)] = 0.6
    fresh_tokens: Annotated[int, Ge(1), Opt("Of labels and question.", panel=_LONG)] = 80


@dataclass(frozen=True, slots=True)
class System:
    """The cluster that answers."""

    nodes: Annotated[int, Ge(1), Opt("Nodes.", panel=_NODES)] = 40
    model: Annotated[
        str, Opt("qwen3-8b, qwen2.5-72b, qwen3-0.6b, smollm2-135m, or a model's folder.", metavar="NAME", panel=_NODES)
    ] = "qwen3-8b"
    gpu: Annotated[str, Opt("a100, h100, h200 or l4.", metavar="NAME", panel=_NODES)] = "a100"
    gpus: Annotated[int, Ge(1), Opt("GPUs of a node, which work as one.", panel=_NODES)] = 1
    costs: Annotated[
        Path | None,
        Opt("Measured passes, by `python -m benchmarks.pass_costs`, in place of a GPU.", metavar="FILE", panel=_NODES),
    ] = None
    network_gbps: Annotated[float, Gt(0), Opt("Between nodes, in Gb/s.", panel=_NODES)] = 100.0
    pass_rows: Annotated[
        int, Ge(1), Opt("Rows of prompts that share a pass, as cache.pass_tokens; 1: one at a time.", panel=_NODES)
    ] = 2048
    level: Annotated[Level, Opt("Reuse level, as of `rcllm rank`.", metavar="LEVEL", panel=_KV)] = _BLOCKS
    mask: Annotated[Mask, Opt("That the model was trained for: decides what level auto is.", panel=_KV)] = "causal"
    semantic_history: Annotated[
        bool, Opt("Histories from token prototypes on every node; else each user's own KV.", panel=_KV)
    ] = False
    kv_dtype: Annotated[KvDtype, Opt("Of cached KV.", panel=_KV)] = "bf16"
    copies: Annotated[
        float, Gt(0), Opt("Memory of all nodes for placed items, in catalogues; 1: each item once.", panel=_KV)
    ] = 1.5
    cache_gb: Annotated[
        float, Ge(0), Opt("Memory of a node for histories and for copies that it keeps of its own accord.", panel=_KV)
    ] = 4.0
    placement: Annotated[
        PlacedBy | None,
        Opt(
            "topics and hash: found from an item's number, for any catalogue; metis, halo and learned: built from past "
            "requests, as by `rcllm place build`. Default: topics, and halo with --log.",
            metavar="NAME",
            panel=_POLICY,
        ),
    ] = None
    past: Annotated[int, Ge(1), Opt("Requests that metis, halo and learned are built from.", panel=_POLICY)] = 50_000
    hot_share: Annotated[
        float, Interval(ge=0, le=1), Opt("Share of the items that are on every node.", panel=_POLICY)
    ] = 0.001
    route: Annotated[RouteName, Opt("Routing policy.", panel=_POLICY)] = "ttft"
    alpha: Annotated[float, Ge(0), Opt("affinity: weight of the hits.", panel=_POLICY)] = 1.0
    beta: Annotated[float, Ge(0), Opt("affinity: weight of 1 − load.", panel=_POLICY)] = 0.5
    full_queue_ms: Annotated[float, Gt(0), Opt("The queue that counts as load 1.", panel=_POLICY)] = 1000.0
    view_ms: Annotated[
        float, Ge(0), Opt("The router hears of queues this often; 0: it always knows them.", panel=_POLICY)
    ] = 0.0
    fetch: Annotated[
        bool, Opt("Missing blocks may come from other nodes, where that is estimated to be sooner.", panel=_POLICY)
    ] = True
    fail: Annotated[
        tuple[str, ...],
        Opt(
            "Node 3 dies at 10 s and is back at 20 s: 3@10-20; 3@10: for good. May repeat.",
            metavar="N@S-S",
            panel=_WRONG,
        ),
    ] = ()
    slow: Annotated[
        tuple[str, ...], Opt("Node 3 takes twice as long: 3@2. May repeat.", metavar="N@X", panel=_WRONG)
    ] = ()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How much is simulated."""

    requests: Annotated[int, Ge(1), Opt("Requests to simulate.")] = 20_000
    warm_up: Annotated[
        float, Interval(ge=0, lt=1), Opt("Share of the requests, the first, that the figures leave out.")
    ] = 0.1
    seed: Annotated[int, Ge(0), Opt("Draws requests, times and lengths.")] = 0


_WORKLOAD, _SYSTEM = Workload(), System()  # whose words and defaults a plan shares


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is to be served, on what, and how quickly."""

    items: Annotated[int, Of(Workload, "items")]
    qps: Annotated[float, Of(Workload, "qps")]
    slo_ms: Annotated[float, Gt(0), Opt("The target: so many milliseconds to the first token …", panel=_WHEN)]
    percentile: Annotated[float, Interval(gt=0, lt=100), Opt("… for so many per cent of requests.", panel=_WHEN)] = 99.0
    tokens_per_item: Annotated[float, Ge(1), Opt("In the mean.", panel=_LONG)] = 100.0
    candidates: Annotated[int, Of(Workload, "candidates")] = _WORKLOAD.candidates
    history_tokens: Annotated[float, Of(Workload, "history_tokens")] = _WORKLOAD.history_tokens
    zipf: Annotated[float, Ge(0), Opt("Exponent of popularity.", panel=_WHAT)] = 0.8
    locality: Annotated[float, Of(Workload, "locality")] = _WORKLOAD.locality
    topics: Annotated[int, Ge(1), Opt("Topics of the catalogue.", panel=_WHAT)] = 1000
    arrivals: Annotated[Arrivals, Of(Workload, "arrivals")] = _WORKLOAD.arrivals
    model: Annotated[str, Of(System, "model")] = _SYSTEM.model
    gpu: Annotated[str, Of(System, "gpu")] = _SYSTEM.gpu
    gpus: Annotated[int, Of(System, "gpus")] = _SYSTEM.gpus
    costs: Annotated[Path | None, Of(System, "costs")] = _SYSTEM.costs
    memory_gb: Annotated[float, Gt(0), Opt("Host memory of a node that KV may use.", panel=_NODES)] = 1000.0
    price_per_hour: Annotated[float | None, Ge(0), Opt("Of a node, to tell the cost.", panel=_NODES)] = None
    level: Annotated[Level, Of(System, "level")] = _SYSTEM.level
    mask: Annotated[Mask, Of(System, "mask")] = _SYSTEM.mask
    semantic_history: Annotated[bool, Of(System, "semantic_history")] = _SYSTEM.semantic_history
    prototypes: Annotated[int, Ge(0), Opt("Token prototypes, where histories are read from them.", panel=_KV)] = 100_000
    history_gb: Annotated[
        float, Ge(0), Opt("Memory of a node for histories, where users have their own.", panel=_KV)
    ] = 16.0
    kv_dtype: Annotated[KvDtype, Of(System, "kv_dtype")] = _SYSTEM.kv_dtype
    hot_share: Annotated[float, Of(System, "hot_share")] = _SYSTEM.hot_share
    max_nodes: Annotated[int, Ge(1), Opt("No plan needs more.", panel=_NODES)] = 4096
    requests: Annotated[int, Ge(100), Opt("Requests of each simulation; more tell high percentiles better.")] = 6000
    seed: Annotated[int, Of(RunOptions, "seed")] = RunOptions().seed


def check_workload(workload: Workload) -> None:
    """Raises ConfigError where options contradict each other."""
    if workload.topics > workload.items:
        raise ConfigError(
            f"--topics {workload.topics} exceeds --items {workload.items}: a topic needs at least one item"
        )
