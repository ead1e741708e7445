"""Outputs and work folders that hold something else, or half of what they should: errors that say what to remove."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcllm.describe.checkpoint import JobCheckpoint
from rcllm.errors import ConfigError, DataError, RcllmError
from tests.describe.fake_writer import FakeWriter
from tests.describe.test_job import _describe, _Dying, _Killed, _read, _rows


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Of a job that died after two parts of five rows."""
    path = tmp_path / "out.parquet"
    with pytest.raises(_Killed):
        _describe(path, _Dying(12))
    assert len(list(tmp_path.glob("out.parquet.work/part-*"))) == 2
    return path


def _junk(path: Path) -> None:
    path.write_bytes(b"PAR1 this is not parquet PAR1")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def _other_meta(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"rcllm.describe": b'{"done": {"num_dogs": 3}}'}), path)


def _no_json(path: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"rcllm.describe": b"\xff{"}), path)


BREAKS = (_junk, _half, _empty, _foreign, _other_meta, _no_json)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_part_is_named(out: Path, broken: Callable[[Path], None]) -> None:
    broken(out.with_name("out.parquet.work") / "part-000001.parquet")
    writer = FakeWriter()
    with pytest.raises(
        DataError, match=r"part-000001\.parquet: expected what `rcllm describe` writes.*out\.parquet\.work"
    ):
        _describe(out, writer)
    assert not writer.written
    assert not out.exists()


@pytest.mark.parametrize("at", [30, 60, 200])
def test_a_changed_byte_is_found_before_the_output_is_written(out: Path, at: int) -> None:
    part = out.with_name("out.parquet.work") / "part-000000.parquet"
    content = bytearray(part.read_bytes())
    content[at] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"part-000000\.parquet is damaged.*begin anew"):
        _describe(out, FakeWriter())
    assert not out.exists()


def test_a_part_that_was_removed_does_not_give_its_name_to_the_next(out: Path) -> None:
    work = out.with_name("out.parquet.work")
    (work / "part-000000.parquet").unlink()
    with pytest.raises(DataError, match=r"expected part-000000\.parquet, got part-000001\.parquet: a part was removed"):
        _describe(out, FakeWriter())


@pytest.mark.parametrize("broken", BREAKS)
def test_an_output_that_is_not_ours_stays(tmp_path: Path, broken: Callable[[Path], None]) -> None:
    out = tmp_path / "out.parquet"
    _describe(out, FakeWriter())
    broken(out)
    before = out.read_bytes()
    with pytest.raises(RcllmError, match=r"out\.parquet.*remove"):
        _describe(out, FakeWriter())
    assert out.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[1]", '"batch"', "null", "{}"])
def test_settings_that_cannot_be_read_are_refused(out: Path, text: str) -> None:
    settings = out.with_name("out.parquet.work") / "settings.json"
    settings.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"out\.parquet\.work (exists and is not|was begun with other settings)"):
        _describe(out, FakeWriter())


def test_a_folder_in_the_place_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "out.parquet").mkdir()
    with pytest.raises(ConfigError, match="exists and is not of `rcllm describe`"):
        _describe(tmp_path / "out.parquet", FakeWriter())


def test_a_file_in_the_place_of_the_work_folder(tmp_path: Path) -> None:
    (tmp_path / "out.parquet.work").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be written"):
        _describe(tmp_path / "out.parquet", FakeWriter())
    assert (tmp_path / "out.parquet.work").read_text(encoding="utf-8") == "mine"


def test_a_job_of_another_model_catalogue_or_input_does_not_go_on(out: Path) -> None:
    for settings in ({"catalogue": "0123"}, {"config": "other model"}, {"input": "other rows"}):
        writer = FakeWriter()
        with pytest.raises(ConfigError, match="was begun with other settings"):
            _describe(out, writer, settings=settings)
        assert not writer.written
    assert _describe(out, FakeWriter()).num_resumed == 10


def test_the_first_rejects_are_told_and_a_lost_file_of_them_is_not_missed(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    report = _describe(out, FakeWriter(), rows=_rows(12, bad=(2, 3, 5, 7, 11)))
    assert [(each.row, each.reason) for each in report.first_rejects] == [(n, "expected sense") for n in (2, 3, 5)]
    assert report.done.num_rejects == 5
    assert len(_read(out)) == 7
    rejects = tmp_path / "out.rejects.jsonl"
    rejects.write_text('{"dogs": 3}\n', encoding="utf-8")
    with _again(out) as checkpoint:
        assert checkpoint.first_rejects(3) == ()
        rejects.unlink()
        assert checkpoint.first_rejects(3) == ()


def _again(out: Path) -> JobCheckpoint:
    settings = json.loads(pq.read_schema(out).metadata[b"rcllm.describe"])["settings"]
    return JobCheckpoint(out, settings)
