"""Catalogues of semantic IDs through files, and what a malformed file says."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.codes.index import CodeIndex
from rcllm.codes.sid_files import parse_tokens, read_codes, token, write_codes
from rcllm.codes.updates import Update
from rcllm.core.ranking import ItemId
from rcllm.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def _items(code_index: CodeIndex) -> dict[str, tuple[int, ...]]:
    return dict(zip(code_index.item_ids, map(tuple, code_index.codes.tolist()), strict=True))


@st.composite
def code_indexes(draw: st.DrawFn) -> CodeIndex:
    num_levels = draw(st.integers(2, 6))
    code = st.tuples(*[st.integers(0, 300)] * num_levels)
    item_id = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda t: t == t.strip())
    items = draw(st.dictionaries(item_id, code, min_size=1, max_size=10))
    return CodeIndex.build(np.array(list(items.values())), [ItemId(name) for name in items], (301,) * num_levels)


@given(code_indexes())
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(code_index: CodeIndex) -> None:
    off = code_index.changed(Update(enabled={code_index.item_ids[0]: False}))
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in [("a.json", ""), ("b.json", "flashrec"), ("c.parquet", "")]:
            path = Path(folder) / name
            write_codes(path, off, layout)
            back = read_codes(path, code_index.sizes)
            assert _items(back) == _items(code_index)
            assert layout == "flashrec" or back.item_ids == code_index.item_ids
            assert back.enabled.tolist() == (off.enabled.tolist() if name == "c.parquet" else [True] * back.num_items)
        assert len(list(Path(folder).iterdir())) == 3


def test_sizes_are_those_of_the_file_or_as_given(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"x": ["<a_3>", "<b_0>"], "y": ["<a_1>", "<b_9>"]}')
    assert read_codes(path).sizes == (4, 10)
    assert read_codes(path, (256, 256)).sizes == (256, 256)
    with pytest.raises(DataError, match=r"index\.json: item 'y': expected a code from 0 to 4 at level 1, got 9"):
        read_codes(path, (5, 5))


@given(st.lists(st.integers(0, 9999), min_size=2, max_size=6))
@settings(deadline=None)
def test_tokens_are_read_back(codes: list[int]) -> None:
    assert parse_tokens("".join(token(level, code) for level, code in enumerate(codes))) == tuple(codes)
    assert parse_tokens("".join(f"<s_{chr(97 + level)}_{code}>" for level, code in enumerate(codes))) == tuple(codes)


@pytest.mark.parametrize("text", ["", "<a_1><c_2>", "<b_1>", "<a_1>x<b_2>", "<a_x>", "<a_-1>", "12"])
def test_tokens_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a token for each level"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (
            {"1,2,3": [{"pid": 7}, {"pid": "8"}], "1,2,4": [{"iid": 9}]},
            {"7": (1, 2, 3), "8": (1, 2, 3), "9": (1, 2, 4)},
        ),
        ({"1,2,3": ["x", "y"], "0, 0, 0": 5}, {"x": (1, 2, 3), "y": (1, 2, 3), "5": (0, 0, 0)}),
        ({"1,2,3,1": 1, "4,5,6,1": 1}, {"1,2,3,1": (1, 2, 3, 1), "4,5,6,1": (4, 5, 6, 1)}),
        ([[1, 2], [3, 4]], {"1,2": (1, 2), "3,4": (3, 4)}),
        ({str((5 * 8192 + 6) * 8192 + 7): ["x"]}, {"x": (5, 6, 7)}),
    ],
)
def test_shapes_of_flashrec(tmp_path: Path, content: object, wanted: dict[str, tuple[int, ...]]) -> None:
    path = tmp_path / "sid2pid.json"
    path.write_text(json.dumps(content))
    assert _items(read_codes(path)) == wanted


def test_items_whose_ids_are_numbers_are_not_taken_for_codes(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"0": ["<a_1>", "<b_2>"], "1": ["<a_3>", "<b_4>"]}')
    assert _items(read_codes(path)) == {"0": (1, 2), "1": (3, 4)}


def test_rows_of_other_shapes(tmp_path: Path) -> None:
    wanted = {"x": (1, 2, 3), "y": (4, 5, 6)}
    pq.write_table(
        pa.table({"item_id": ["x", "y"], "level_0": [1, 4], "level_1": [2, 5], "level_2": [3, 6]}),
        tmp_path / "a.parquet",
    )
    (tmp_path / "b.csv").write_text("item_id,code_0,code_1,code_2\nx,1,2,3\ny,4,5,6\n")
    rows = [{"item_id": "x", "sid": ["<a_1>", "<b_2>", "<c_3>"]}, {"item_id": "y", "codes": "<a_4><b_5><c_6>"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "b.csv", "c.jsonl"):
        assert _items(read_codes(tmp_path / name)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", r"a\.json: expected JSON, got: .*line 1"),
        ("a.json", "3", r"a\.json: expected a JSON object or list"),
        ("a.json", "{}", "expected items, got none"),
        ("a.json", '{"x": ["<a_1>", "<b_2>"], "x": ["<a_1>", "<b_2>"]}', "the name 'x' twice"),
        ("a.json", '{"x": ["<a_1>", "<c_2>"]}', r"a\.json, item 'x': expected a token for each level"),
        ("a.json", '{"x": 5}', r"a\.json, item 'x': expected a list of tokens"),
        ("a.json", '{"x": ["<a_1>"]}', r"item 'x': expected 2 to 6 codes, got 1"),
        ("a.json", '{"x": ["<a_1>", "<b_2>"], "y": ["<a_1>", "<b_2>", "<c_3>"]}', "'y': expected 2 codes as the first"),
        ("a.json", '{"1,2": ["x"], "1,3": ["x"]}', "got item 'x' twice"),
        ("a.json", '{"1,2": [{"name": "x"}]}', r"key '1,2': expected items as ids"),
        ("a.json", '{"1,": ["x"]}', r"key '1,': expected codes with commas"),
        ("a.json", '{"1 2,3": ["x"]}', r"key '1 2,3': expected codes with commas"),
        ("a.json", '{"' + "9" * 5000 + '": ["x"]}', r"key '999.*…': expected codes with commas"),
        ("a.csv", "item_id,level_0,level_1,enabled\nx,1,2,maybe\n", r"line 2: expected true or false in enabled"),
        ("a.json", '{"1,2": ["x"], "9999999999999": ["y"]}', "packed in base 8192"),
        ("a.json", '[[1, "2"]]', r"entry 1: expected a list of codes"),
        ("a.jsonl", '{"item_id": "x", "codes": [1, 2]}\n{"item_id": "y"}\n', r"l, line 2: expected a column codes"),
        ("a.jsonl", '{"codes": [1, 2]}\n', r"line 1: expected a column item_id"),
        ("a.jsonl", '{"item_id": "x", "codes": [1, 2.5]}\n', r"line 1: expected a whole number as a code, got 2\.5"),
        ("a.jsonl", '{"item_id": "x", "codes": [1, -2]}\n', r"item 'x': expected codes from 0 to .*got \(1, -2\)"),
        ("a.json", '{"1,99999999999999999999": ["x"]}', r"item 'x': expected codes from 0 to"),
        ("a.jsonl", "nothing\n", r"line 1: expected a JSON object"),
        ("a.csv", "item_id,level_0,level_1\nx,1,two\n", r"line 2: expected a whole number as a code, got 'two'"),
    ],
)  # fmt: skip
def test_malformed_files_say_where_and_what(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_codes(tmp_path / name)


def test_missing_files_and_unknown_layouts(tmp_path: Path) -> None:
    for name in ("none.json", "none.parquet"):
        with pytest.raises(DataError, match="none"):
            read_codes(tmp_path / name)
    code_index = CodeIndex.build(np.zeros((1, 2), np.int32), [ItemId("x")], (1, 1))
    with pytest.raises(ConfigError, match="a layout of index, flashrec, parquet"):
        write_codes(tmp_path / "a.txt", code_index)


def test_numbers_that_pandas_made_floats_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("item_id,level_0,level_1\nx,1.0,2.0\n")
    pq.write_table(pa.table({"item_id": [10.0], "level_0": [1.0], "level_1": [2.0]}), tmp_path / "b.parquet")
    assert _items(read_codes(tmp_path / "a.csv")) == {"x": (1, 2)}
    assert _items(read_codes(tmp_path / "b.parquet")) == {"10": (1, 2)}


def test_items_that_text_files_disable_are_disabled(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("item_id,level_0,level_1,enabled\na,1,2,False\nb,1,3,true\nc,1,4,0\nd,1,5,\n")
    assert read_codes(path).enabled.tolist() == [False, True, False, True]


def test_packed_files_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b'{"x": ["<a_1>", "<b_2>"]}'
    (tmp_path / "a.index.json").write_bytes(content)
    (tmp_path / "b.index.json.gz").write_bytes(gzip.compress(content))
    for name in ("a.index.json", "b.index.json.gz"):
        assert _items(read_codes(tmp_path / name)) == {"x": (1, 2)}


@pytest.mark.parametrize(
    ("name", "num_items", "num_levels", "num_collided"),
    [
        ("amazon_scientific/sid/Scientific.rqvae_zcr.index.json", 4344, 4, 0),
        ("amazon_scientific/sid/Scientific.rkmeans_native.index.json", 4344, 4, None),
        ("yelp/sid/Yelp.rqvae_zcr.index.json", 20033, 4, 0),
        ("amazon_industrial/items.jsonl", 3686, 3, None),
    ],
)
def test_real_files(tmp_path: Path, name: str, num_items: int, num_levels: int, num_collided: int | None) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"needs the real file {name} in shared/data beside the repository")
    code_index = read_codes(SHARED / name)
    assert (code_index.num_items, code_index.num_levels) == (num_items, num_levels)
    collided = code_index.stats().num_collided
    assert collided > 0 if num_collided is None else collided == num_collided
    write_codes(tmp_path / "a.json", code_index)
    if name.endswith(".index.json"):
        assert json.loads((tmp_path / "a.json").read_text()) == json.loads((SHARED / name).read_text())
