"""Records that outlive a kill, and configurations that are equal where they mean the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rcllm.core.ranking import Item, ItemId, Level, RankOptions, RankRequest, Selection
from rcllm.errors import ConfigError, DataError, ModelError
from rcllm.fidelity.records import Configuration, Record, RecordFile, request_fingerprint
from tests.engine import tiny

RECORDS = {
    f"key{n}": Record(f"r{n}", (0.1 * n, -1.5, -1e300), n if n % 2 else None, 100, 10, 1e9, 0.1 if n else None)
    for n in range(4)
}


def written(path: Path) -> bytes:
    with RecordFile(path) as kept:
        for key, record in RECORDS.items():
            kept.add(key, record)
    return path.read_bytes()


def test_records_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    written(path)
    with RecordFile(path) as kept:
        assert {key: kept[key] for key in RECORDS} == RECORDS
        assert len(kept) == len(RECORDS)
        assert "key9" not in kept


def test_a_kill_at_any_byte_costs_at_most_the_line_that_it_tore(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    content = written(path)
    for stop in range(len(content)):
        path.write_bytes(content[:stop])
        whole = content[:stop].count(b"\n")
        with RecordFile(path) as kept:
            assert len(kept) == whole
            for key, record in RECORDS.items():
                if key not in kept:
                    kept.add(key, record)
        assert path.read_bytes() == content


def test_another_file_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(written(path) + b'{"request_id": "r1"}\n')
    with pytest.raises(DataError, match="line 5"), RecordFile(path):
        pass
    with pytest.raises(DataError, match="cannot be used"), RecordFile(tmp_path):
        pass


def test_without_a_path_records_stay_in_memory() -> None:
    kept = RecordFile()
    kept.add("a", RECORDS["key1"])
    assert kept["a"] == RECORDS["key1"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"selection": Selection("tail")}, True),
        ({"level": Level("tail", 0.3)}, False),
        ({"readout": "pointwise"}, False),
        ({"layout": "items_first"}, False),
        ({"label_place": "before"}, False),
        ({"history": "chain"}, False),
    ],
)
def test_what_has_no_effect_makes_no_other_configuration(change: dict[str, object], same: bool) -> None:
    options = RankOptions()
    changed = replace(options, **change)  # type: ignore[arg-type]
    assert (Configuration.of("bos", options) == Configuration.of("bos", changed)) is same


def test_selection_and_label_place_matter_where_they_are_used() -> None:
    corrected = RankOptions(Level("corrected", 0.3, 0.3))
    other = replace(corrected, selection=Selection("tail"))
    assert Configuration.of("bos", corrected) != Configuration.of("bos", other)
    assert Configuration.of("bos", corrected).setting == Configuration.of("bos", other).setting
    pointwise = RankOptions(readout="pointwise")
    assert Configuration.of("bos", pointwise) == Configuration.of("bos", replace(pointwise, label_place="before"))


def test_full_recompute_has_no_context() -> None:
    options = RankOptions(history="chain")
    assert Configuration.of("bos", options).full == Configuration.of("mean(4)", replace(options, history="shared")).full
    assert Configuration.of("bos", options).full.context == ""


def test_configurations_as_json() -> None:
    one = Configuration.of("mean(4)", RankOptions(Level("corrected", 0.3, 0.2), selection=Selection("tail", window=4)))
    assert Configuration.from_json(one.to_json(), "here") == one
    broken = one.to_json()
    broken["options"]["readuot"] = "label"
    with pytest.raises(ConfigError, match="did you mean 'readout'"):
        Configuration.from_json(broken, "here")


def test_fingerprints_change_with_all_that_a_prompt_is_made_from() -> None:
    catalogue = tiny.catalogue()
    asked = tiny.request(4, (30, "own words"))
    base = request_fingerprint(asked, catalogue)
    assert base == request_fingerprint(replace(asked, request_id="other", user_id=None, options=None), catalogue)
    others: list[RankRequest] = [
        replace(asked, candidates=asked.candidates[::-1]),
        replace(asked, history=asked.history[:1]),
        replace(asked, positive=asked.candidates[0]),
        replace(asked, volatile={asked.candidates[0]: {"price": "1"}}),
        replace(asked, texts={asked.candidates[0]: {"title": "their own"}}),
        replace(asked, texts={tiny.IDS[30]: {"title": "their own"}}),
    ]
    found = {request_fingerprint(other, catalogue) for other in others}
    for item_id in (asked.candidates[0], tiny.IDS[30]):  # a candidate, an event
        found.add(request_fingerprint(asked, catalogue | {item_id: Item(ItemId(item_id), {"title": "new"})}))
    assert len(found | {base}) == 9


@pytest.mark.parametrize("score", [float("nan"), float("-inf")])
def test_scores_that_are_not_numbers_are_refused(tmp_path: Path, score: float) -> None:
    path = tmp_path / "records.jsonl"
    with RecordFile(path) as file, pytest.raises(ModelError, match="not numbers"):
        file.add("key", Record("r", (0.5, score), 0, 100, 10, 1e9))
    assert path.read_bytes() == b""
