"""Owners as they lie in a store that lasts: a digest in the place of a name, so that no user's name is in any file.

Knows nothing of stores. Invariant: an alias names the same digest as the name that it stands for.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NewType

from blake3 import blake3

OwnerDigest = NewType("OwnerDigest", bytes)  # kind, then 16 bytes of blake3
DIGEST_BYTES = 17
NOBODY = OwnerDigest(bytes(DIGEST_BYTES))  # the owner of a block that has none
_KINDS = {"user": b"u", "item": b"i"}  # of names such as "user:ann"; all else is of the kind "other"
_WORDS = {kind: word for word, kind in _KINDS.items()} | {b"o": "other"}


def digest(owner: str | None) -> OwnerDigest:
    """Of a name such as `user:ann`, or of its alias."""
    if owner is None:
        return NOBODY
    if (known := _of_alias(owner)) is not None:
        return known
    kind = _KINDS.get(owner.partition(":")[0], b"o") if ":" in owner else b"o"
    return OwnerDigest(kind + blake3(owner.encode("utf-8", "surrogatepass")).digest(DIGEST_BYTES - 1))


def alias(owner: OwnerDigest) -> str | None:
    """What stands for an owner whose name is not known: it erases the same blocks."""
    return None if owner == NOBODY else f"{_WORDS[owner[:1]]}#{owner[1:].hex()}"


def one_name(owner: str | None) -> str | None:
    """The same for a name and for its alias, which a lasting tier returns in its place."""
    return alias(digest(owner))


def is_among(owner: str | None, owners: Collection[str] | None) -> bool:
    """Whether an owner is one of `owners`, all by their one names; None for these stands for everybody."""
    return owner is not None and (owners is None or owner in owners)


def _of_alias(owner: str) -> OwnerDigest | None:
    word, mark, digits = owner.partition("#")
    if not mark or len(digits) != 2 * (DIGEST_BYTES - 1) or not set(digits) <= set("0123456789abcdef"):
        return None
    kind = next((kind for kind, known in _WORDS.items() if known == word), None)
    return None if kind is None else OwnerDigest(kind + bytes.fromhex(digits))
