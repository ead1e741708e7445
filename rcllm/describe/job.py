"""The offline job: rows of profiles in, text out, in parts that survive a kill.

Knows nothing of how text is generated: a `Writer` does that. Invariant: a row is in exactly one part, and a part starts
from the drafting pools that the one before it left, which are kept with it. So a job that was killed and resumed ends
as one that never was. Where verification is strict, its text is the very same. Where it is relaxed, text depends on the
pools and on how much is drafted, and that follows measured times, with or without a kill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from rcllm.describe.checkpoint import Described, Done, JobCheckpoint, Settings
from rcllm.describe.options import DescribeOptions, check_options
from rcllm.describe.profiles import Profile, Reject
from rcllm.durable import renamed, writing
from rcllm.errors import DataError, RequestError

_SHOWN_REJECTS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What a writer made of one profile."""

    text: str
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int
    num_passes: int  # forward passes that decided its tokens, the prompt's own included
    num_divergences: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are described, and kept, together."""

    profiles: tuple[Profile, ...]
    rejects: tuple[Reject, ...]
    last_row: int


# Describes parts: gives each back, in their order, with places in its profiles and their rows, as they are complete.
Describes = Callable[[Iterable[Part]], Iterator[tuple[Part, Iterable[tuple[int, Described]]]]]


class Writer(Protocol):
    """Generates text. `write` may learn from its answers (drafting pools); `save` and `load` keep what it learnt."""

    def num_prompt_tokens(self, profile: Profile) -> int:
        """Raises RequestError for a profile that cannot be answered."""

    def write(self, profiles: Sequence[Profile], seeds: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """Places in `profiles` and their answers, as they are complete."""

    def save(self, path: Path) -> None:
        """Writes a file or folder that is not there yet."""

    def load(self, path: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class Provenance:
    """What is noted beside every answer."""

    model: str  # first 12 hex digits of the model fingerprint
    template: str  # name, version and first 12 hex digits of its fingerprint
    version: str  # of rcllm


@dataclass(frozen=True, slots=True)
class Rate:
    """What a run needed, without what earlier runs did."""

    num_profiles: int
    num_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def seconds_per_profile(self) -> float:
        return self.elapsed_s / self.num_profiles if self.num_profiles else 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    done: Done  # in finished parts, of this and earlier runs
    num_profiles: int  # done, with those of the part at hand
    rate: Rate


@dataclass(frozen=True, slots=True)
class Report:
    out: Path
    rejects: Path | None  # None: there were none
    done: Done
    rate: Rate
    num_resumed: int  # profiles that earlier runs had done
    first_rejects: tuple[Reject, ...] = ()  # the first few rows that could not be described


def describe(
    rows: Callable[[int], Iterable[Profile | Reject]],
    writer: Writer,
    options: DescribeOptions,
    out: Path,
    provenance: Provenance,
    *,
    settings: Settings | None = None,
    pools: Path | None = None,
    strict: bool = False,
    describes: Describes | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Describes every profile of `rows` into the parquet file `out`; run it again with the same arguments to go on.

    `rows(after)`: the rows beyond row `after` of the input, in order. `settings`: what else the output depends on (the
    input's digest, the template): a job is resumed only with equal ones. `pools`: drafting pools of earlier jobs to
    start from, and where they are kept at the end. `strict`: a row that cannot be described is an error. `describes`:
    who describes the parts in place of `writer`, such as other processes. `now`: stamps answers; `clock`: seconds, for
    rates. Raises ConfigError, DataError and what `writer` raises.
    """
    check_options(options)
    noted = asdict(options) | {"speculation": str(options.speculation)}
    whole = {**noted, "pools": str(pools) if pools else None, **asdict(provenance), **(settings or {})}
    if describes is None:
        describes = Describing(writer, options, provenance, now).parts
    job = _Job(writer, options, strict, describes, clock)
    with JobCheckpoint(out, whole) as checkpoint:
        before = checkpoint.done
        spent = Rate(0, 0, 0.0)
        if not checkpoint.finished:
            if checkpoint.pools is not None:
                writer.load(checkpoint.pools)
            elif pools is not None and pools.exists():
                writer.load(pools)
                checkpoint.keep_pools(writer.save)
            spent = job.run(rows(before.last_row), checkpoint, on_progress)
            _check_any(checkpoint.done)
            checkpoint.finish()
        if pools is not None and checkpoint.pools is not None:
            writer.load(checkpoint.pools)
            with writing(pools), renamed(pools) as partial:
                writer.save(partial)
        checkpoint.remove_work()
        rejects = checkpoint.rejects_path if checkpoint.done.num_rejects else None
        shown = checkpoint.first_rejects(_SHOWN_REJECTS) if rejects else ()
        return Report(out, rejects, checkpoint.done, spent, before.num_profiles, shown)


