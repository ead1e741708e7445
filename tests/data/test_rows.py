"""Raw rows: every layout streams the same rows, and each malformed row is counted with its line."""

from __future__ import annotations

import builtins
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcllm.data import BadRowError, ReadReport, RowReader, Table
from rcllm.data.files import Fields
from rcllm.data.rows import required_id, required_number, required_time
from rcllm.data.text import as_id, as_seconds, as_text, did_you_mean, listed
from rcllm.errors import ConfigError, DataError

ROWS: list[dict[str, object]] = [{"id": "a", "note": 'says "hi", twice'}, {"id": "b", "note": "žluťoučký\nkůň"}]


def same(fields: Fields) -> dict[str, object]:
    return dict(fields)


def read(path: Path, *, strict: bool = False, table: Table | None = None) -> tuple[list[str], ReadReport]:
    reader = RowReader(path, strict=strict, table=table)
    return list(reader.parsed(lambda fields: required_id(fields, "id"))), reader.report


def problems(report: ReadReport) -> list[int]:
    return [problem.line for problem in report.problems]


CSV = 'id,note\r\na,"says ""hi"", twice"\r\nb,"žluťoučký\nkůň"\r\n'
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", JSONL),
        ("x.ndjson", "\ufeff" + JSONL),
        ("x.json", JSONL),
        ("x.json", json.dumps(ROWS)),
        ("x.json", "\n " + json.dumps(ROWS, indent=2)),
        ("x.csv", CSV),
        ("x.csv", "\ufeff" + CSV + "\n\n"),
        ("x.tsv", CSV.replace(",", "\t", 1).replace("a,", "a\t").replace("b,", "b\t")),
    ],
)
def test_every_text_layout_gives_the_same_rows_plain_and_gzipped(tmp_path: Path, name: str, content: str) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_bytes(content.encode())
    packed.write_bytes(gzip.compress(content.encode()))
    for path in (plain, packed):
        reader = RowReader(path, strict=True)
        assert list(reader.parsed(same)) == ROWS
        assert (reader.report.rows_read, reader.report.rows_skipped) == (2, 0)


def test_parquet_keeps_types_and_counts_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    when = datetime(2024, 1, 31, 9, 30, tzinfo=UTC)
    columns = {
        "id": pa.array(["a", None, "c"]),
        "tags": pa.array([["x", None, "y"], [], None]),
        "when": pa.array([when] * 3, type=pa.timestamp("ns", tz="UTC")),
        "price": pa.array([12.0, 0.1, float("nan")]),
    }
    pq.write_table(pa.table(columns), path)
    rows = list(RowReader(path).parsed(same))
    assert [as_text(row["tags"]) for row in rows] == ["x, y", "", ""]
    assert [as_text(row["price"]) for row in rows] == ["12", "0.1", ""]
    assert required_time(rows[0], "when") == when.timestamp()
    ids, report = read(path)
    assert (ids, problems(report), report.rows_skipped) == (["a", "c"], [2], 1)
    assert "row 2: expected an id (text or whole number) in 'id', got null" in str(report)
    with pytest.raises(DataError, match=r"x\.parquet, row 2: expected an id"):
        read(path, strict=True)


