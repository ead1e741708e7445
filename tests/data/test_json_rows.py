"""JSON in the shapes that published catalogues have: lines, lists, one object by id, Python literals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rcllm.data import Catalogue, histories, load_dataset, read_interactions
from rcllm.errors import DataError

ITEMS = {"7": {"title": "A", "genres": {"x": 1}}, "9": {"title": "B"}}


@pytest.mark.parametrize("indent", [None, 4])
def test_an_object_by_id_is_a_catalogue(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "X.item.json"
    path.write_text(json.dumps(ITEMS, indent=indent))
    catalogue, report = Catalogue.read(path)
    assert {item_id: item.fields["title"] for item_id, item in catalogue.items()} == {"7": "A", "9": "B"}
    assert "its names were read as the ids" in report.notes[0]


def test_a_repeated_id_is_a_malformed_entry(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"7": {"title": "A"},\n "7": {"title": "B"}, "8": 5}')
    catalogue, report = Catalogue.read(path)
    assert [item.fields["title"] for item in catalogue.values()] == ["A"]
    assert [problem.place for problem in report.problems] == ["entry 2", "entry 3"]


def test_an_object_of_lists_is_a_log(tmp_path: Path) -> None:
    (tmp_path / "X.item.json").write_text(json.dumps(ITEMS))
    (tmp_path / "X.inter.json").write_text('{"u": [7, 9, 7], "v": ["9"]}')
    rows, _ = read_interactions(tmp_path / "X.inter.json")
    assert {user: [row.item_id for row in found] for user, found in histories(rows).items()} == {
        "u": ["7", "9", "7"],
        "v": ["9"],
    }
    dataset = load_dataset("auto", tmp_path)
    assert dataset.interactions == tuple(rows)
    assert dataset.notes == ("the folder was read as lc_rec, because of X.inter.json",)


def test_one_line_of_json_lines_is_still_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"item_id": "a", "title": "A"}\n')
    assert list(Catalogue.read(path)[0]) == ["a"]
    path.write_text('{"item_id": "a", \n{"item_id": "b"}\n')
    catalogue, report = Catalogue.read(path)
    assert (list(catalogue), report.rows_skipped) == (["b"], 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"7": {"title": "A"}\n}\n{\n"8": {"title": "B"}\n}', "line 4: .* after its end; write one object per line"),
        ('[{"item_id": "a"}]\n[{"item_id": "b"}]', "line 2: .* after its end"),
        ('{\n"7": {"title": "A"},\n"8"', "line 3: expected a JSON object of objects"),
        ('{\n"7": {"title": "A"}\n"8": {}}', "line 3: .*no comma"),
    ],
)
def test_nothing_after_the_end_vanishes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        Catalogue.read(path)


def test_an_object_with_many_names_is_not_listed_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({f"name{n}": 1 for n in range(17)}) + "\n")
    with pytest.raises(DataError, match=r"got only 'name0', .*'name7' and 9 more; name the right one \(--id-field"):
        Catalogue.read(path)


def test_python_literals_are_read_and_told(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    path.write_text(
        "{'item_id': '1', 'title': \"Kid's \\d\", 'price': 9.5}\n{'item_id': '2', 'x': open('y')}\n"
        '{"item_id": "3"}\n' + "{'item_id': '4', 'x': '" + "x" * 2**20 + "'}\n"
    )
    catalogue, report = Catalogue.read(path)
    assert list(catalogue) == ["1", "3"]
    assert catalogue["1"].fields == {"title": "Kid's \\d", "price": "9.5"}  # type: ignore[index]
    assert [problem.line for problem in report.problems] == [2, 4]
    assert "Python literals" in report.notes[0]


def test_blanks_in_a_list_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + " " * 5_000_000 + '{"item_id": "a"}]')
    assert list(Catalogue.read(path)[0]) == ["a"]