def row_seed(seed: int, name: str) -> int:
    """The seed of one answer: of its own for each row, so that no answer depends on what else a job describes."""
    return int.from_bytes(blake3(f"{seed} {name}".encode()).digest()[:6], "little")


@dataclass(frozen=True, slots=True)
class Describing:
    """Makes the rows of the output with one writer."""

    writer: Writer
    options: DescribeOptions
    provenance: Provenance
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def parts(self, parts: Iterable[Part]) -> Iterator[tuple[Part, Iterable[tuple[int, Described]]]]:
        """See `Describes`."""
        for part in parts:
            yield part, self.rows(part.profiles)

    def rows(self, profiles: Sequence[Profile]) -> Iterator[tuple[int, Described]]:
        """Places in `profiles` and their rows, as they are complete."""
        seeds = [row_seed(self.options.seed, profile.name) for profile in profiles]
        for place, answer in self.writer.write(profiles, seeds):
            yield place, self._row(profiles[place], answer, seeds[place])

    def _row(self, profile: Profile, answer: Answer, seed: int) -> Described:
        return Described(
            row=profile.row,
            name=profile.name,
            text=answer.text,
            finish_reason=answer.finish_reason,
            num_tokens=answer.num_tokens,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_passes=answer.num_passes,
            accepted_len=answer.num_tokens / answer.num_passes if answer.num_passes else 0.0,
            num_divergences=answer.num_divergences,
            num_unknown=profile.num_unknown,
            seed=seed,
            described_at=self.now(),
            model=self.provenance.model,
            template=self.provenance.template,
            speculation=str(self.options.speculation),
            rcllm_version=self.provenance.version,
        )


@dataclass(frozen=True, slots=True)
class _Job:
    writer: Writer
    options: DescribeOptions
    strict: bool
    describes: Describes
    clock: Callable[[], float]

    def run(
        self, rows: Iterable[Profile | Reject], checkpoint: JobCheckpoint, on_progress: Callable[[Progress], None]
    ) -> Rate:
        """Part by part, to the end of the rows or to the limit."""
        started, before, spent = self.clock(), checkpoint.done.num_profiles, Rate(0, 0, 0.0)
        for part, complete in self.describes(self.parts(rows, _left(self.options.limit, before))):
            described: dict[int, Described] = {}
            for place, row in complete:
                described[place] = row
                spent = Rate(spent.num_profiles + 1, spent.num_tokens + row.num_tokens, self.clock() - started)
                on_progress(Progress(checkpoint.done, before + spent.num_profiles, spent))
            in_order = [described[place] for place in range(len(part.profiles))]
            checkpoint.commit(in_order, part.rejects, part.last_row, self.writer.save)
        return spent

    def parts(self, rows: Iterable[Profile | Reject], left: int | None) -> Iterator[Part]:
        """Cuts the rows into parts of `checkpoint_every` profiles that can be answered, up to `left` of them."""
        profiles: list[Profile] = []
        rejects: list[Reject] = []
        last_row = 0
        size = self.options.checkpoint_every if left is None else min(left, self.options.checkpoint_every)
        for row in rows if size else ():
            last_row = row.row
            checked = self._checked(row)
            if isinstance(checked, Reject):
                rejects.append(checked)
                continue
            profiles.append(checked)
            if len(profiles) == size:
                yield Part(tuple(profiles), tuple(rejects), last_row)
                left = None if left is None else left - size
                size = size if left is None else min(left, size)
                profiles, rejects = [], []
                if not size:
                    return
        if profiles or rejects:
            yield Part(tuple(profiles), tuple(rejects), last_row)

    def _checked(self, row: Profile | Reject) -> Profile | Reject:
        if isinstance(row, Profile):
            try:
                self.writer.num_prompt_tokens(row)
                return row
            except RequestError as error:
                row = Reject(row.row, row.name, str(error))
        if self.strict:
            raise DataError(f"row {row.row}: {row.reason}; leave out --strict to go on without such rows")
        return row


def _left(limit: int | None, num_done: int) -> int | None:
    return None if limit is None else max(0, limit - num_done)


def _check_any(done: Done) -> None:
    if not done.num_profiles:
        told = f"none of its {done.num_rejects:,} rows can be described" if done.num_rejects else "it is empty"
        raise DataError(f"there is nothing to describe in the input: {told}")
