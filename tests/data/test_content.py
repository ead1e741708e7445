"""The bytes of a file: compression is told by content, marks of byte order are no text, faults name the file."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from rcllm.data import Catalogue
from rcllm.data.content import text_lines
from rcllm.errors import DataError

LINE = b'{"item_id": "a", "title": "A"}\n'


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.JSONL.xz"])
def test_compression_is_told_by_the_first_bytes(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / name
    path.write_bytes(pack(LINE))
    assert list(Catalogue.read(path)[0]) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "expected text, .*got zip; unpack it"),
        (b"\x28\xb5\x2f\xfdrest", "got zstandard; unpack it"),
        (gzip.compress(LINE)[:20], "breaks off"),
        (lzma.compress(LINE)[:30], "breaks off"),
        (b"PAR1rest", "got parquet; rename it"),
        (b"\xff\xfea", "expected text in UTF-16"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jsonl: .*{message}"):
        Catalogue.read(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_what_an_editor_shows(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(end.join(["é1", " b 2 ", "", "c"]).encode(encoding))
    assert text_lines(path) == ["é1", "b 2", "c"]


def test_a_mark_in_the_middle_comes_from_files_that_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa\n" * 2)
    assert text_lines(path) == ["a", "a"]


def test_a_file_that_the_system_refuses_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINE)

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read: .*Permission denied"):
        Catalogue.read(path)
