"""Names that stand in several rows are described once, from all of their rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from rcllm.core.ranking import Event, Item, ItemId
from rcllm.data import Catalogue
from rcllm.describe.profiles import Profile, Reject, catalogue_digest, items, read_profiles, users
from rcllm.describe.repeats import find_repeats, read_once

KNOWN = frozenset(ItemId(name) for name in "abcdef")


def _file(folder: Path, rows: list[object]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _once(path: Path, max_events: int = 9, after: int = 0) -> list[Profile | Reject]:
    repeats = find_repeats(path, users(KNOWN, None), max_events)
    return list(read_once(path, "user", users(KNOWN, max_events), repeats, after))


def _told(row: Profile | Reject) -> tuple[int, str | None, str]:
    events = "".join(str(event.item_id) for event in row.events) if isinstance(row, Profile) else "-"
    return row.row, row.name, events


def test_the_rows_of_a_user_are_one_history_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [
        {"user_id": "żaba", "history": ["a", "b"]},
        {"user_id": "v", "history": ["c"]},
        {"user_id": "żaba", "history": ["c", "gone"]},
        {"user_id": "żaba", "history": []},
        {"user_id": "żaba", "history": ["a"]},
    ]
    found = _once(_file(tmp_path, rows))
    assert [_told(row) for row in found] == [(1, "żaba", "abca"), (2, "v", "c"), (4, "żaba", "-")]
    assert isinstance(found[0], Profile)
    assert found[0].num_unknown == 1


def test_a_row_that_repeats_the_history_so_far_counts_once(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "history": list("abcde"[:n])} for n in (1, 3, 5)]
    assert [_told(row) for row in _once(_file(tmp_path, rows))] == [(1, "u", "abcde")]
    assert [_told(row) for row in _once(_file(tmp_path, rows), max_events=2)] == [(1, "u", "de")]


def test_a_first_row_that_cannot_be_used_is_a_reject_and_the_next_one_the_profile(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "history": ["gone"]}, {"user_id": "u", "history": ["a"]}, {"user_id": "u", "history": "b"}]
    assert [_told(row) for row in _once(_file(tmp_path, rows))] == [(1, "u", "-"), (2, "u", "ab")]


@pytest.mark.parametrize("after", range(6))
def test_reading_on_after_any_row_gives_what_is_left(tmp_path: Path, after: int) -> None:
    rows = [{"user_id": user, "history": [item]} for user, item in ("ua", "vb", "uc", "wd", "ve")]
    path = _file(tmp_path, rows)
    whole = _once(path)
    assert [_told(row) for row in whole] == [(1, "u", "ac"), (2, "v", "be"), (4, "w", "d")]
    assert _once(path, after=after) == [row for row in whole if row.row > after]


def test_rows_that_do_not_stand_alone_are_counted(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"user_id": f"u{n % 3}", "history": ["a"]} for n in range(7)])
    repeats = find_repeats(path, users(KNOWN, None))
    assert (sorted(repeats.joined), repeats.num_rows) == (["u0", "u1", "u2"], 4)
    alone = _file(tmp_path, [{"user_id": f"u{n}", "history": ["a"]} for n in range(7)])
    assert find_repeats(alone, users(KNOWN, None)).num_rows == 0


def test_an_item_that_comes_again_is_a_reject_that_names_the_first_row(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"item_id": name, "title": f"{name} {n}"} for n, name in enumerate("xyx")])
    parse = items(("{title}",))
    found = list(read_once(path, "item", parse, find_repeats(path, parse)))
    assert [type(row) for row in found] == [Profile, Profile, Reject]
    assert isinstance(found[0], Profile)
    assert found[0].events == (Event(text="x 0"),)
    assert isinstance(found[2], Reject)
    assert (found[2].row, found[2].reason) == (3, "expected each item once, got 'x' as in row 1")


@pytest.mark.parametrize(
    ("cell", "events"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b']", ["a", "b"]),  # as pandas writes a list
        ("a|b", ["a", "b"]),
        (" a ", ["a"]),
        ("[7]", ["7"]),
    ],
)
def test_a_history_in_a_cell_of_csv(tmp_path: Path, cell: str, events: list[str]) -> None:
    path = tmp_path / "users.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["user_id", "history"], ["u", cell]])
    (found,) = read_profiles(path, users(KNOWN | {ItemId("7")}, 9))
    assert found == Profile(2, "u", tuple(Event(ItemId(name)) for name in events))


@pytest.mark.parametrize("cell", ["", " ", "[", "[a]", "[1, __import__('os')]", "|", "[" * 9999])
def test_a_cell_that_holds_no_list_is_a_reject(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "users.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["user_id", "history"], ["u", cell]])
    (found,) = read_profiles(path, users(KNOWN, 9))
    assert isinstance(found, Reject)
    assert "expected a list of events in 'history'" in found.reason


def test_the_digest_of_a_catalogue_changes_with_any_text() -> None:
    def digest(*given: Item) -> str:
        return catalogue_digest(Catalogue(given))

    lamp, rug = Item(ItemId("1"), {"title": "lamp"}), Item(ItemId("2"), {"title": "rug"})
    digests = {
        digest(),
        digest(lamp),
        digest(lamp, rug),
        digest(rug, lamp),
        digest(Item(ItemId("1"), {"name": "lamp"})),
        digest(Item(ItemId("1"), {"title": "Lamp"})),
        digest(Item(ItemId("1"), {"title": "lamp"}, {"price": "3"})),
    }
    assert len(digests) == 7
    assert digest(lamp, rug) == digest(lamp, rug)
