"""The catalogue: fields become text, ids are unique, an unknown id is answered with the nearest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import Catalogue, Dataset, Table
from rcllm.errors import DataError, UnknownItemError

ROWS = [
    {"item_id": "b1", "title": "Drill", "tags": ["tool", None, "power"], "price": 20.0, "stock": None},
    {"item_id": 7, "title": "Saw ", "tags": [], "price": 9.5, "stock": 3},
]
EXPECTED = [
    Item(ItemId("b1"), {"title": "Drill", "tags": "tool, power"}, {"price": "20"}),
    Item(ItemId("7"), {"title": "Saw"}, {"price": "9.5", "stock": "3"}),
]


def write_jsonl(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "items.jsonl", *ROWS)
    catalogue, report = Catalogue.read(path, volatile_fields=("price", "stock"))
    assert list(catalogue.values()) == EXPECTED
    assert (report.path, report.rows_read, report.rows_skipped) == (path, 2, 0)


def test_reads_csv_with_another_delimiter_and_id_column(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text('sku;title;price\nb1;"Drill; small";20\n7;;\n')
    catalogue, _ = Catalogue.read(path, id_field="sku", volatile_fields=("price",), table=Table(";"))
    assert list(catalogue.values()) == [
        Item(ItemId("b1"), {"title": "Drill; small"}, {"price": "20"}),
        Item(ItemId("7"), {}),
    ]


def test_reads_parquet(tmp_path: Path) -> None:
    rows = [row | {"item_id": str(row["item_id"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    catalogue, _ = Catalogue.read(tmp_path / "items.parquet", volatile_fields=("price", "stock"))
    assert list(catalogue.values()) == EXPECTED


def test_a_repeated_id_is_a_malformed_row_and_the_first_stays(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "items.jsonl",
        {"item_id": "a", "title": "first"},
        {"item_id": "b"},
        {"item_id": "a", "title": "second"},
        {"title": "no id"},
    )
    catalogue, report = Catalogue.read(path)
    assert list(catalogue) == ["a", "b"]
    assert catalogue[ItemId("a")].fields == {"title": "first"}
    assert [(each.line, each.reason[:35]) for each in report.problems] == [
        (3, "expected a new item id, got 'a' aga"),
        (4, "expected a field 'item_id', got onl"),
    ]
    with pytest.raises(DataError, match=r"items\.jsonl, line 3: expected a new item id"):
        Catalogue.read(path, strict=True)


def test_an_unknown_id_names_the_nearest() -> None:
    catalogue = Catalogue(Item(ItemId(f"item-{number}"), {}) for number in range(100, 200))
    with pytest.raises(UnknownItemError, match=r"100 items has no item 'itm-150'. Did you mean .*'item-150'"):
        catalogue[ItemId("itm-150")]


def test_behaves_like_a_mapping() -> None:
    catalogue = Catalogue(EXPECTED)
    assert len(catalogue) == 2
    assert list(catalogue.items()) == [("b1", EXPECTED[0]), ("7", EXPECTED[1])]
    assert "b1" in catalogue
    assert "b2" not in catalogue
    assert catalogue.get(ItemId("b2")) is None
    assert catalogue.get(ItemId("b2"), 0) == 0
    assert catalogue.get(ItemId("7")) is EXPECTED[1]
    assert repr(catalogue) == "Catalogue(2 items)"


def test_a_constructed_catalogue_refuses_an_item_twice() -> None:
    with pytest.raises(DataError, match="'b1' twice"):
        Catalogue([EXPECTED[0], EXPECTED[0]])


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected items, got an empty file"):
        Catalogue.read(write_jsonl(tmp_path / "items.jsonl"))


def test_fields_from_columns_of_other_names(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "items.jsonl",
        {"item_id": "a", "Book-Title": "Orlando", "title": "a novel", "Cost": 7.5},
        {"item_id": "b", "title": "only its own"},
    )
    catalogue, _ = Catalogue.read(path, "item_id", ("price",), names={"title": "Book-Title", "price": "Cost"})
    assert catalogue[ItemId("a")] == Item(ItemId("a"), {"title": "Orlando"}, {"price": "7.5"})
    assert catalogue[ItemId("b")] == Item(ItemId("b"), {"title": "only its own"})


@pytest.mark.parametrize("given", [{"names": {"title": "Titel"}}, {"volatile_fields": ("Titel",)}])
def test_a_column_that_was_asked_for_by_name_must_be_there(tmp_path: Path, given: dict[str, Any]) -> None:
    """A regression: a misspelt volatile field was cached with the others, silently."""
    path = write_jsonl(tmp_path / "items.jsonl", {"item_id": "a", "Title": "Orlando"})
    with pytest.raises(DataError, match=r"no row has a column 'Titel'.*Did you mean 'Title'"):
        Catalogue.read(path, **given)


def test_a_data_sets_catalogue_knows_its_interactions() -> None:
    rows = (Interaction(UserId("u"), ItemId("a"), 0.0),)
    data = Dataset("shop", items := Catalogue([Item(ItemId("a"), {"title": "x"})]), rows)
    assert data.catalogue.interactions is rows
    assert data.catalogue == items
    assert items.interactions == (), "the one that was given is left alone"
    assert replace(data, interactions=()).catalogue.interactions == ()


def test_a_volatile_field_that_no_row_has_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "items.jsonl", {"item_id": "a", "price": 1}, {"item_id": "b", "stock": 2})
    assert Catalogue.read(path, volatile_fields=("price", "stock"))[1].notes == ()
    with pytest.raises(DataError, match=r"no row has a column 'prise'.* 'item_id', 'price'\. Did you mean 'price'"):
        Catalogue.read(path, volatile_fields=("prise", "stock"))


def test_the_usual_names_of_an_id_are_tried_and_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "items.jsonl", {"asin": "a", "title": "A"})
    catalogue, report = Catalogue.read(path)
    assert list(catalogue.values()) == [Item(ItemId("a"), {"title": "A"})]
    assert report.notes == ("the item's id was taken from the column 'asin' (--id-field names another)",)
    assert Catalogue.read(path, "asin")[1].notes == ()
    path = write_jsonl(tmp_path / "items.jsonl", {"asin": "a", "sku": "b"})
    with pytest.raises(DataError, match=r"expected one field with the item's id, got 'asin', 'sku'; say which \(--id"):
        Catalogue.read(path)


def test_ids_that_pandas_made_floats_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n10.0,A\n11.0,B\n")
    catalogue, report = Catalogue.read(path)
    assert list(catalogue) == ["10", "11"]
    assert "every id is a whole number written as a float" in report.notes[0]
    path.write_text("item_id,title\n10.0,A\n10.1,B\n")
    assert list(Catalogue.read(path)[0]) == ["10.0", "10.1"]


def test_one_huge_value_costs_no_more_than_reading_it(tmp_path: Path) -> None:
    huge = "word " * 1_000_000
    path = write_jsonl(tmp_path / "items.jsonl", {"item_id": "a", "title": huge}, {"item_id": huge}, {huge: "b"})
    catalogue, report = Catalogue.read(path)
    assert list(catalogue) == ["a"]
    assert report.rows_skipped == 2
    assert len(str(report)) < 2_000
    with pytest.raises(UnknownItemError) as told:
        catalogue[ItemId(huge)]
    assert len(str(told.value)) < 200
