"""Ranks requests under many options with one engine, and keeps what measures need; resumable.

Knows nothing of targets or searches. Invariant: a record depends on its request, the engine's model, prompts and
contexts, and the options alone. It is kept under a key that names all of them and, where it holds a time, the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
from blake3 import blake3

import rcllm
from rcllm.core.ranking import Prompt, RankOptions, RankRequest, RankResponse
from rcllm.core.receipts import BlockKind, RankReceipt
from rcllm.engine.engine import Engine
from rcllm.errors import answered
from rcllm.fidelity.records import Configuration, Record, RecordFile, request_fingerprint
from rcllm.model.ceilings import describe_hardware
from rcllm.model.spec import ModelSpec
from rcllm.reuse.select import RULES

BATCH = 8
IntVector = npt.NDArray[np.int64]
_REUSED_KINDS = (BlockKind.INSTRUCTION, BlockKind.HISTORY, BlockKind.ITEM)
Evaluated = dict[RankOptions, list[Record]]  # per options, one record per request, in the order of the requests


def evaluate(
    engine: Engine,
    requests: Sequence[RankRequest],
    options: Sequence[RankOptions],
    kept: RecordFile,
    *,
    batch: int = BATCH,
    on_records: Callable[[int], None] = lambda more: None,
) -> Evaluated:
    """Scores of every request under all `options`; what `kept` holds is not computed again.

    Requests are ranked `batch` at a time, under all options before the next batch, so that a small pool serves. Users
    are left out, so that no request finds its own history from before. `on_records` is told how many records more are
    there. Raises RequestError or ConfigError for the first request that cannot be asked.
    """
    found: Evaluated = {chosen: [] for chosen in options}
    for start in range(0, len(requests), batch):
        some = [_anonymous(engine, request) for request in requests[start : start + batch]]
        for chosen, records in found.items():
            keys = {record_key(engine, request, name, chosen): request for name, request in some}
            asked = {key: replace(request, options=chosen) for key, request in keys.items() if key not in kept}
            responses = answered(engine.rank_batch([*asked.values()]))
            for (key, request), response in zip(asked.items(), responses, strict=True):
                kept.add(key, _record(engine, request, response))
            records += [kept[record_key(engine, request, name, chosen)] for name, request in some]
            on_records(len(some))
    return found


def kept_already(engine: Engine, requests: Sequence[RankRequest], options: RankOptions, kept: RecordFile) -> bool:
    """Whether `evaluate` would compute nothing of these."""
    some = (_anonymous(engine, request) for request in requests)
    return all(record_key(engine, request, name, options) in kept for name, request in some)


def evaluate_timed(
    engine: Engine,
    requests: Sequence[RankRequest],
    options: Sequence[RankOptions],
    kept: RecordFile,
    *,
    on_records: Callable[[int], None] = lambda more: None,
) -> Evaluated:
    """The same, one request at a time, with the wall time of each on a warm cache.

    A request runs under all options before the next one, in an order that rotates, so that a slow moment of the
    machine hits all alike. The first time under each options does not count, nor does one whose blocks were missing:
    these are asked again.
    """
    found: Evaluated = {chosen: [] for chosen in options}
    cold, chosen_in_turn, machine = set(found), list(found), str(asdict(describe_hardware()))
    for request in requests:
        name, asked = _anonymous(engine, request)
        for chosen in chosen_in_turn:
            key = record_key(engine, asked, name, chosen, machine)
            if key not in kept:
                if chosen in cold:
                    engine.rank(replace(asked, options=chosen))
                    cold.discard(chosen)
                kept.add(key, _timed(engine, replace(asked, options=chosen)))
            found[chosen].append(kept[key])
            on_records(1)
        chosen_in_turn = [*chosen_in_turn[1:], *chosen_in_turn[:1]]
    return found


def with_context(engine: Engine, context: str, samples: Sequence[RankRequest]) -> Engine:
    """The same model and pool (keys tell contexts apart) with another canonical context. Raises ConfigError."""
    prompter = engine.prompter.in_context(context, samples)
    config = replace(engine.config, prompt=replace(engine.config.prompt, context=context))
    parts = (engine.decoder, prompter, engine.pool, engine.model_id)
    return Engine(config, *parts, prototypes=engine.prototypes)


def record_key(engine: Engine, request: RankRequest, fingerprint: str, options: RankOptions, machine: str = "") -> str:
    """32 hex digits that name everything that a record depends on; `machine`: for times."""
    prompter = engine.prompter
    configuration = Configuration.of(prompter.context_name, options)
    reads_blocks = configuration.context or engine.config.model.mask == "blocks"  # under which every level does
    contexts = prompter.contexts[options.layout] if reads_blocks else {}
    parts = [
        rcllm.__version__,
        prompter.namespace.hex(),
        engine.config.model.mask,
        repr(configuration),
        *(contexts[kind].digest.hex() for kind in (BlockKind.ITEM, BlockKind.HISTORY) if kind in contexts),
        engine.identity.semantic_pool if options.history == "semantic" else "",
        fingerprint,
        machine,
    ]
    return blake3("\n".join(parts).encode("utf-8")).hexdigest(16)


def request_flops(prompt: Prompt, receipt: RankReceipt, spec: ModelSpec, *, anew: bool = False) -> float:
    """FLOPs of the fresh tokens: the layers' matrices, attention over visible pairs, and the logits of the whole
    vocabulary where a read-out needs them.

    Where only some tokens of a block are fresh, they are counted at the middle of it: a block is short beside what it
    sees. What level `corrected` spends on choosing tokens counts too: its first layers run for all tokens, or a pass of
    level `blocks` comes first (`reuse/select.py`). `anew`: the blocks that the receipt calls reused were computed for
    this request, as full recompute under a block mask does.
    """
    options = prompt.options
    sizes = [len(block) for block in prompt.blocks]
    seen = prompt.sees.astype(np.int64) @ np.array(sizes, dtype=np.int64)
    fresh = sizes if anew else [block.num_fresh for block in receipt.blocks]
    flops = _layers_flops(sizes, seen, fresh, spec)
    evidence = RULES[options.selection.policy].evidence if options.level.name == "corrected" else "none"
    if evidence == "check_layer":
        share = (options.selection.check_layer + 1) / spec.num_layers
        flops += share * (_layers_flops(sizes, seen, sizes, spec) - flops)
    elif evidence == "blocks_pass":
        always = [0 if block.kind in _REUSED_KINDS else len(block) for block in prompt.blocks]
        flops += _layers_flops(sizes, seen, always, spec)
    if options.readout == "likelihood":
        flops += len({(read.block, read.offset) for read in prompt.reads}) * spec.head_flops_per_read
    return flops


def _layers_flops(sizes: Sequence[int], seen: IntVector, fresh: Sequence[int], spec: ModelSpec) -> float:
    """sizes, seen, fresh: per block its tokens, how many tokens before it each of them sees, how many are fresh."""
    pairs = sum(n * (before + (size + 1) / 2) for size, before, n in zip(sizes, seen, fresh, strict=True))
    return sum(fresh) * spec.linear_flops_per_token + spec.attention_flops(int(pairs))


def _anonymous(engine: Engine, request: RankRequest) -> tuple[str, RankRequest]:
    request = engine.prompter.completed(request)  # while it is known whose own choices count for nothing
    return request_fingerprint(request, engine.prompter.catalogue), replace(request, user_id=None)


def _timed(engine: Engine, asked: RankRequest) -> Record:
    """Once more where blocks were missing: then they are there, unless the pool is too small for one request."""
    seconds, response = _clocked(engine, asked)
    if response.receipt.num_computed and not _recomputes(asked):
        seconds, response = _clocked(engine, asked)
    return replace(_record(engine, asked, response), seconds=seconds)


def _clocked(engine: Engine, asked: RankRequest) -> tuple[float, RankResponse]:
    start = time.perf_counter()
    response = engine.rank(asked)
    return time.perf_counter() - start, response


def _record(engine: Engine, asked: RankRequest, response: RankResponse) -> Record:
    receipt, anew = response.receipt, engine.config.model.mask == "blocks" and _recomputes(asked)
    return Record(
        request=request_fingerprint(asked, engine.prompter.catalogue),
        scores=response.scores,
        positive=asked.candidates.index(asked.positive) if asked.positive in asked.candidates else None,
        num_tokens=receipt.num_tokens,
        num_fresh=receipt.num_fresh,
        flops=request_flops(engine.prompter.build(asked), receipt, engine.decoder.spec, anew=anew),
    )


def _recomputes(asked: RankRequest) -> bool:
    """Whether its level reads no block of items or shared events from the cache."""
    return asked.options is not None and asked.options.level.name in ("full", "exact")
