"""Parquet: times that Python cannot hold, values that pandas would make its own, and files that are broken."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcllm.data import Catalogue, histories, read_interactions
from rcllm.data.files import Row, iter_rows
from rcllm.errors import DataError

NS = 1_700_000_000_123_456_789
WHEN = datetime(2023, 11, 14, 22, 13, 20, 123456)


def write(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def fields(path: Path) -> list[dict[str, object]]:
    rows = list(iter_rows(path))
    assert all(isinstance(row, Row) for row in rows)
    return [dict(row.fields) for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (pa.timestamp("ns"), NS, WHEN),
        (pa.list_(pa.timestamp("ns")), [NS], [WHEN]),
        (pa.large_list(pa.timestamp("ns")), [NS], [WHEN]),
        (pa.list_(pa.timestamp("ns"), 1), [NS], [WHEN]),
        (pa.struct([("at", pa.timestamp("ns"))]), {"at": NS}, {"at": WHEN}),
        (pa.map_(pa.string(), pa.timestamp("ns")), [("x", NS)], [("x", WHEN)]),
        (pa.duration("ns"), 1_001, timedelta(microseconds=1)),
        (pa.timestamp("ms"), 253_402_300_800_000, "10000-01-01 00:00:00.000"),
        (pa.list_(pa.timestamp("ms")), [253_402_300_800_000], ["10000-01-01 00:00:00.000"]),
        (pa.struct([("at", pa.timestamp("ms"))]), {"at": 253_402_300_800_000}, {"at": "10000-01-01 00:00:00.000"}),
    ],
)
def test_times_of_any_kind(tmp_path: Path, kind: pa.DataType, value: object, wanted: object) -> None:
    path = write(tmp_path / "x.parquet", item_id=pa.array(["a", "b"]), when=pa.array([value, None], kind))
    assert fields(path) == [{"item_id": "a", "when": wanted}, {"item_id": "b", "when": None}]
    assert len(Catalogue.read(path)[0]) == 2


def test_a_text_that_is_not_utf_8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"caf\xc3\xa9", b"caf\xe9"], pa.binary()).view(pa.string())
    path = write(tmp_path / "x.parquet", item_id=pa.array(["a", "b"]), title=raw)
    catalogue, report = Catalogue.read(path)
    assert list(catalogue) == ["a"]
    assert "row 2: expected UTF-8 in 'title'" in str(report)


@pytest.mark.parametrize("keep", [3, 100, 0.5, 0.9])
def test_a_file_that_breaks_off_names_itself(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "x.parquet", item_id=pa.array([f"i{n}" for n in range(500)]))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"x\.parquet: expected a parquet file"):
        Catalogue.read(path)


def test_a_file_with_flipped_bytes_never_ends_in_a_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", item_id=pa.array([f"i{n}" for n in range(50)]), n=pa.array(range(50)))
    whole = path.read_bytes()
    refused = [message for at in range(4, len(whole) - 8, 7) if (message := refusal(path, flipped(whole, at)))]
    assert len(refused) > 10
    assert all("x.parquet" in message for message in refused)


def flipped(whole: bytes, at: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        Catalogue.read(path)
    except DataError as error:
        return str(error)
    return ""


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["item_id", "item_id"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="expected each column once, got 'item_id' twice"):
        Catalogue.read(tmp_path / "x.parquet")


def test_ids_that_pandas_made_floats_are_whole_and_those_that_lost_digits_are_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet", user_id=pa.array([1.0, 2.0, 2.0**53]), history=pa.array([[10.0, 11.0], [10.0], [10.0]])
    )
    rows, report = read_interactions(path)
    assert {user: [row.item_id for row in found] for user, found in histories(rows).items()} == {
        "1": ["10", "11"],
        "2": ["10"],
    }
    assert "row 3: expected an id (text or whole number) in 'user_id'" in str(report)
    assert "does not tell one id from the next" in str(report)
