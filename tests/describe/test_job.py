"""The job's account of what is done: parts, resuming, refusing, and what a full disk or a bad row does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rcllm import durable
from rcllm.core.decoding import Speculation
from rcllm.core.ranking import Event, ItemId
from rcllm.describe import checkpoint
from rcllm.describe.job import Answer, Progress, Provenance, Report, describe, row_seed
from rcllm.describe.options import DescribeOptions
from rcllm.describe.options import check_options as check
from rcllm.describe.profiles import Profile, Reject
from rcllm.errors import ConfigError, DataError
from tests.describe.fake_writer import FakeWriter

PROVENANCE = Provenance("abc", "describe_user 1 def", "0.1.0")
SMALL = DescribeOptions(batch=3, checkpoint_every=5)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class _Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


def _rows(count: int, bad: Sequence[int] = ()) -> Callable[[int], Iterable[Profile | Reject]]:
    def rows(after: int) -> Iterable[Profile | Reject]:
        for n in range(after + 1, count + 1):
            if n in bad:
                yield Reject(n, None, "expected sense")
            else:
                yield Profile(n, f"u{n}", (Event(ItemId("i")),) * (1 + n % 3))

    return rows


def _describe(out: Path, writer: FakeWriter, count: int = 23, options: DescribeOptions = SMALL, **more: Any) -> Report:
    rows = more.pop("rows", _rows(count))
    return describe(rows, writer, options, out, PROVENANCE, now=lambda: NOW, **more)


def _read(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def test_every_row_comes_out_once_with_its_provenance(tmp_path: Path) -> None:
    told: list[Progress] = []
    report = _describe(tmp_path / "out.parquet", FakeWriter(), on_progress=told.append)
    rows = _read(tmp_path / "out.parquet")
    assert [row["row"] for row in rows] == list(range(1, 24))
    assert rows[0]["user_id"] == "u1"
    assert rows[2]["text"].startswith("u3 likes 1 things, 0 ")
    assert (rows[0]["num_tokens"], rows[0]["num_passes"], rows[0]["accepted_len"]) == (12, 4, 3.0)
    assert (rows[0]["model"], rows[0]["template"], rows[0]["speculation"]) == ("abc", "describe_user 1 def", "strict")
    assert rows[0]["described_at"] == NOW
    assert len({row["seed"] for row in rows}) == 23
    assert (report.done.num_profiles, report.done.num_parts, report.num_resumed, report.rejects) == (23, 5, 0, None)
    assert report.done.num_divergences == sum(row["num_divergences"] for row in rows) > 0
    assert [each.num_profiles for each in told] == list(range(1, 24))
    assert [each.done.num_parts for each in told] == [n // 5 for n in range(23)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    noted = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"rcllm.describe"])
    assert (noted["settings"]["batch"], noted["done"]["num_profiles"]) == (3, 23)


@pytest.mark.parametrize("step", ["write", "commit", "pools", "finish", "rename", "sync", "remove", "removing"])
def test_a_job_that_is_killed_anywhere_ends_as_one_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rows = _rows(23, bad=(4, 11, 12, 23))
    _describe(tmp_path / "whole.parquet", FakeWriter(), rows=rows, pools=tmp_path / "whole.pools")
    out, pools = tmp_path / "out.parquet", tmp_path / "out.pools"
    kills = 0
    homes = {
        "write": (FakeWriter, "write"),
        "commit": (checkpoint.JobCheckpoint, "commit"),
        "pools": (FakeWriter, "save"),
        "finish": (checkpoint.JobCheckpoint, "finish"),
        "rename": (checkpoint, "_write_table"),
        "sync": (durable, "_sync"),
        "remove": (checkpoint.JobCheckpoint, "remove_work"),
        "removing": (checkpoint, "remove"),
    }
    home, name = homes[step]
    for allowed in range(1, 200):
        with monkeypatch.context() as patched:
            _kill_at(patched, home, name, allowed)
            try:
                _describe(out, FakeWriter(), rows=rows, pools=pools)
                break
            except _Killed:
                kills += 1
    assert kills
    report = _describe(out, FakeWriter(), rows=rows, pools=pools)  # nothing is left to do
    assert report.done.num_profiles == 19
    assert _read(out) == _read(tmp_path / "whole.parquet")
    assert out.with_name("out.rejects.jsonl").read_bytes() == (tmp_path / "whole.rejects.jsonl").read_bytes()
    assert len(out.with_name("out.rejects.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert (pools / "state.json").read_bytes() == (tmp_path / "whole.pools" / "state.json").read_bytes()
    left = {path.name for path in tmp_path.iterdir()}  # and nothing of the work
    assert left == {f"{job}.{end}" for job in ("out", "whole") for end in ("parquet", "pools", "rejects.jsonl")}


def _kill_at(patched: pytest.MonkeyPatch, home: Any, name: str, call: int) -> None:
    """The process dies in the `call`th call of `name`: before what it does, or, at every second try, after."""
    real, calls = getattr(home, name), [0]

    def killing(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] < (call + 1) // 2:
            return real(*given, **named)
        if call % 2 == 0:
            real(*given, **named)
        raise _Killed

    patched.setattr(home, name, killing)


def test_resuming_loses_none_of_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    first = _Dying(12)
    with pytest.raises(_Killed):
        _describe(out, first)
    second = FakeWriter()
    report = _describe(out, second)
    assert report.num_resumed == 10
    assert sorted(second.written) == sorted(f"u{n}" for n in range(11, 24))
    assert report.rate.num_profiles == 13


class _Dying(FakeWriter):
    def __init__(self, answers: int) -> None:
        super().__init__()
        self._left = answers

    def write(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        for each in super().write(profiles, seeds):
            self._left -= 1
            if self._left < 0:
                raise _Killed
            yield each


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"options": replace(SMALL, max_tokens=7)}, "max_tokens was 120, is 7"),
        ({"options": replace(SMALL, speculation=Speculation("none"))}, "speculation was 'strict'"),
        ({"settings": {"input": "other"}}, "input was None, is 'other'"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], told: str, finished: bool) -> None:
    out = tmp_path / "out.parquet"
    if finished:
        _describe(out, FakeWriter())
    else:
        with pytest.raises(_Killed):
            _describe(out, _Dying(8))
    writer = FakeWriter()
    with pytest.raises(ConfigError, match=f"{told}.*to begin anew"):
        _describe(out, writer, **change)
    assert not writer.written


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not of `rcllm describe`"):
        _describe(out, FakeWriter())
    assert out.read_text(encoding="utf-8") == "mine"


def test_two_jobs_do_not_write_one_output(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"

    class Second(FakeWriter):
        def write(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
            with pytest.raises(ConfigError, match="another process is writing it"):
                _describe(out, FakeWriter())
            return super().write(profiles, seeds)

    _describe(out, Second())


def test_limit_and_an_output_that_is_done(tmp_path: Path) -> None:
    options = DescribeOptions(batch=3, checkpoint_every=5, limit=7)
    writer = FakeWriter()
    report = _describe(tmp_path / "out.parquet", writer, options=options)
    assert len(writer.written) == report.done.num_profiles == 7
    again = FakeWriter()
    assert _describe(tmp_path / "out.parquet", again, options=options).done == report.done
    assert not again.written


def test_bad_rows_are_told_apart_and_strict_stops_at_the_first(tmp_path: Path) -> None:
    def rows(after: int) -> Iterable[Profile | Reject]:
        all_rows = [Profile(1, "a", ()), Reject(2, None, "expected sense"), Profile(3, "long", ()), Profile(4, "b", ())]
        return [row for row in all_rows if row.row > after]

    report = _describe(tmp_path / "out.parquet", FakeWriter(), rows=rows)
    assert [row["user_id"] for row in _read(tmp_path / "out.parquet")] == ["a", "b"]
    assert report.rejects is not None
    rejects = [json.loads(line) for line in report.rejects.read_text(encoding="utf-8").splitlines()]
    assert [(each["row"], each["name"]) for each in rejects] == [(2, None), (3, "long")]
    assert "needs 99 positions" in rejects[1]["reason"]
    with pytest.raises(DataError, match="row 2: expected sense"):
        _describe(tmp_path / "strict.parquet", FakeWriter(), rows=rows, strict=True)


def test_nothing_to_describe(tmp_path: Path) -> None:
    for rows, told in ((_rows(0), "it is empty"), (_rows(2, bad=(1, 2)), "none of its 2 rows")):
        with pytest.raises(DataError, match=told):
            _describe(tmp_path / "out.parquet", FakeWriter(), rows=rows)
        assert not (tmp_path / "out.parquet").exists()


def test_a_full_disk_is_told_and_the_job_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _describe(tmp_path / "whole.parquet", FakeWriter())
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patched:
        real, calls = checkpoint._write_table, [0]

        def full(path: Path, *given: Any) -> None:
            calls[0] += 1
            if calls[0] == 3:
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            real(path, *given)

        patched.setattr(checkpoint, "_write_table", full)
        with pytest.raises(DataError, match=r"No space left on device.*run the same command again"):
            _describe(out, FakeWriter())
    assert not out.exists()
    assert _describe(out, FakeWriter()).num_resumed == 10
    assert _read(out) == _read(tmp_path / "whole.parquet")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    writer = FakeWriter()
    with pytest.raises(DataError, match="cannot be written"):
        _describe(tmp_path / "file" / "out.parquet", writer)
    assert not writer.written


def test_pools_of_earlier_jobs_are_the_beginning(tmp_path: Path) -> None:
    pools = tmp_path / "pools"
    _describe(tmp_path / "a.parquet", FakeWriter(), pools=pools)
    state = json.loads((pools / "state.json").read_text(encoding="utf-8"))
    _describe(tmp_path / "b.parquet", FakeWriter(), pools=pools)
    assert f", {state} " in _read(tmp_path / "b.parquet")[2]["text"]
    assert json.loads((pools / "state.json").read_text(encoding="utf-8")) != state


def test_seeds_are_each_rows_own() -> None:
    assert row_seed(0, "u1") == row_seed(0, "u1")
    assert len({row_seed(seed, name) for seed in range(3) for name in ("u1", "u2")}) == 6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"speculation": Speculation("relaxed", 2, 0.1), "temperature": 1.0}, "is for greedy decoding"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(DescribeOptions(**options))
