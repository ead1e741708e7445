"""Reads the log of a service, request by request: which items each one asked for.

Knows nothing of what is made of it. Invariant: rows are streamed and counted one at a time; a row that cannot be used
is counted and told (`RowReader`), and so is an item that the catalogue lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rcllm.cluster.statistics import CollectConfig, Collector, IntArray, Requests, Statistics, ragged
from rcllm.core.ranking import ItemId
from rcllm.data.raw import Fields
from rcllm.data.rows import BadRowError, ReadReport, RowReader
from rcllm.data.text import as_id, listed, other_spelling
from rcllm.errors import DataError

_COLUMNS = ("candidates", "items", "history")  # that may hold what a request asked for, by preference


@dataclass(frozen=True, slots=True)
class LogReport:
    """How reading a log went."""

    rows: ReadReport
    num_requests: int
    num_unknown: int  # mentions of items that the catalogue lacks; they were left out
    num_pruned: int = 0  # pairs of items that were forgotten on the way, to bound memory


class RequestLog:
    """A log whose items get the numbers of a catalogue. `report` tells how reading went, once it is read."""

    def __init__(self, path: Path, item_ids: Sequence[ItemId]) -> None:
        self._reader = RowReader(path)
        self._numbers = {item_id: number for number, item_id in enumerate(item_ids)}
        self._num_requests = self._num_unknown = 0

    def __iter__(self) -> Iterator[IntArray]:
        """The items of each request, each once. Raises DataError where the file cannot be read on."""
        for named in self._reader.parsed(_asked):
            found = (self._number(each) for each in named)
            items = np.unique(np.array([number for number in found if number is not None], dtype=np.int64))
            self._num_unknown += len(named) - len(items)
            if len(items):
                self._num_requests += 1
                yield items

    @property
    def report(self) -> LogReport:
        return LogReport(self._reader.report, self._num_requests, self._num_unknown)

    def _number(self, item_id: str) -> int | None:
        number = self._numbers.get(ItemId(item_id))
        return self._numbers.get(ItemId(other_spelling(item_id))) if number is None else number


def _asked(fields: Fields) -> tuple[str, ...]:
    """The different items of a row. Raises BadRowError."""
    name = next((name for name in _COLUMNS if isinstance(fields.get(name), list)), None)
    if name is None:
        raise BadRowError(f"expected a list of item ids in {', '.join(_COLUMNS)}, got the columns {listed(fields)}")
    given = fields[name]
    assert isinstance(given, list)
    items = [as_id(each) for each in given]
    if not items or any(item is None for item in items):
        raise BadRowError(f"expected item ids in {name!r}, got {given!r}"[:200])
    return tuple(dict.fromkeys(item for item in items if item is not None))


def collect_log(
    path: Path, num_bytes: Mapping[ItemId, int], config: CollectConfig | None = None
) -> tuple[Statistics, LogReport]:
    """Statistics of a log of any length, for the items of `num_bytes`. Raises DataError where it names none of them."""
    item_ids = tuple(num_bytes)
    log, collector = RequestLog(path, item_ids), Collector(config)
    for items in log:
        collector.add(items)
    report = log.report
    if not report.num_requests:
        raise DataError(f"{path}: expected requests for items of the catalogue, got none; check that the ids agree")
    statistics = collector.finish(item_ids, list(num_bytes.values()))
    return statistics, LogReport(report.rows, report.num_requests, report.num_unknown, collector.num_pruned)


def read_requests(path: Path, item_ids: Sequence[ItemId]) -> tuple[Requests, LogReport]:
    """All requests of a log, in memory: to judge a placement by."""
    log = RequestLog(path, item_ids)
    requests = ragged(list(log))
    if not len(requests):
        raise DataError(f"{path}: expected requests for items of the placement, got none; check that the ids agree")
    return requests, log.report
