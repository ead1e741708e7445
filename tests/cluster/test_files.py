"""Placements as files: what was written is read, and what is damaged is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcllm.cluster.files import read_placement, write_placement
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import Statistics
from rcllm.errors import DataError
from tests.cluster.made import logs, placement_of


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs(), st.integers(1, 4), st.floats(0.5, 3))
def test_what_was_written_is_read(tmp_path: Path, statistics: Statistics, num_nodes: int, copies: float) -> None:
    room = Room(num_nodes, max(int(copies * statistics.num_bytes.sum() / num_nodes), int(statistics.num_bytes.max())))
    placement = make_place("halo")(statistics, room)
    write_placement(tmp_path / "p.json", placement)
    found = read_placement(tmp_path / "p.json")
    assert (found.item_ids, found.room, found.policy) == (placement.item_ids, room, "halo")
    assert found.num_bytes.tolist() == placement.num_bytes.tolist()
    assert found.replicated.tolist() == placement.replicated.tolist()
    assert found.evicted.tolist() == placement.evicted.tolist()
    assert found.owner[found.sharded].tolist() == placement.owner[placement.sharded].tolist()
    assert [halo.tolist() for halo in found.halos] == [halo.tolist() for halo in placement.halos]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"format": "another"}, "expected a placement of rcllm place build, got another kind of file"),
        ({"version": 2}, "expected version 1 of the file, got 2"),
        ({"owners": [0]}, "2 items have 1 owners and 2 sizes"),
        ({"owners": [0, "here"]}, "an owner is 'here'"),
        ({"owners": [0, 7]}, "an owner is no node"),
        ({"items": ["a", "a"]}, "items are not different texts"),
        ({"items": [1, 2]}, "items are not different texts"),
        ({"halos": [[0], []]}, "names an item of its own"),
        ({"halos": [[9], []]}, "out of bounds"),
        ({"halos": [[]]}, "1 halos of 2 nodes"),
        ({"node_bytes": 0}, "of 0 bytes"),
        ({"bytes": ["many", 1]}, "invalid literal"),
        ({"nodes": None}, "int"),
        ({"policy": ...}, "'policy' is missing"),
    ],
)
def test_a_damaged_file(tmp_path: Path, changed: Mapping[str, object], why: str) -> None:
    path = tmp_path / "p.json"
    write_placement(path, placement_of([0, 1], [[], []], 2))
    content = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    with pytest.raises(DataError, match=why) as refused:
        read_placement(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("text", [None, "", "[1", "[]", "\x00"])
def test_no_placement_at_all(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match="rcllm place build"):
        read_placement(path)
