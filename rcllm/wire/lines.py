"""Requests from a file with the line each stood on, and answers back as JSON lines.

Knows nothing of engines. Invariant: every row comes out once, as a request or as a failure with its line; scores that
are not numbers never become an answer.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from rcllm.core.decoding import RecommendRequest, RecommendResponse
from rcllm.core.ranking import ItemId, RankOptions, RankRequest, RankResponse
from rcllm.data import Problem
from rcllm.data.files import iter_rows
from rcllm.data.ids import read_ids
from rcllm.data.raw import Fields
from rcllm.durable import write, writing
from rcllm.errors import DataError, ModelError, RcllmError
from rcllm.plain_json import to_json, without_nan
from rcllm.wire.answer_file import FAILED, LINE
from rcllm.wire.requests import DEFAULTS, parse_request

R = TypeVar("R")  # a request
STDIO = "-"


@dataclass(frozen=True, slots=True)
class RequestLine(Generic[R]):
    number: int  # from 1; the row in parquet
    request: R


@dataclass(frozen=True, slots=True)
class Failure:
    """A row or request that could not be answered."""

    number: int
    request_id: str | None  # None: the row was not even a request
    error: str


@dataclass(frozen=True, slots=True)
class RequestFile(Generic[R]):
    """Requests in a file, read anew by each loop over them, so that memory does not grow with their number."""

    name: str  # as the user knows it
    path: Path
    parse: Callable[[Fields], R]  # raises RcllmError

    def __iter__(self) -> Iterator[RequestLine[R] | Failure]:
        for row in iter_rows(self.path):
            if isinstance(row, Problem):
                yield Failure(row.line, None, row.reason)
                continue
            fields = {name: value for name, value in row.fields.items() if value is not None}  # parquet has all columns
            try:
                yield RequestLine(row.line, self.parse(fields))
            except RcllmError as error:
                request_id = fields.get("request_id")
                yield Failure(row.line, request_id if isinstance(request_id, str) else None, str(error))

    @property
    def good(self) -> Iterator[RequestLine[R]]:
        """Those that could be read."""
        return (line for line in self if isinstance(line, RequestLine))

    def count(self, *, strict: bool = False) -> int:
        """How many rows there are. Raises DataError for none and, where `strict`, for the first that is no request."""
        total = 0
        for line in self:
            total += 1
            if strict and isinstance(line, Failure):
                raise DataError(f"{self.name}, line {line.number}: {line.error}")
        if not total:
            raise DataError(f"{self.name}: expected requests, one JSON object per line, got an empty file")
        return total


@contextlib.contextmanager
def opened_requests(path: str, parse: Callable[[Fields], R]) -> Iterator[RequestFile[R]]:
    """The requests in `path`, or of stdin for `-`, as JSON lines; other formats by the name's end."""
    if path != STDIO:
        yield RequestFile(path, Path(path), parse)
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield RequestFile("stdin", Path(copy.name), parse)


def read_lines(path: str, defaults: RankOptions = DEFAULTS) -> list[RequestLine[RankRequest] | Failure]:
    """All ranking requests of `path`, or of stdin for `-`.

    `defaults`: what holds for options that a request leaves out. Raises DataError for no rows.
    """
    with opened_requests(path, partial(parse_request, defaults=defaults)) as requests:
        requests.count()
        return list(requests)


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


def response_to_json(response: RankResponse, *, receipts: bool = False) -> Mapping[str, object]:
    """What `rcllm rank` writes of a response. Raises ModelError where a score is no number."""
    receipt = response.receipt
    _check_numbers(response.request_id, response.scores)
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
    return answer | {"receipt": without_nan(asdict(receipt))} if receipts else answer


def failure_to_json(failure: Failure) -> Mapping[str, object]:
    return {"request_id": failure.request_id, LINE: failure.number, FAILED: failure.error}


def _check_numbers(request_id: str, scores: Sequence[float]) -> None:
    """Raises ModelError for scores that no order means anything for, and that JSON has no word for."""
    if wrong := sum(not math.isfinite(score) for score in scores):
        raise ModelError(
            f"request {request_id!r}: the model gave scores that are not numbers for {wrong:,} of {len(scores):,} "
            "items; its weights or their data type are broken"
        )


def write_figures(out: str, figures: Mapping[str, object]) -> None:
    """One JSON line, to stdout or to a file that is whole or not there; null is what could not be measured."""
    line = to_json(without_nan(figures)) + "\n"
    if out == STDIO:
        print(line, end="", flush=True)
        return
    with writing(Path(out)):
        write(Path(out), line.encode())


def without_history(request: RecommendRequest) -> RecommendRequest:
    """The same request, which none of the items in its own history may answer."""
    seen = tuple(event.item_id for event in request.history if event.item_id is not None)
    return replace(request, deny=(*request.deny, *seen))


def read_item_ids(path: Path) -> tuple[ItemId, ...]:
    """An item id per line, see `read_ids`. Raises DataError."""
    return tuple(map(ItemId, read_ids(path)))


def recommendation_to_json(response: RecommendResponse, *, receipts: bool = False) -> Mapping[str, object]:
    """What `rcllm recommend` writes of a response. Raises ModelError where a score is no number."""
    receipt = response.receipt
    _check_numbers(response.request_id, response.scores)
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
    if receipt.knn:
        answer["knn"] = receipt.knn
    if receipt.notes:
        answer["notes"] = list(receipt.notes)
    return answer | {"receipt": without_nan(asdict(receipt))} if receipts else answer
