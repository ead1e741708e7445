"""What `rcllm doctor` looks for in what is kept: whether one tenant reads another's, and whether the store is well.

Knows nothing of how it is shown. Invariant: it asks with made-up users in memory of its own, makes no store, and adds
no block to one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rcllm.cache.rates import Rates
from rcllm.config import MIB, Config, StoreConfig
from rcllm.core.ranking import Event, Item, ItemId, Level, RankOptions, RankRequest, RankResponse, UserId
from rcllm.core.receipts import BlockKind
from rcllm.engine.engine import Engine
from rcllm.engine.tiers import RATES, budget_of, folder_of
from rcllm.errors import RcllmError
from rcllm.prompt.template import Template
from rcllm.store.disk import DiskStore
from rcllm.store.memory import MemoryStore
from rcllm.store.valkey import ValkeyStore

_ITEM = ItemId("probe")
_MEMORY_BYTES = 64 * MIB
_LITTLE_ROOM = 0.02  # of a disk


@dataclass(frozen=True, slots=True)
class Finding:
    """`problem`: it does not work; `advice`: it works, but could be better."""

    kind: Literal["problem", "advice"]
    text: str


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen, and what is to be done about it."""

    facts: Mapping[str, str]
    findings: tuple[Finding, ...] = ()


def build_for_probes(config: Config) -> Engine:
    """An engine with one made-up item over a store in memory. Raises what `Engine.build` raises."""
    fields = dict.fromkeys(Template.of(config.prompt).shown, "probe")
    return Engine.build({_ITEM: Item(_ITEM, fields)}, config, store=MemoryStore(_MEMORY_BYTES))


def probe_tenants(engine: Engine) -> Looked:
    """Two tenants have a user of the same name, who says the same: what the first one computed, the second must miss.

    The first one asks twice, for a probe that hits nothing at all would show nothing.
    """
    if engine.prompter.template.open:
        return Looked({"tenants": "not probed, for this template ranks nothing"})
    options: RankOptions = replace(engine.config.rank, level=Level("exact"))
    words = tuple(Event(text=f"what the user of a probe has said, number {n}") for n in range(3))
    first = RankRequest("probe", (_ITEM,), words, UserId("probe"), options=options, tenant="probe-1")
    second = replace(first, tenant="probe-2")
    try:
        engine.rank(first)
        control = _num_hits(engine.rank(first))
        engine.pool.write_through()
        found = _found(engine, second)
        hits = _num_hits(engine.rank(second))
    except RcllmError as error:
        return Looked({"tenants": "not probed"}, (Finding("advice", f"tenants could not be probed: {error}"),))
    if found or hits:
        said = (
            f"a user's blocks are read across tenants: of what tenant probe-1 computed, tenant probe-2 found {found} "
            f"blocks and read {hits}. Serve one tenant alone until that is mended"
        )
        return Looked({"tenants": "NOT kept apart"}, (Finding("problem", said),))
    if not control:
        said = "tenants were probed in vain, for a user's own blocks were not read again either"
        return Looked({"tenants": "not known to be kept apart"}, (Finding("advice", said),))
    return Looked({"tenants": f"kept apart: of {control} blocks of a user, another tenant's user found none"})


def _found(engine: Engine, asked: RankRequest) -> int:
    """Blocks of its history that any tier has."""
    blocks = [block for block in engine.prompter.build(asked).blocks if block.kind is BlockKind.HISTORY]
    keys = {key for block in blocks for key in (block.key, block.chain_key) if key is not None}
    return len(engine.pool.lookup_many(keys).found)


def _num_hits(response: RankResponse) -> int:
    """Blocks of its history that were read from any tier."""
    blocks = response.receipt.blocks
    return sum(b.kind == BlockKind.HISTORY and b.source not in ("fresh", "computed") for b in blocks)


def look_at_store(config: StoreConfig) -> Looked:
    """Opens the store where there is one, and reads all records and no block."""
    if not config.enabled:
        return Looked({"store": "off: what is computed ends with its process"})
    folder = folder_of(config)
    looked = _disk(config, folder) if folder.exists() else _no_disk(config, folder)
    return _with_shared(looked, config.shared) if config.shared else looked


def _no_disk(config: StoreConfig, folder: Path) -> Looked:
    nearest = next(path for path in folder.absolute().parents if path.exists())
    budget = f"{budget_of(config, folder) / 1e6:,.0f} MB"
    if not os.access(nearest, os.W_OK):
        return Looked(
            {"store": f"{folder}, which cannot be made"},
            (Finding("problem", f"{nearest} cannot be written, so that nothing is kept: name a --store-folder"),),
        )
    return Looked({"store": f"{folder}, made when it is first used", "disk": f"{budget} of {_free(nearest)}"})


def _disk(config: StoreConfig, folder: Path) -> Looked:
    budget = budget_of(config, folder)
    try:
        with DiskStore.open(folder, budget) as disk:
            try:
                disk.check()
                wrong = ""
            except AssertionError as error:
                wrong = str(error)
            (tier,), use = disk.stats(), disk.use()
    except RcllmError as error:
        return Looked({"store": f"{folder}, which cannot be used"}, (Finding("problem", str(error)),))
    rates = Rates()
    rates.load(folder / RATES)
    facts = {
        "store": f"{folder}: {tier.num_blocks:,} blocks" + ("" if use.writable else ", which cannot be written"),
        "disk": f"{tier.num_bytes / 1e6:,.1f} MB of {budget / 1e6:,.0f} MB, {_free(folder)}",
        "rates": rates.told(),
    }
    return Looked(facts, tuple(_about_disk(folder, wrong, use.writable)))


def _about_disk(folder: Path, wrong: str, writable: bool) -> list[Finding]:
    found = []
    if wrong:
        found.append(Finding("problem", f"{folder} is damaged ({wrong}): rcllm cache verify --repair"))
    if not writable:
        found.append(Finding("advice", f"{folder} cannot be written: its blocks are read, and none is added or erased"))
    disk = shutil.disk_usage(folder)
    if disk.free < _LITTLE_ROOM * disk.total:
        text = f"the disk of {folder} is full but for {disk.free / 1e6:,.0f} MB: make room, or rcllm cache compact"
        found.append(Finding("advice", text))
    return found


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free"


def _with_shared(looked: Looked, url: str) -> Looked:
    try:
        store = ValkeyStore(url)
        try:
            (tier,) = store.stats()
        finally:
            store.close()
    except Exception as error:  # a client's own, of every kind
        text = f"the shared store does not answer ({error}): see that it runs, or leave out store.shared"
        return Looked({**looked.facts, "shared": "does not answer"}, (*looked.findings, Finding("problem", text)))
    return Looked({**looked.facts, "shared": f"answers: {tier.num_blocks:,} blocks"}, looked.findings)
