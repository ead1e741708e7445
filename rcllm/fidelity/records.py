"""What one configuration answered to one request, and the file that keeps such records, so that work is resumable.

Knows nothing of engines and never imports torch. Invariant: the file grows by whole lines only. A line that a kill
tore is dropped when the file is opened again. A record is found under exactly the key that it was stored under.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from blake3 import blake3

from rcllm.core.ranking import Event, Item, ItemId, Level, RankOptions, RankRequest, Selection
from rcllm.errors import DataError, ModelError
from rcllm.fields import parse
from rcllm.plain_json import read_object, to_json


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way of answering. What has no effect at its level or read-out is at its default, so that equals are equal."""

    context: str  # canonical context of the reused blocks; "" where none is reused
    options: RankOptions

    @classmethod
    def of(cls, context: str, options: RankOptions) -> Configuration:
        defaults = RankOptions()
        if options.readout != "label":
            options = replace(options, label_place=defaults.label_place, parallel=defaults.parallel)
        if options.level.name != "corrected":
            options = replace(options, selection=Selection())
        if options.level.name in ("full", "exact"):  # whatever the history mode: only exact prefixes are read
            options, context = replace(options, history=defaults.history), ""
        return cls(context, options)

    @property
    def full(self) -> Configuration:
        """Full recompute of the same prompts: what this one is held against."""
        return Configuration.of("", replace(self.options, level=Level("full")))

    @property
    def exact(self) -> Configuration:
        """Prefix caching of the same prompts."""
        return Configuration.of("", replace(self.options, level=Level("exact")))

    @property
    def setting(self) -> Configuration:
        """The same without the choice of level: what a calibration's rungs are rungs of."""
        return Configuration(self.context, replace(self.options, level=Level("auto"), selection=Selection()))

    def to_json(self) -> dict[str, Any]:
        return {"context": self.context, "options": asdict(self.options) | {"level": str(self.options.level)}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Configuration:
        """Raises ConfigError for options that are not there."""
        return parse(cls, value, where)

    @property
    def level_name(self) -> str:
        """For people: `tail(0.1)`, `corrected(0.3, 0.3) by two_pass`."""
        level = self.options.level
        return f"{level} by {self.options.selection.policy}" if level.name == "corrected" else str(level)

    @property
    def prompt_name(self) -> str:
        """For people: read-out, layout, label place, and the context of what is reused."""
        label = f"label {self.options.label_place}" if self.options.readout == "label" else ""
        context = f"context {self.context}" if self.context else ""
        return ", ".join(filter(None, (self.options.readout, self.options.layout, label, context)))

    def __str__(self) -> str:
        return f"{self.level_name}, {self.prompt_name}"


@dataclass(frozen=True, slots=True)
class Record:
    """One answer, reduced to what measures need."""

    request: str  # fingerprint, see `request_fingerprint`
    scores: tuple[float, ...]  # per candidate, in the order asked
    positive: int | None  # the candidate that the user chose; None where it is not known
    num_tokens: int
    num_fresh: int
    flops: float  # of the layers and the read-out, for the fresh tokens alone
    seconds: float | None = None  # wall time where the request was ranked alone on a warm cache


def request_fingerprint(request: RankRequest, catalogue: Mapping[ItemId, Item]) -> str:
    """32 hex digits that change with anything that the request's prompt is made from, its options apart."""
    named = [_item(item_id, request, catalogue) for item_id in request.candidates]
    events = [_event_text(event, request, catalogue) for event in request.history]
    parts = [
        [[item.item_id, dict(item.fields), dict(item.volatile)] if item else None for item in named],
        events,
        {item_id: dict(texts) for item_id, texts in sorted(request.volatile.items())},
        request.candidates,
        request.positive,
    ]
    return blake3(json.dumps(parts, ensure_ascii=False).encode("utf-8")).hexdigest(16)


def _item(item_id: ItemId, request: RankRequest, catalogue: Mapping[ItemId, Item]) -> Item | None:
    """As the prompt shows it: the request's own text of it, or else the catalogue's."""
    return Item(item_id, request.texts[item_id]) if item_id in request.texts else catalogue.get(item_id)


def _event_text(event: Event, request: RankRequest, catalogue: Mapping[ItemId, Item]) -> object:
    item = _item(event.item_id, request, catalogue) if event.item_id is not None else None
    return [event.item_id, event.text, dict(item.fields) if item else None]


class RecordFile:
    """Records by key, appended to a JSON-lines file as they come. A context manager; `path` None keeps them in memory.

    Raises DataError for a file that cannot be read or written, or that is no such file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RecordFile:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.ExitStack() as stack:
                    self._file = stack.enter_context(self.path.open("a+b"))
                    self._read(self._file)
                    stack.pop_all()  # stays open until __exit__
            except OSError as error:
                raise DataError(f"{self.path}: cannot be used to keep what is measured: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def all(self) -> Mapping[str, Record]:
        """Every record, by key."""
        return dict(self._records)

    def add(self, key: str, record: Record) -> None:
        line = _line(key, record)
        self._records[key] = record
        if self._file is not None:
            self._file.write(line)
            self._file.flush()

    def _read(self, file: IO[bytes]) -> None:
        file.seek(0)
        whole = 0  # bytes up to the end of the last whole line
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                value = read_object(line, "", DataError)
                key = str(value.pop("key"))
                self._records[key] = parse(Record, value, error=DataError)
            except (KeyError, DataError) as error:
                raise DataError(
                    f"{self.path}, line {number}: expected a record of `rcllm calibrate`, got {line[:60]!r} ({error}); "
                    "give another file, or remove this one"
                ) from error
            whole += len(line)
        file.truncate(whole)


def _line(key: str, record: Record) -> bytes:
    """Raises ModelError for scores that are not numbers: no measure means anything for them."""
    try:
        return to_json({"key": key} | asdict(record)).encode() + b"\n"
    except ValueError as error:
        wrong = "the model gave scores that are not numbers; its weights or their data type are broken"
        raise ModelError(wrong) from error
