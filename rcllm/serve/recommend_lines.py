"""Requests for recommendations from a file with the line each stood on, lists of items, and answers as JSON lines.

Knows nothing of engines. Invariant: every row comes out once, as a request or as a failure with its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rcllm.core import ItemId
from rcllm.data import Problem
from rcllm.data.request_file import parse_recommend_request
from rcllm.decoding import RecommendRequest, RecommendResponse
from rcllm.errors import DataError, RcllmError
from rcllm.serve.request_lines import Failure, rows_of


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
    """An item id per line. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file with an item id per line: {error}") from error
    return tuple(ItemId(line.strip()) for line in lines if line.strip())


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