def test_a_file_that_is_not_parquet_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("id\na\n")
    with pytest.raises(DataError, match="expected a parquet file"):
        read(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    path.touch()
    real: Callable[..., object] = builtins.__import__

    def no_pyarrow(name: str, *rest: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(DataError, match=r"rcllm\[data\]"):
        read(path)


JSONL_WITH_PROBLEMS = b'{"id": "a"}\n\n{"id": \n[1, 2]\n{"id": "b"}\n{"name": "c"}\n{"id": "\xff"}\n{"id": ""}\n"d"\n'


def test_malformed_json_lines_are_reported_by_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(JSONL_WITH_PROBLEMS)
    ids, report = read(path)
    assert ids == ["a", "b"]
    assert problems(report) == [3, 4, 6, 7, 8, 9]
    assert (report.rows_read, report.rows_skipped) == (2, 6)
    told = [problem.reason for problem in report.problems]
    assert told[0].startswith("expected a JSON object, got '{\"id\":'")
    assert told[1] == "expected a JSON object, got a list of 2"
    assert told[2] == "expected a field 'id', got only 'name'."
    assert told[3] == "expected UTF-8, got invalid start byte at byte 9"
    assert told[4] == "expected an id (text or whole number) in 'id', got ''"
    assert told[5] == "expected a JSON object, got 'd'"
    assert str(report).splitlines()[0] == f"{path}: 2 rows read, 6 skipped"
    with pytest.raises(DataError, match=r"x\.jsonl, line 3: expected a JSON object, got"):
        read(path, strict=True)


def test_malformed_csv_rows_are_reported_by_the_line_they_start_on(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes('id,n\na,"two\nlinés"\nb\nc,1,2\nd,"x"y\ne,'.encode() + b"\xff\nf,1\n")
    ids, report = read(path)
    assert ids == ["a", "f"]
    assert problems(report) == [4, 5, 6, 7]
    assert report.problems[0].reason == "expected 2 columns ('id', 'n'), got 1: 'b'"
    assert "expected utf-8" in report.problems[3].reason
    with pytest.raises(DataError, match=r"x\.csv, line 4: expected 2 columns"):
        read(path, strict=True)


def test_a_quote_that_never_closes_is_a_problem_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('id,n\na,1\nb,"open\nc,2\nd,"x"\ne,"open\nf,"open\ng,3\n')
    ids, report = read(path)
    assert (ids, problems(report)) == (["a", "c", "d", "g"], [3, 6, 7])
    assert report.rows_skipped == 3
    assert "up to line 5" in report.problems[0].reason


def test_unquoted_tables_take_any_delimiter_and_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes('a::caf\xe9 "noir\nb::x::y\nc::z\n'.encode("latin-1"))
    table = Table("::", quoted=False, header=("id", "name"), encoding="latin-1")
    ids, report = read(path, table=table)
    assert (ids, problems(report)) == (["a", "c"], [2])
    names = [fields["name"] for fields in RowReader(path, table=table).parsed(same)]
    assert names == ['café "noir', "z"]
    _, report = read(path, table=Table("::", quoted=False, header=("id", "name"), encoding="utf-8"))
    assert problems(report) == [1, 2]


def test_a_delimiter_of_two_characters_needs_an_unquoted_table() -> None:
    with pytest.raises(ConfigError, match="quoted=False"):
        Table("::")


def test_repeated_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,id\n1,2\n")
    with pytest.raises(DataError, match="line 1: expected each column once, got 'id' twice"):
        read(path)


def test_json_list_elements_are_reported_by_number_and_a_broken_list_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[\n {"id": "a"},\n 7,\n {"id": "b"}\n]\n')
    ids, report = read(path)
    assert (ids, problems(report)) == (["a", "b"], [2])
    assert "entry 2: expected a JSON object, got 7" in str(report)
    for broken, line in [
        ('[{"id": "a"},\n{"id": ', 2),
        ('[{"id": "a"}\n{"id": "b"}]', 2),
        ('[\n\n{"id": "a"}', 3),
        ('[{"id": 1}]\n{"id": 2}', 2),
    ]:
        path.write_text(broken)
        with pytest.raises(DataError, match=rf"x\.json, line {line}: expected a JSON list"):
            read(path)


def test_the_report_keeps_the_first_problems_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1}\n' + "no\n" * 30)
    _, report = read(path)
    assert (report.rows_skipped, len(report.problems)) == (30, 20)
    assert str(report).endswith("… and 10 more")


def test_a_file_without_a_usable_row_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("uid,name\n1,x\n2,y\n")
    with pytest.raises(DataError, match=r"none of its 2 rows could be used.*line 2: expected a field 'id'.*'uid'"):
        read(path)
    path.write_text("")
    assert read(path) == ([], ReadReport(path, 0, 0))


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").touch()
    with pytest.raises(DataError, match=r"no such file; check the path.*Did you mean 'items\.jsonl'\?"):
        read(tmp_path / "item.jsonl")
    with pytest.raises(DataError, match="expected a file, got a folder"):
        read(tmp_path)
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(DataError, match=r"ends in one of \.jsonl, .*got '\.xlsx'"):
        read(tmp_path / "x.xlsx")


def test_a_gzip_file_that_breaks_off_is_an_error_even_if_not_strict(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress("".join(f'{{"id": "{number * 7919 % 5003}"}}\n' for number in range(5000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="breaks off"):
        read(path)


def test_reading_streams(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\nno\n')
    reader = RowReader(path)
    rows = reader.parsed(lambda fields: required_id(fields, "id"))
    assert next(rows) == "1"
    assert reader.report == ReadReport(path, 1, 0)
    assert list(rows) == ["2"]
    assert reader.report.rows_skipped == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (" a ", "a"),
        (3, "3"),
        (3.0, "3"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (1234567.5, "1234567.5"),
        (1e15, "1000000000000000"),
        (float("nan"), ""),
        (True, "true"),
        (["a", None, 2.0, ["b"], ""], "a, 2, b"),
        ({"Size": "7 oz", "Color": None}, "Size: 7 oz"),
        (b"caf\xc3\xa9", "café"),
        (datetime(2024, 1, 31), "2024-01-31T00:00:00"),
    ],
)
def test_values_become_plain_text(value: object, text: str) -> None:
    assert as_text(value) == text


def test_times_are_utc_where_they_name_no_zone() -> None:
    assert as_seconds("1970-01-02") == 86400
    assert as_seconds("1970-01-01 00:00:01") == 1
    assert as_seconds("1970-01-01T01:00:00+01:00") == 0
    assert as_seconds("yesterday") is None
    assert as_seconds(None) is None


@pytest.mark.parametrize("value", [None, "x", "nan", "inf", True, [1], {}])
def test_what_is_not_a_number_is_refused(value: object) -> None:
    with pytest.raises(BadRowError, match="expected a number in 'n', got"):
        required_number({"n": value}, "n")
    with pytest.raises(BadRowError, match="expected a time"):
        required_time({"n": value}, "n")


def test_half_letters_become_a_mark_that_can_be_written() -> None:
    assert as_text("a\ud83d b") == "a\ufffd b"
    assert as_text("\ud83d\ude00") == "😀"
    assert as_id("u\ud83d") == "u\ufffd"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (" a ", "a"),
        (7, "7"),
        (7.0, "7"),
        (Decimal("7.00"), "7"),
        (b"x", "x"),
        (7.5, None),
        (2.0**53, None),
        (float("nan"), None),
        (True, None),
        (None, None),
        ("", None),
        ("x" * 20_000, None),
        (["a"], None),
    ],
)
def test_what_is_an_id(value: object, wanted: str | None) -> None:
    assert as_id(value) == wanted


def test_lists_that_are_cut_say_how_many_more() -> None:
    assert listed("abc") == "'a', 'b', 'c'"
    assert listed(map(str, range(11)), 2) == "'0', '1' and 9 more"


def test_a_huge_name_has_no_near_ones() -> None:
    assert did_you_mean("x" * 5_000_000, ["x" * 4_999_999, "y"]) == ""
