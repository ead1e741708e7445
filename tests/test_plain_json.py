"""JSON that strict readers, line readers and terminals take, and what is said of files that hold none."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.errors import DataError, ModelError
from rcllm.plain_json import as_json, read_json, read_json_if_there, read_object, to_json, without_nan

TEXTS = st.text(st.characters(codec=None, categories=None), max_size=20)


@given(TEXTS)
def test_one_line_that_reads_back_and_steers_no_terminal(text: str) -> None:
    line = to_json({"title": text})
    assert json.loads(line)["title"] == text
    assert len(line.splitlines()) == 1
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E for c in line)
    line.encode("utf-8")  # also where a text holds half a surrogate pair


def test_letters_stay_letters() -> None:
    assert to_json({"title": "Žižek 北京 🦆"}) == '{"title": "Žižek 北京 🦆"}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_or_null(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": [value]})
    assert to_json(without_nan({"a": (1.5, [value]), "b": "NaN"})) == '{"a": [1.5, [null]], "b": "NaN"}'


@dataclass(frozen=True)
class Figures:
    best: float
    curve: tuple[float, ...]


def test_a_dataclass_comes_back_as_a_file_would_give_it() -> None:
    assert as_json(Figures(math.nan, (1.0, math.inf))) == {"best": None, "curve": [1.0, None]}


def test_files_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_json_if_there(path) == {}
    with pytest.raises(ModelError, match=r"config.json is missing; expected a Hugging Face model folder$"):
        read_json(path)
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')  # as Windows editors save
    assert read_json(path) == read_json_if_there(path) == {"a": 1}


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_text("no", encoding="utf-8")
    with pytest.raises(ModelError, match=r"expected the folder of an adapter, and .*model is a file"):
        read_json(file / "config.json", "the folder of an adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read as JSON"), (b"[1]", "got list"), (b"", "fetch it again"), (b"\xff\xfe{", "fetch it again")],
)
def test_what_is_no_json_object_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{path}.*{message}"):
        read_json(path)
    with pytest.raises(ModelError):
        read_json_if_there(path)


def test_the_error_is_the_callers() -> None:
    with pytest.raises(DataError, match=r"^line 3: expected a JSON object, got null$"):
        read_object("null", "line 3", DataError)
