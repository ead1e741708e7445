"""`rcllm cache`: what is kept on disk, and its care. Knows nothing of how blocks are made or read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import typer

from rcllm.cache.rates import Rates
from rcllm.cli.inputs import make_config
from rcllm.cli.options import EngineOptions, StoreOptions
from rcllm.cli.screen import busy, console, progress, say
from rcllm.cli.tables import facts_table, spaces_table
from rcllm.config import Config, StoreConfig
from rcllm.core.ranking import UserId, whose
from rcllm.drafts.folder import DraftPools, read_manifest
from rcllm.engine.build import this_machine
from rcllm.engine.space import current_space
from rcllm.engine.tiers import RATES, budget_of, folder_of, open_tiers
from rcllm.errors import ConfigError, StoreError
from rcllm.plain_json import to_json
from rcllm.reuse.missing import item_owner, user_owner
from rcllm.store.disk import DiskStore, Space, Verified, compact, repair
from rcllm.store.owners import one_name

_DAY_S = 86_400.0


def stats_command(engine_options: EngineOptions, store_folder: Path | None, as_json: bool) -> None:
    """Prints what a store has."""
    config = make_config(engine_options)
    with _opened(config.store, store_folder) as disk:
        (tier,), use, spaces = disk.stats(), disk.use(), disk.spaces()
        current, rates = _current(config), Rates()
        rates.load(disk.folder / RATES)
        if as_json:
            told = {"tier": asdict(tier), "use": asdict(use), "current": current, "rates": rates.told()}
            spaces_told = {name: asdict(space) for name, space in spaces.items()}
            console().print(to_json({"folder": str(disk.folder), **told, "spaces": spaces_told}), soft_wrap=True)
            return
        others = _others(spaces, current)
        facts = {
            "folder": str(disk.folder),
            "blocks": f"{tier.num_blocks:,}, {tier.num_bytes / 1e6:,.1f} MB of {tier.budget_bytes / 1e6:,.0f} MB",
            "file": f"{use.file_bytes / 1e6:,.1f} MB" + ("" if use.writable else ", which cannot be written"),
            "rates": rates.told(),
            "of no current model": f"{sum(each.num_blocks for each in others.values()):,} blocks, "
            f"{sum(each.num_bytes for each in others.values()) / 1e6:,.1f} MB (rcllm cache prune)",
        }
        console().print(facts_table("Store", facts))
        console().print(spaces_table(spaces, current, time.time()))


def verify_command(store_folder: Path | None, repair: bool) -> None:
    """Exit code 1: something is damaged and was left so."""
    with _checking() as on_progress:
        found = _repaired(store_folder, on_progress) if repair else _verified(store_folder, on_progress)
    for difference in found.differences[:20]:
        say(difference)
    if more := len(found.differences) - 20:
        say(f"and {more:,} more") if more > 0 else None
    outcome = "all whole" if found.is_whole else ("repaired" if found.repaired else "damaged: run it with --repair")
    console().print(f"{found.num_blocks:,} blocks, {found.num_damaged:,} of them damaged: {outcome}")
    if not found.is_whole and not found.repaired:
        raise typer.Exit(1)


def compact_command(store_folder: Path | None) -> None:
    """Prints what it won."""
    with busy("copying what is in use"):
        done = compact(_there(_folder(store_folder)))
    console().print(f"{done.bytes_before / 1e6:,.1f} MB before, {done.bytes_after / 1e6:,.1f} MB now")


def erase_command(
    store: StoreOptions,
    user: tuple[str, ...],
    item: tuple[str, ...],
    tenant: str,
    drafts: Path | None,
    scrub: bool,
) -> None:
    """Prints how many blocks went, by owner."""
    if not user and not item:
        raise ConfigError("there is nobody to erase: give --user ID or --item ID")
    if tenant and not user:
        raise ConfigError("--tenant names whose users are meant, and there is no --user; items belong to nobody")
    owners = [(f"user {each}", user_owner(whose(UserId(each), tenant))) for each in user]
    owners += [(f"item {each}", item_owner(each)) for each in item]
    config = make_config(EngineOptions(), store=store).store
    _there(folder_of(config))
    tiers = open_tiers(replace(config, enabled=True), "", {})
    try:
        if tiers.disk is None:
            raise StoreError(f"{folder_of(config)}: nothing was erased there")
        for name, owner in owners:
            num_blocks = tiers.store.delete_owner(one_name(owner) or "")
            console().print(f"{name}: {num_blocks:,} blocks removed")
        if scrub:
            with busy("overwriting what was removed"):
                done = tiers.disk.scrub()
            console().print(f"{done.num_bytes / 1e6:,.1f} MB of the file overwritten")
    finally:
        tiers.store.close()
    if drafts is not None and user:
        pools = DraftPools.open(drafts, read_manifest(drafts).fingerprint)
        pools.erase(user)
        pools.save(drafts)
        console().print(f"{drafts}: written again without them")


def prune_command(engine_options: EngineOptions, store_folder: Path | None, unused_days: float | None) -> None:
    """Prints what went."""
    config = make_config(engine_options)
    with _opened(config.store, store_folder) as disk:
        spaces = disk.spaces()
        if unused_days is None:
            keep = {_current(config)}
            if not keep & spaces.keys():
                raise ConfigError(
                    "no block belongs to the model, adapter, template and dtype of this configuration, so that all "
                    "would go: name those that are in use (--model, --adapter, --template, --config), or give "
                    "--unused-days"
                )
        else:
            before = time.time() - unused_days * _DAY_S
            keep = {name for name, space in spaces.items() if space.used >= before}
        gone = disk.prune(keep)
    console().print(
        f"{gone.num_blocks:,} blocks, {gone.num_bytes / 1e6:,.1f} MB removed. The file keeps its size, and its free "
        "pages are used again; rcllm cache compact gives them back"
    )


def export_command(to: Path, store_folder: Path | None) -> None:
    """Prints what was copied."""
    if to.exists():
        raise ConfigError(f"{to} is there already; name a folder to make")
    with _opened(_configured(), store_folder) as disk, busy("copying"):
        made = disk.export_to(to)
    console().print(f"{made.blocks:,} blocks, {made.bytes / 1e6:,.1f} MB in {to}")


def import_command(source: Path, store_folder: Path | None, disk_mb: int | None) -> None:
    """Prints what was taken."""
    config = _configured()
    config = replace(config, disk_mb=disk_mb or config.disk_mb)
    folder = _folder(store_folder, config)
    with DiskStore.open(folder, budget_of(config, folder)) as disk, busy("checking and copying"):
        done = disk.import_from(source)
    console().print(
        f"{done.num_taken:,} blocks taken, {done.num_there:,} were there, {done.num_erased:,} left out since their "
        f"owners were erased here, {done.num_damaged:,} left out since they are damaged"
    )


# ---- what they share ----


def _folder(given: Path | None, config: StoreConfig | None = None) -> Path:
    return given if given is not None else folder_of(config or _configured())


def _configured() -> StoreConfig:
    """As the environment says, for commands that take no file."""
    return Config.load(None, os.environ).store


def _there(folder: Path) -> Path:
    """Commands that look after a store make none. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"there is no store at {folder}: rcllm warm and rcllm rank make it, or give --store-folder")
    return folder


@contextmanager
def _opened(config: StoreConfig, given: Path | None) -> Iterator[DiskStore]:
    folder = _there(_folder(given, config))
    with DiskStore.open(folder, budget_of(config, folder)) as disk:
        yield disk


@contextmanager
def _checking() -> Iterator[Callable[[int, int], None]]:
    with progress() as bar:
        task = bar.add_task("reading blocks", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _verified(given: Path | None, on_progress: Callable[[int, int], None]) -> Verified:
    with _opened(_configured(), given) as disk:
        return disk.verify(repair=False, on_progress=on_progress)


def _repaired(given: Path | None, on_progress: Callable[[int, int], None]) -> Verified:
    done = repair(_there(_folder(given)), on_progress)
    if done.num_saved is not None:
        say(f"the file itself was broken; {done.num_saved:,} whole blocks were found in it, and saved")
    return done.verified


def _current(config: Config) -> str:
    with busy("reading the model's fingerprint"):
        return current_space(config, this_machine())


def _others(spaces: Mapping[str, Space], current: str) -> Mapping[str, Space]:
    return {name: space for name, space in spaces.items() if name != current}
