"""A describing job that SIGKILL ends in a process of its own goes on in another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcllm.describe.job import DescribeOptions, describe
from rcllm.describe.profiles import Profile
from tests.describe.fake_writer import FakeWriter
from tests.describe.test_job import NOW, PROVENANCE, _read
from tests.killed import run_killed

OPTIONS = DescribeOptions(batch=2, checkpoint_every=3)
_JOB = """
from pathlib import Path
from rcllm import durable
from rcllm.describe import checkpoint
from rcllm.describe.job import describe
from tests.describe.fake_writer import FakeWriter
from tests.describe.test_job import NOW, PROVENANCE
from tests.describe.test_killed import OPTIONS, profiles
{patch}
describe(lambda after: profiles()[after:], FakeWriter(), OPTIONS, Path({out!r}), PROVENANCE, now=lambda: NOW)
"""


def profiles() -> list[Profile]:
    return [Profile(n, f"ü{n}", ()) for n in range(1, 12)]


@pytest.mark.parametrize(
    ("patch", "num_done"),
    [
        ("checkpoint._write_table = die_at(3, checkpoint._write_table, after=True)", 6),  # written, not yet renamed
        ("checkpoint.JobCheckpoint.finish = die_at(1, checkpoint.JobCheckpoint.finish)", 11),
        ("checkpoint._join = die_at(1, checkpoint._join, after=True)", 11),
    ],
    ids=["in a part", "before joining", "while joining"],
)
def test_a_killed_process_loses_no_part(tmp_path: Path, patch: str, num_done: int) -> None:
    def run(out: Path) -> int:
        report = describe(lambda after: profiles()[after:], FakeWriter(), OPTIONS, out, PROVENANCE, now=lambda: NOW)
        return report.num_resumed

    assert run(tmp_path / "whole.parquet") == 0
    out = tmp_path / "out.parquet"
    run_killed(_JOB.format(patch=patch, out=str(out)))
    assert not out.exists()
    assert run(out) == num_done
    assert _read(out) == _read(tmp_path / "whole.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "whole.parquet"]
