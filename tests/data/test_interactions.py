"""Interaction logs: configurable columns, clocks of several kinds, and histories in order of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Interaction, ItemId, UserId
from rcllm.data import InteractionColumns, Table, histories, read_interactions, read_users
from rcllm.data.columns import NO_CLOCK
from rcllm.errors import DataError


def row(user: str, item: str, when: float, text: str | None = None, rating: float | None = None) -> Interaction:
    return Interaction(UserId(user), ItemId(item), when, text, rating)


def test_reads_the_default_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"user_id": "u", "item_id": 1, "timestamp": 5, "text": "fine", "rating": 4}\n'
        '{"user_id": "u", "item_id": "2", "timestamp": "1970-01-01 00:00:07"}\n'
        '{"user_id": "u", "item_id": "3", "timestamp": "soon"}\n'
        '{"user_id": "u", "item_id": "4", "timestamp": 9, "rating": "good"}\n'
    )
    rows, report = read_interactions(path)
    assert rows == [row("u", "1", 5, "fine", 4), row("u", "2", 7)]
    assert [each.line for each in report.problems] == [3, 4]
    with pytest.raises(DataError, match=r"log\.jsonl, line 3: expected a time .* got 'soon'"):
        read_interactions(path, strict=True)


def test_reads_other_columns_and_units(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("uid|sku|ms|note\nu|a|1588615855070|hm\n")
    columns = InteractionColumns("uid", "sku", "ms", units_per_second=1000, text="note")
    rows, _ = read_interactions(path, columns, table=Table("|"))
    assert rows == [row("u", "a", 1588615855.07, "hm")]


def test_without_a_clock_the_rank_stands_for_time(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\nu,b\nv,a\nu,a\n")
    rows, _ = read_interactions(path, InteractionColumns(timestamp=None))
    assert [each.timestamp for each in rows] == [0, 1, 2]
    assert [each.item_id for each in histories(rows)[UserId("u")]] == ["b", "a"]


def test_a_misnamed_column_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_ident,item_id,timestamp\nu,b,1\n")
    expected = (
        r"expected a field with the user \(such as user_id\), got only 'user_ident'.*--user-field.*'user_ident'\?"
    )
    with pytest.raises(DataError, match=expected):
        read_interactions(path)
    with pytest.raises(DataError, match=r"expected a field 'ident', got only .*Did you mean 'user_ident'"):
        read_interactions(path, InteractionColumns("ident"))


def test_rows_with_items_outside_the_catalogue_are_malformed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,a,1\nu,x,2\n")
    rows, report = read_interactions(path, items={ItemId("a")})
    assert rows == [row("u", "a", 1)]
    assert [(each.line, each.reason) for each in report.problems] == [(3, "expected an item of the catalogue, got 'x'")]


def test_reads_users_with_ranks_as_time(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text(
        '{"user_id": "u", "items": ["b", "a", 3]}\n{"user_id": "v", "items": "a"}\n{"user_id": "w", "items": [null]}\n'
    )
    rows, report = read_users(path)
    assert rows == [row("u", "b", 0), row("u", "a", 1), row("u", "3", 2)]
    assert [each.line for each in report.problems] == [2, 3]
    assert report.problems[0].reason == "expected a list of item ids in 'history' (or 'items'), got 'a'"


def test_histories_drop_rows_that_repeat_another_in_every_field() -> None:
    rows = [row("u", "a", 2, "x"), row("u", "b", 1), row("u", "a", 2, "x"), row("u", "a", 3, "x")]
    assert histories(rows) == {UserId("u"): (rows[1], rows[0], rows[3])}


@given(st.lists(st.tuples(st.sampled_from("uvw"), st.integers(0, 3)), max_size=30))
def test_histories_are_sorted_and_stable(pairs: list[tuple[str, int]]) -> None:
    rows = [row(user, str(number), when) for number, (user, when) in enumerate(pairs)]
    grouped = histories(rows)
    assert sum(map(len, grouped.values())) == len(rows)
    for user, history in grouped.items():
        order = [(each.timestamp, int(each.item_id)) for each in history]
        assert order == sorted(order)
        assert {each.user_id for each in history} == {user}


def test_rows_of_one_user_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text(
        '{"user_id": "u", "history": ["a", "b", "c"]}\n{"user_id": "v", "items": ["a"]}\n'
        '{"user_id": "u", "history": ["d", "e"]}\n{"user_id": "v", "items": ["a", "b"]}\n'
        '{"user_id": "v", "items": ["a", "b", "a"]}\n'
    )
    for rows, report in (read_users(path), read_interactions(path)):
        by_user = histories(rows)
        assert [each.item_id for each in by_user[UserId("u")]] == ["a", "b", "c", "d", "e"]
        assert [each.item_id for each in by_user[UserId("v")]] == ["a", "b", "a"]
        assert report.notes == (
            "rows belong to a user who came before: read one after another, in the order of the file (rows: 1)",
            "rows repeat a user's history so far and go on: what they repeat counts once (rows: 2)",
        )


def test_a_list_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"user_id": "u", "items": ["a"]}\n{"user_id": "v", "items": ["a"], "history": ["b"]}\n')
    _, report = read_users(path)
    assert report.problems[0].reason == "expected a user's items under one name, got both 'history' and 'items'"


def test_a_row_with_an_item_and_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"user_id": "u", "item_id": "c", "history": ["a", "b"]}\n')
    with pytest.raises(DataError, match="expected one item or a user's whole list in a row, got both"):
        read_interactions(path)


def test_a_clock_and_the_order_of_rows_are_never_compared(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"user_id": "u", "item_id": "a"}\n{"user_id": "u", "item_id": "b", "timestamp": 1}\n'
        '{"user_id": "u", "history": ["c"]}\n{"user_id": "u", "item_id": "d"}\n'
    )
    rows, report = read_interactions(path)
    assert [(each.item_id, each.timestamp) for each in rows] == [("a", 0), ("d", 1)]
    assert [each.line for each in report.problems] == [2, 3]
    rows, report = read_interactions(path, InteractionColumns(timestamp="timestamp"))
    assert [(each.item_id, each.timestamp) for each in rows] == [("b", 1)]


def test_without_a_clock_it_is_told_and_how_to_name_one(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,seen_at\nu,b,5\nu,a,3\n")
    rows, report = read_interactions(path)
    assert [each.item_id for each in histories(rows)[UserId("u")]] == ["b", "a"]
    assert "the order of the rows stands for it; columns: 'user_id', 'item_id', 'seen_at'" in report.notes[0]
    assert "--time-field" in report.notes[0]
    rows, report = read_interactions(path, InteractionColumns(timestamp="seen_at"))
    assert [each.item_id for each in histories(rows)[UserId("u")]] == ["a", "b"]
    assert report.notes == ()
    path.write_text("user_id,item_id,timestamp\nu,b,5\nu,a,3\n")
    rows, report = read_interactions(path, InteractionColumns(timestamp=NO_CLOCK))
    assert ([each.item_id for each in histories(rows)[UserId("u")]], report.notes) == (["b", "a"], ())


@pytest.mark.parametrize("header", ["userId,itemId,time", "User-ID,ISBN,date", "session_id,artist_id,timestamp"])
def test_usual_names_are_tried_and_told(tmp_path: Path, header: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"{header}\nu,b,5\n")
    rows, report = read_interactions(path)
    assert rows == [row("u", "b", 5)]
    assert "the user was taken from the column" in report.notes[0]


def test_a_choice_between_columns_is_left_to_the_user(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,artist_id,track_id,timestamp\nu,7,9,1\n")
    with pytest.raises(DataError, match=r"expected one field with the item, got 'artist_id', 'track_id'; say which"):
        read_interactions(path)
    assert read_interactions(path, InteractionColumns(item_id="track_id"))[0] == [row("u", "9", 1)]


def test_ids_that_pandas_made_floats_are_read_as_the_catalogue_spells_them(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n1.0,10.0,1\n2.0,11.0,2\n2.0,12.0,3\n")
    rows, report = read_interactions(path, items={ItemId("10"), ItemId("11")})
    assert rows == [row("1", "10", 1), row("2", "11", 2)]
    assert report.rows_skipped == 1
    assert len(report.notes) == 2
    assert "(rows: 2)" in report.notes[1]
    assert read_interactions(path, items={ItemId("10.0"), ItemId("11.0")})[0] == [
        row("1", "10.0", 1),
        row("2", "11.0", 2),
    ]
    assert [each.item_id for each in read_interactions(path)[0]] == ["10", "11", "12"]


def test_versions_are_no_floats(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,1.0,1\nu,1.1,2\n")
    assert [each.item_id for each in read_interactions(path)[0]] == ["1.0", "1.1"]


def test_one_name_in_two_spellings_is_a_choice_too(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("userId,USER-ID,item_id,timestamp\nu,v,b,1\n")
    with pytest.raises(DataError, match="expected one field with the user, got 'userId', 'USER-ID'; say which"):
        read_interactions(path)
