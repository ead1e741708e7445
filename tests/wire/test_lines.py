"""Requests from files: read as they come, each with its line."""

import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from rcllm.core.ranking import RankRequest
from rcllm.errors import DataError
from rcllm.wire.lines import Failure, RequestFile, opened_requests, read_lines
from rcllm.wire.requests import parse_request
from tests.cli.conftest import write_lines


def test_memory_does_not_grow_with_the_number_of_requests(tmp_path: Path) -> None:
    rows = [{"request_id": f"r{n}", "candidates": [f"i{n}-{k}" for k in range(50)]} for n in range(2000)]
    path = write_lines(tmp_path / "many.jsonl", rows)
    parse_request(rows[0])  # the first check imports pydantic, which is not meant here
    with opened_requests(str(path), parse_request) as requests:
        tracemalloc.start()
        assert requests.count() == sum(1 for _ in requests.good) == 2000
        _, streamed = tracemalloc.get_traced_memory()
        kept = read_lines(str(path))
        _, whole = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(kept) == 2000
    assert streamed < whole / 10


def test_each_loop_reads_the_file_anew(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "some.jsonl", [{"request_id": "a", "candidates": ["x"]}, {"request_id": "b"}])
    requests: RequestFile[RankRequest] = RequestFile("some", path, partial(parse_request))
    first, second = requests
    assert not isinstance(first, Failure)
    assert first.request.candidates == ("x",)
    assert isinstance(second, Failure)
    assert (second.number, second.request_id) == (2, "b")
    assert [line.number for line in requests] == [1, 2]
    assert requests.count() == 2
    with pytest.raises(DataError, match="some, line 2: "):
        requests.count(strict=True)
