"""Delimited text: quotation marks, long cells, and layouts that are guessed and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.data import Catalogue, Table
from rcllm.errors import ConfigError


def titles(path: Path, table: Table | None = None) -> tuple[list[str], tuple[str, ...], int]:
    """What the items are called, what was noted, and how many rows were skipped."""
    catalogue, report = Catalogue.read(path, table=table)
    return [item.fields.get("title", "") for item in catalogue.values()], report.notes, report.rows_skipped


def test_in_tab_separated_text_a_quotation_mark_is_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('item_id\ttitle\tkind\n1\t"So it\tx\n2\tB\tx\n3\tend"\tx\n4\tan "old" one\tx\n5\t"Hm"\tx\n')
    assert titles(path) == (['"So it', "B", 'end"', 'an "old" one', '"Hm"'], (), 0)


@pytest.mark.parametrize(
    "content",
    ['item_id\ttitle\n1\t"say ""hi"""\n2\tB\n', '"item_id"\t"title"\n"1"\t"say ""hi"""\n"2"\t"B"\n'],
)
def test_tab_separated_text_that_a_csv_writer_quoted_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(content)
    found, notes, skipped = titles(path)
    assert (found, skipped) == (['say "hi"', "B"], 0)
    assert "cells were read as quoted" in notes[0]
    assert titles(path, Table("\t", quoted=True))[:2] == (['say "hi"', "B"], ())


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f'item_id,title\na,A\nb,"{"word " * 60_000}"\nc,C\n')
    found, notes, skipped = titles(path)
    assert ([len(each) for each in found], notes, skipped) == ([1, 299_999, 1], (), 0)


def test_an_open_quotation_mark_does_not_take_the_rest_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rcllm.data.delimited._MAX_CELL_LINES", 5)
    path = tmp_path / "x.csv"
    path.write_text('item_id,title\na,"A\n' + "".join(f"i{n},T\n" for n in range(20)))
    catalogue, report = Catalogue.read(path)
    assert (len(catalogue), report.rows_skipped) == (20, 1)
    assert "more than 5 lines in one row" in report.problems[0].reason


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolon"), ("\t", "tab"), ("|", "bar")])
def test_another_delimiter_is_found_and_told(tmp_path: Path, delimiter: str, name: str) -> None:
    path = tmp_path / "x.csv"
    rows = [("item_id", "title"), ("1", "one, and two"), ("2", "B")]
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    found, notes, _ = titles(path)
    assert found == ["one, and two", "B"]
    assert f"separated by a {name}" in notes[0]
    assert "--delimiter" in notes[0]
    assert titles(path, Table(delimiter))[:2] == (found, ())


def test_a_comma_stays_a_comma_where_rows_are_malformed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("item_id,title\n1,a;b\n2,c;d\n3\n4,e;f,g\n")
    assert titles(path) == (["a;b", "c;d"], (), 2)


def test_one_column_is_no_guess(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("item_id\na;1\nb|2\n")
    catalogue, report = Catalogue.read(path)
    assert (list(catalogue), report.notes) == (["a;1", "b|2"], ())


def test_books_with_semicolons_in_latin_1_and_escaped_marks(tmp_path: Path) -> None:
    path = tmp_path / "books.csv"
    lines = ['"ISBN";"title"', r'"1";"Caf' "\xe9" r' \"Noir\"; a tale"', '"2";"M\xfcller &amp; Sohn"', '"3";"C"']
    path.write_bytes("\r\n".join(lines).encode("latin-1"))
    found, notes, skipped = titles(path)
    assert (found, skipped) == (['Café "Noir"; a tale', "Müller &amp; Sohn", "C"], 0)
    told = " ".join(notes)
    for part in ("not UTF-8 and was read as cp1252", "semicolon", "have a \\ before", "from the column 'ISBN'"):
        assert part in told
    assert titles(path, Table(";", encoding="latin-1"))[0] == found


def test_utf_8_is_kept_where_one_line_alone_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("item_id,title\n1,é\n".encode() + b"2,\xe9\n3,C\n")
    catalogue, report = Catalogue.read(path)
    assert (list(catalogue), report.notes) == (["1", "3"], ())
    assert "line 3: expected utf-8" in str(report)


@pytest.mark.parametrize("table", [None, Table(encoding="utf-16")])
def test_wide_text_is_read(tmp_path: Path, table: Table | None) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("item_id,title\r\n1,é\r\n2,ω\r\n".encode("utf-16"))
    assert titles(path, table)[0] == ["é", "ω"]


def test_latin_1_letters_that_windows_lacks(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"item_id,title\n1,caf\xe9\n2,\x81\xe9\n")
    found, notes, _ = titles(path)
    assert found == ["café", "\x81é"]
    assert "latin-1" in notes[0]


def test_unknown_encodings_and_layouts_of_what_has_its_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the name of an encoding, .*got 'latin-99'"):
        Table(encoding="latin-99")
    path = tmp_path / "x.jsonl"
    path.write_text('{"item_id": "a"}\n')
    with pytest.raises(ConfigError, match=r"got \.jsonl, which needs none; leave out --delimiter"):
        Catalogue.read(path, table=Table(";"))


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",".join(["item_id", *(f"c{n}" for n in range(16))]) + "\na,1\nb" + ",1" * 16 + "\n")
    _, report = Catalogue.read(path)
    assert "expected 17 columns ('item_id', 'c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6' and 9 more)" in str(report)


def test_rows_that_a_quoted_cell_may_have_taken_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('item_id,title,kind\na,"So it,x\nb,goes",x\nc,C,x\n')
    found, notes, _ = titles(path)
    assert found == ["So it,x\nb,goes", "C"]
    assert "lines that look like rows of their own" in notes[0]
    assert titles(path, Table(",", quoted=False))[0] == ['"So it', 'goes"', "C"]
    path.write_text('item_id,title,kind\na,"So it\ngoes, on",x\nc,C,x\n')
    assert titles(path)[1] == ()
