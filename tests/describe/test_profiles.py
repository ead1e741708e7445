"""Rows of users and items: what is read, what is refused, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcllm.core.ranking import Event, ItemId
from rcllm.describe.profiles import Profile, Reject, items, read_profiles, survey, users

KNOWN = frozenset({ItemId("a"), ItemId("b"), ItemId("7")})


def _lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_users_with_item_ids(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u1", "history": ["a", "b", 7]},
        {"user_id": 2, "items": ["a"]},
        {"user_id": "u3", "history": ["a", "gone", "b"]},
        {"user_id": "u4", "history": [{"item_id": "a"}, {"text": " fine lamp "}]},
    ]
    found = list(read_profiles(_lines(tmp_path / "users.jsonl", rows), users(KNOWN, max_events=2)))
    a, b = Event(ItemId("a")), Event(ItemId("b"))
    assert found == [
        Profile(1, "u1", (b, Event(ItemId("7")))),
        Profile(2, "2", (a,)),
        Profile(3, "u3", (a, b), num_unknown=1),
        Profile(4, "u4", (a, Event(text="fine lamp"))),
    ]


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ("{nonsense\n", None, "expected a JSON object"),
        ({"history": ["a"]}, None, "expected a field 'user_id'"),
        ({"user_id": "u", "history": []}, "u", "expected a list of events in 'history', got a list of 0"),
        ({"user_id": "u", "history": "[a, b"}, "u", "expected a list of events in 'history', got '[a, b'"),
        ({"user_id": "u", "history": " | "}, "u", "expected a list of events in 'history', got a list of 0"),
        ({"user_id": "u", "history": {"a": 1}}, "u", "expected a list of events"),
        ({"user_id": "u"}, "u", "got null"),
        ({"user_id": "u", "history": [None]}, "u", "expected each event to be an item id"),
        ({"user_id": "u", "history": [True]}, "u", "expected each event to be an item id"),
        ({"user_id": "u", "history": [{"text": "x", "item_id": "a"}]}, "u", "expected each event"),
        ({"user_id": "u", "history": ["x", "y"]}, "u", "none of the 2 items of the history is in the catalogue"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: Any, name: str | None, reason: str) -> None:
    path = _lines(tmp_path / "users.jsonl", [{"user_id": "ok", "history": ["a"]}, row])
    good, bad = read_profiles(path, users(KNOWN, 5))
    assert isinstance(good, Profile)
    assert isinstance(bad, Reject)
    assert (bad.row, bad.name) == (2, name)
    assert reason in bad.reason


def test_texts_need_no_catalogue_and_ids_do(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "history": ["a red lamp"]}, {"user_id": "v", "history": [17]}]
    text, number = read_profiles(_lines(tmp_path / "users.jsonl", rows), users(None, 5))
    assert text == Profile(1, "u", (Event(text="a red lamp"),))
    assert isinstance(number, Reject)
    assert "item ids need a catalogue" in number.reason


def test_parquet_and_going_on_after_a_row(tmp_path: Path) -> None:
    table = pa.table(
        {"user_id": ["u", "v", "w"], "history": [[{"item_id": "a", "text": None}], None, [{"item_id": "b"}]]}
    )
    pq.write_table(table, tmp_path / "users.parquet")
    whole = list(read_profiles(tmp_path / "users.parquet", users(KNOWN, 5)))
    assert [type(row) for row in whole] == [Profile, Reject, Profile]
    assert list(read_profiles(tmp_path / "users.parquet", users(KNOWN, 5), after=1)) == whole[1:]
    told = survey(whole)
    assert (told.num_profiles, told.num_rejects, told.num_rows) == (2, 1, 3)
    assert told.first_reject == whole[1]


def test_items_are_written_as_the_template_says(tmp_path: Path) -> None:
    rows = [
        {"item_id": 1, "title": "Lamp", "price": 3, "genres": ["red", "old"]},
        {"item_id": 2, "price": 3},
    ]
    lamp, nothing = read_profiles(
        _lines(tmp_path / "items.jsonl", rows), items(("\n{title}", " ({year})", "\n{genres}"))
    )
    assert lamp == Profile(1, "1", (Event(text="Lamp\nred, old"),))
    assert isinstance(nothing, Reject)
    assert "got only 'price'" in nothing.reason


def test_a_list_on_one_line_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "users.json"
    path.write_text(json.dumps([{"user_id": user, "history": ["a"]} for user in "xyz"]))
    assert [each.row for each in read_profiles(path, users(KNOWN, 5))] == [1, 2, 3]
    assert [each.name for each in read_profiles(path, users(KNOWN, 5), after=1)] == ["y", "z"]


def test_guesses_are_told(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    told: list[str] = []
    path.write_text("item_id;title\n1;Lamp, red\n")
    (lamp,) = read_profiles(path, items(("{title}",)), note=told.append)
    assert lamp == Profile(2, "1", (Event(text="Lamp, red"),))
    assert "semicolon" in told[0]
