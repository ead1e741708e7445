"""Requests from a file with the line each stood on, and answers back as JSON lines.

Knows nothing of engines. Invariant: every row comes out once, as a request or as a failure with its line; an output
file is whole or not there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId, RankOptions, RankRequest, RankResponse
from rcllm.data import Problem
from rcllm.data.files import iter_rows
from rcllm.data.ids import read_ids
from rcllm.data.raw import Row
from rcllm.durable import renamed
from rcllm.errors import DataError, RcllmError
from rcllm.wire.requests import DEFAULTS, parse_recommend_request, parse_request

STDIO = "-"


@dataclass(frozen=True, slots=True)
class RequestLine:
    number: int  # from 1; the row in parquet
    request: RankRequest


@dataclass(frozen=True, slots=True)
class Failure:
    """A row or request that could not be answered."""

    number: int
    request_id: str | None  # None: the row was not even a request
    error: str


def read_lines(path: str, defaults: RankOptions = DEFAULTS) -> list[RequestLine | Failure]:
    """Reads `path`, or stdin for `-`, as JSON lines; other formats by the name's end.

    `defaults`: what holds for options that a request leaves out. Raises DataError for no rows.
    """
    lines = list(_parse(rows_of(path), defaults))
    if not lines:
        raise DataError(f"{path}: expected requests, one JSON object per line, got an empty file")
    return lines


def one_line(where: str, defaults: RankOptions = DEFAULTS) -> RankRequest:
    """The request at `FILE` (the first) or `FILE:N` (the one on line N). Raises DataError where there is none."""
    path, _, suffix = where.rpartition(":")
    number = int(suffix) if path and suffix.isdecimal() and not Path(where).exists() else None
    path = path if number is not None else where
    lines = read_lines(path, defaults)
    found = lines[0] if number is None else next((line for line in lines if line.number == number), None)
    if found is None:
        raise DataError(
            f"{path}: expected a request on line {number}, got none; its last is on line {lines[-1].number}"
        )
    if isinstance(found, Failure):
        raise DataError(f"{path}, line {found.number}: {found.error}")
    return found.request


def rows_of(path: str) -> Iterator[Row | Problem]:
    """Rows of a file, or of stdin for `-`, as JSON lines; other formats by the name's end."""
    if path != STDIO:
        yield from iter_rows(Path(path))
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        copy.write(sys.stdin.buffer.read())
        copy.flush()
        yield from iter_rows(Path(copy.name))


def _parse(rows: Iterable[Row | Problem], defaults: RankOptions) -> Iterator[RequestLine | Failure]:
    for row in rows:
        if isinstance(row, Problem):
            yield Failure(row.line, None, row.reason)
            continue
        fields = {name: value for name, value in row.fields.items() if value is not None}  # parquet has all columns
        try:
            yield RequestLine(row.line, parse_request(fields, defaults))
        except RcllmError as error:
            request_id = fields.get("request_id")
            yield Failure(row.line, request_id if isinstance(request_id, str) else None, str(error))


def response_to_json(response: RankResponse, *, receipts: bool = False) -> Mapping[str, object]:
    """What `rcllm rank` writes of a response."""
    receipt = response.receipt
    scores: dict[str, float] = {}
    for index in response.order:
        scores.setdefault(response.candidates[index], response.scores[index])
    answer: dict[str, object] = {
        "request_id": response.request_id,
        "ranking": list(response.ranking),
        "scores": scores,
        "level": receipt.level,
        "readout": receipt.readout,
        "tokens_fresh": receipt.num_fresh,
        "tokens_reused": receipt.num_reused,
        "tokens_computed": receipt.num_computed,
        "ms": round(receipt.stage_ms["total"], 3),
        "batch_size": receipt.batch_size,
    }
    return answer | {"receipt": asdict(receipt)} if receipts else answer


def failure_to_json(failure: Failure) -> Mapping[str, object]:
    return {"request_id": failure.request_id, "line": failure.number, "error": failure.error}


@contextlib.contextmanager
def writer(out: str) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Writes objects as JSON lines: to stdout at once, or to a file that appears when all are written."""

    def line(value: Mapping[str, object]) -> str:
        return json.dumps(value, ensure_ascii=False) + "\n"

    if out == STDIO:
        yield lambda value: print(line(value), end="", flush=True)
        return
    try:
        with renamed(Path(out)) as partial, partial.open("w", encoding="utf-8") as file:
            yield lambda value: print(line(value), end="", file=file)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}") from error


@dataclass(frozen=True, slots=True)
class RecommendLine:
    number: int  # from 1; the row in parquet
    request: RecommendRequest


def read_recommend_lines(path: str, defaults: RecommendRequest) -> list[RecommendLine | Failure]:
    """Reads `path`, or stdin for `-`. `defaults`: what holds for what a request leaves out. Raises DataError."""
    lines: list[RecommendLine | Failure] = []
    for row in rows_of(path):
        if isinstance(row, Problem):
            lines.append(Failure(row.line, None, row.reason))
            continue
        fields = {name: value for name, value in row.fields.items() if value is not None}  # parquet has all columns
        try:
            lines.append(RecommendLine(row.line, parse_recommend_request(fields, defaults)))
        except RcllmError as error:
            request_id = fields.get("request_id")
            lines.append(Failure(row.line, request_id if isinstance(request_id, str) else None, str(error)))
    if not lines:
        raise DataError(f"{path}: expected requests, one JSON object per line, got an empty file")
    return lines


def without_history(line: RecommendLine) -> RecommendLine:
    """The same request, which none of the items in its own history may answer."""
    seen = tuple(event.item_id for event in line.request.history if event.item_id is not None)
    return replace(line, request=replace(line.request, deny=(*line.request.deny, *seen)))


def read_item_ids(path: Path) -> tuple[ItemId, ...]:
    """An item id per line, see `read_ids`. Raises DataError."""
    return tuple(map(ItemId, read_ids(path)))


def recommendation_to_json(response: RecommendResponse, *, receipts: bool = False) -> Mapping[str, object]:
    """What `rcllm recommend` writes of a response."""
    receipt = response.receipt
    answer: dict[str, object] = {
        "request_id": response.request_id,
        "items": list(response.items),
        "scores": [round(score, 6) for score in response.scores],
        "epoch": receipt.epoch,
        "tokens_fresh": receipt.num_fresh,
        "tokens_reused": receipt.num_reused,
        "ms": round(receipt.stage_ms["total"], 3),
        "batch_size": receipt.batch_size,
    }
    return answer | {"receipt": asdict(receipt)} if receipts else answer
