"""Interaction logs: configurable columns, clocks of several kinds, and histories in order of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.core.ranking import Interaction, ItemId, UserId
from rcllm.data import InteractionColumns, Table, histories, read_interactions, read_users
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
    path.write_text("userid,item_id,timestamp\nu,b,1\n")
    with pytest.raises(DataError, match=r"expected a field 'user_id', got only 'userid'.*Did you mean 'userid'"):
        read_interactions(path)


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
    assert report.problems[0].reason == "expected a list of item ids in 'items', got 'a'"


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
