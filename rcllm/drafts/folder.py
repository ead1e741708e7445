"""A folder with one draft pool per group, and the router that says which profile is drafted from which pool.

`manifest.json`, written last, names the files that belong together. Knows nothing of models or jobs. Invariant: a
reader sees one saved state or another, never a mixture; a folder without a whole manifest is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcllm.drafts.groups import Member, Router
from rcllm.drafts.pool_drafter import DraftOptions, PoolDrafter
from rcllm.drafts.suffix_pool import DraftPoolLimits, Sharing, SuffixPool
from rcllm.durable import write
from rcllm.errors import ConfigError, DataError
from rcllm.fields import parse
from rcllm.plain_json import read_object, to_json

VERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    version: int
    fingerprint: str  # of model and tokenizer
    sharing: str
    generation: int  # counts the saves; part of each file's name
    files: Mapping[str, int]  # name → bytes; `router.…` and a pool for each group that has one


class DraftPools:
    """`create` new ones or `open` a folder. DraftPools are opened when they are first needed."""

    def __init__(self, router: Router, pools: dict[str, SuffixPool], new: Callable[[str], SuffixPool]) -> None:
        """new: opens or makes the pool of a group that is not in `pools` yet."""
        self.router = router
        self._pools = pools
        self._new = new

    @classmethod
    def create(
        cls, router: Router, fingerprint: str, sharing: Sharing = "all", limits: DraftPoolLimits | None = None
    ) -> DraftPools:
        """Makes empty pools, one for each group; `limits` are those of each pool."""
        return cls(router, {}, lambda group: SuffixPool.create(fingerprint, sharing, limits))

    @classmethod
    def open(cls, folder: Path, fingerprint: str, limits: DraftPoolLimits | None = None) -> DraftPools:
        """Raises DataError for a folder that is not whole, ConfigError for one of another model."""
        manifest = read_manifest(folder)
        if manifest.fingerprint != fingerprint:
            raise ConfigError(
                f"{folder} was made with model and tokenizer {manifest.fingerprint}, expected {fingerprint}; "
                "use that model, or another folder"
            )
        saved = {name.split(".")[0]: folder / name for name in manifest.files}
        sharing: Sharing = "own" if manifest.sharing == "own" else "all"

        def new(group: str) -> SuffixPool:
            if group in saved:
                return SuffixPool.open(saved[group], fingerprint, limits)
            return SuffixPool.create(fingerprint, sharing, limits)

        pools = cls(Router.open(saved["router"]), {}, new)
        for group in pools.router.groups:
            pools.pool(group)  # a memory map each: cheap, and later saves may remove the files
        return pools

    def pool(self, group: str) -> SuffixPool:
        if group not in self._pools:
            self._pools[group] = self._new(group)
        return self._pools[group]

    def drafter_for(
        self, profile: Member, prompt: Sequence[int], *, private: bool = False, options: DraftOptions | None = None
    ) -> PoolDrafter:
        """A drafter for one answer about `profile`, which is learned into the profile's pool while it is written."""
        pool = self.pool(self.router.route(profile))
        return PoolDrafter(pool, prompt, owner_of(profile), private=private, options=options)

    def learn(self, profile: Member, token_ids: Sequence[int], *, private: bool = False) -> None:
        """An answer that was written elsewhere. private: its owner opted out of helping others."""
        self.pool(self.router.route(profile)).learn(token_ids, owner_of(profile), private=private)

    def erase(self, user_ids: Collection[str]) -> None:
        """Removes the users' texts from every pool; a folder holds them until the next `save`."""
        for group in self.router.groups:
            self.pool(group).erase(user_ids)

    def withdraw(self, user_ids: Collection[str]) -> None:
        """The users opt out: their texts stay, for themselves alone."""
        for group in self.router.groups:
            self.pool(group).withdraw(user_ids)

    def save(self, folder: Path) -> None:
        """Writes all files anew, then the manifest, then removes files that it does not name."""
        folder.mkdir(parents=True, exist_ok=True)
        generation = 1 + max((_generation(path) for path in folder.glob("*.g*.*")), default=0)
        files = [folder / f"router.g{generation}.npz"]
        self.router.save(files[0])
        for group in self.router.groups:
            files.append(folder / f"{group}.g{generation}.safetensors")
            self.pool(group).save(files[-1])
        header = self.pool(self.router.groups[0]).index.header
        sizes = {path.name: path.stat().st_size for path in files}
        manifest = {
            "version": VERSION,
            "fingerprint": header.fingerprint,
            "sharing": header.sharing,
            "generation": generation,
            "files": sizes,
        }
        write(folder / _MANIFEST, to_json(manifest, indent=1).encode())
        for path in folder.glob("*.g*.*"):
            if path.name not in sizes:
                path.unlink()


def owner_of(profile: Member) -> str | None:
    """Texts about users are theirs; texts about items are nobody's."""
    return profile.profile_id if profile.kind == "user" else None


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError where files are missing or not whole."""
    path = folder / _MANIFEST
    try:
        manifest = parse(Manifest, read_object(path.read_bytes(), "", DataError), error=DataError)
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is missing: {folder} is no whole folder of draft pools. Remove it and learn them again"
        ) from error
    except (OSError, DataError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove the folder and learn the pools again") from error
    if manifest.version != VERSION:
        raise ConfigError(f"{folder} has format {manifest.version}, expected {VERSION}; learn the pools again")
    if sizes != manifest.files:
        wrong = sorted(name for name, size in manifest.files.items() if sizes[name] != size)
        raise DataError(f"{folder}: {', '.join(wrong)} are not whole; remove the folder and learn the pools again")
    return manifest


def _generation(path: Path) -> int:
    digits = path.name.split(".")[1][1:]
    return int(digits) if digits.isdigit() else 0
