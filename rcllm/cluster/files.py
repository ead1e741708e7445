"""Placements as files: JSON with a version, whole or not there.

Knows nothing of what placements are for. Invariant: what is read passes `Placement.check`, or DataError names the file
and what is wrong with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rcllm.cluster.placement import Placement, Room
from rcllm.core.ranking import ItemId
from rcllm.durable import write, writing
from rcllm.errors import DataError

FORMAT, VERSION = "rcllm placement", 1
_REPLICATED, _EVICTED = "everywhere", "nowhere"  # in the place of an owner


def write_placement(path: Path, placement: Placement) -> None:
    """The file is there whole or not at all. Raises DataError."""
    owners: list[int | str] = placement.owner.tolist()
    for item in np.flatnonzero(placement.replicated).tolist():
        owners[item] = _REPLICATED
    for item in np.flatnonzero(placement.evicted).tolist():
        owners[item] = _EVICTED
    content = {
        "format": FORMAT,
        "version": VERSION,
        "policy": placement.policy,
        "nodes": placement.room.num_nodes,
        "node_bytes": placement.room.node_bytes,
        "items": list(placement.item_ids),
        "bytes": placement.num_bytes.tolist(),
        "owners": owners,
        "halos": [halo.tolist() for halo in placement.halos],
    }
    with writing(path):
        write(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())


def read_placement(path: Path) -> Placement:
    """Raises DataError where the file is missing, of another kind or version, or contradicts itself."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a placement ({error}); make one with rcllm place build") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: expected a placement of rcllm place build, got another kind of file")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: expected version {VERSION} of the file, got {content.get('version')!r}; build the placement "
            "anew, or read it with the version of rcllm that wrote it"
        )
    try:
        placement = _placement(content)
        placement.check()
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AssertionError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: the placement is damaged: {what}; build it anew with rcllm place build") from error
    return placement


def _placement(content: dict[str, Any]) -> Placement:
    item_ids, owners = content["items"], content["owners"]
    sizes = np.array(content["bytes"], dtype=np.int64)
    if not all(type(each) is str for each in item_ids) or len(set(item_ids)) != len(item_ids):
        raise ValueError("items are not different texts")
    if not len(item_ids) == len(owners) == len(sizes):
        raise ValueError(f"{len(item_ids)} items have {len(owners)} owners and {len(sizes)} sizes")
    if strange := [each for each in owners if type(each) is not int and each not in (_REPLICATED, _EVICTED)]:
        raise ValueError(f"an owner is {strange[0]!r}")
    return Placement(
        tuple(ItemId(each) for each in item_ids),
        sizes,
        Room(int(content["nodes"]), int(content["node_bytes"])),
        np.array([each == _REPLICATED for each in owners], dtype=np.bool_),
        np.array([each == _EVICTED for each in owners], dtype=np.bool_),
        np.array([each if type(each) is int else 0 for each in owners], dtype=np.int64),
        tuple(np.array(halo, dtype=np.int64).reshape(-1) for halo in content["halos"]),
        str(content["policy"]),
    )
