"""Records of a calibration from several processes: parts of its requests go out, and their records come back.

Knows nothing of how parts travel. Invariant: what the file of records has is in no part, so that a calibration that was
cut short goes on with any number of processes; a record is the one that the leading process would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rcllm.core.ranking import RankOptions, RankRequest
from rcllm.engine.engine import Engine
from rcllm.fidelity.evaluate import BATCH, evaluate, kept_already, with_context
from rcllm.fidelity.records import Record, RecordFile


@dataclass(frozen=True, slots=True)
class Part:
    """Some requests, under some options, in one canonical context. It is pickled."""

    context: str
    requests: tuple[RankRequest, ...]
    options: tuple[RankOptions, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a part: its records, by their keys."""

    records: Mapping[str, Record]
    count: int  # (request, options) pairs


Over = Callable[[Iterable[Part]], Iterator[Done]]


class Ahead:
    """Fills the file of records with what is about to be asked of it. `over`: works on parts, several at a time."""

    def __init__(self, over: Over, kept: RecordFile) -> None:
        self._over, self._kept = over, kept

    def run(
        self,
        engine: Engine,
        requests: Sequence[RankRequest],
        options: Sequence[RankOptions],
        on_records: Callable[[int], None],
    ) -> None:
        """`engine`: of the leading process, in the context that is asked for."""
        for done in self._over(self._parts(engine, requests, options)):
            for key, record in done.records.items():
                if key not in self._kept:
                    self._kept.add(key, record)
            on_records(done.count)

    def _parts(self, engine: Engine, requests: Sequence[RankRequest], options: Sequence[RankOptions]) -> Iterator[Part]:
        for start in range(0, len(requests), BATCH):
            some = tuple(requests[start : start + BATCH])
            missing = tuple(chosen for chosen in options if not kept_already(engine, some, chosen, self._kept))
            if missing:
                yield Part(engine.prompter.context_name, some, missing)


class Evaluating:
    """Works on parts with one engine. `samples`: for contexts that need some, those of the leading process."""

    def __init__(self, engine: Engine, samples: Sequence[RankRequest]) -> None:
        self._engine, self._samples = engine, samples
        self._engines = {engine.prompter.context_name: engine}

    def __call__(self, part: Part) -> Done:
        if part.context not in self._engines:
            self._engines[part.context] = with_context(self._engine, part.context, self._samples)
        with RecordFile() as kept:
            evaluate(self._engines[part.context], part.requests, part.options, kept)
            return Done(kept.all(), len(part.requests) * len(part.options))
