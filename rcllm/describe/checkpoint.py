"""What a describing job has done so far, on disk, so that a killed job goes on where it was.

Knows nothing of models or prompts. Beside the output OUT stands a folder OUT.work: `settings.json`, and for each part n
its rejects, the drafting pools after it, and `part-n.parquet`, which is renamed into place last. Invariant: the rows up
to the last row of the last part are done, all others are not; OUT is whole or not there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from rcllm.describe.profiles import Reject
from rcllm.durable import remove, remove_torn, renamed, write, writing
from rcllm.errors import ConfigError, DataError
from rcllm.fields import parse
from rcllm.plain_json import read_object, to_json

Settings = Mapping[str, Any]  # JSON values: everything that the output depends on
_META = b"rcllm.describe"
_DICTIONARY = ("model", "template", "speculation", "rcllm_version")  # columns of few different values


def rejects_file(out: Path) -> Path:
    """The rows that could not be described."""
    return out.with_name(out.stem + ".rejects.jsonl")


@dataclass(frozen=True, slots=True)
class Described:
    """One row of the output: the text, and all that says where it came from."""

    row: int  # of the input, from 1
    name: str  # user id or item id
    text: str
    finish_reason: str
    num_tokens: int  # of the answer
    num_prompt_tokens: int
    num_passes: int  # forward passes that this answer took part in
    accepted_len: float  # tokens per pass
    num_divergences: int  # accepted tokens that greedy decoding would not have chosen; 0 unless relaxed
    num_unknown: int  # events that were left out, because the catalogue lacks their items
    seed: int
    described_at: datetime  # UTC
    model: str  # first 12 hex digits of the model fingerprint
    template: str  # name, version and first 12 hex digits of its fingerprint
    speculation: str
    rcllm_version: str


@dataclass(frozen=True, slots=True)
class Done:
    """What is finished, over all parts."""

    num_parts: int = 0
    last_row: int = 0  # of the input: later rows are to do
    num_profiles: int = 0
    num_rejects: int = 0
    num_tokens: int = 0  # of answers
    num_passes: int = 0
    num_divergences: int = 0

    def __add__(self, other: Done) -> Done:
        summed = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Done)}
        return Done(**summed | {"last_row": max(self.last_row, other.last_row)})


class JobCheckpoint:
    """A context: `with JobCheckpoint(out, settings) as checkpoint`. One process at a time works on an output."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out = out
        self.settings = json.loads(json.dumps(dict(settings)))  # as it comes back from the file
        self.work = out.with_name(out.name + ".work")
        self.rejects_path = rejects_file(out)
        self.done = Done()
        self.finished = False  # an earlier run wrote the output of these very settings
        self._lock: int | None = None

    def __enter__(self) -> JobCheckpoint:
        """Raises ConfigError where another job's work is in the way, DataError where nothing can be written."""
        try:
            with writing(self.out):
                self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    @property
    def pools(self) -> Path | None:
        """The drafting pools as they were after the last part, if they were kept."""
        path = self._file("pools", "")
        return path if path.exists() else None

    def keep_pools(self, save: Callable[[Path], None]) -> None:
        """Before the first part: the pools that the job starts from."""
        with writing(self.work):
            self._save_pools(save, 0)

    def commit(
        self, rows: Sequence[Described], rejects: Sequence[Reject], last_row: int, save: Callable[[Path], None]
    ) -> None:
        """Ends a part; it counts from the moment when its parquet file has its name. Raises DataError."""
        part = Done(
            1,
            last_row,
            len(rows),
            len(rejects),
            sum(row.num_tokens for row in rows),
            sum(row.num_passes for row in rows),
            sum(row.num_divergences for row in rows),
        )
        number = self.done.num_parts
        with writing(self.work):
            lines = "".join(to_json(asdict(each)) + "\n" for each in rejects)
            write(self._file("rejects", ".jsonl"), lines.encode())
            self._save_pools(save, number + 1)
            path = self._file("part", ".parquet")
            with renamed(path) as partial:
                _write_table(partial, _columns(rows), {"done": asdict(part)})
            for old in self.work.glob("pools-*"):
                if old.name != f"pools-{number + 1:06}":
                    remove(old)
        self.done += part

    def first_rejects(self, count: int) -> tuple[Reject, ...]:
        """Of a job that is finished: the first rows that could not be described."""
        try:
            with self.rejects_path.open(encoding="utf-8") as lines:
                return tuple(Reject(**json.loads(line)) for line in islice(lines, count))
        except (OSError, ValueError, TypeError):  # someone moved the file or wrote into it: the count is kept elsewhere
            return ()

    def finish(self) -> None:
        """Joins the parts to the output. `remove_work` ends the job."""
        with writing(self.out):
            if self.done.num_rejects:
                with renamed(self.rejects_path) as partial, partial.open("wb") as target:
                    for path in sorted(self.work.glob("rejects-*.jsonl"))[: self.done.num_parts]:
                        target.write(path.read_bytes())
            with renamed(self.out) as partial:
                meta = {"settings": self.settings, "done": asdict(self.done)}
                _join(self._parts(), partial, meta, self.settings.get("kind", "user"))
            self.finished = True

    def remove_work(self) -> None:
        with writing(self.work):
            if self.work.exists():  # at once out of sight: half of it would be taken for a job
                self.work.replace(self._aside)
            remove(self._aside)

    @property
    def _aside(self) -> Path:
        return self.work.with_name(f".{self.work.name}.partial")

    def _begin(self) -> None:
        if self.out.exists():
            meta = _read_meta(self.out)
            self._check_same(meta.get("settings"), self.out)
            self.finished = True
            self.done = _done_in(meta, self.out)
            if not self.work.exists():
                remove(self._aside)
                return
        self.work.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        written = self.work / "settings.json"
        if written.exists():
            self._check_same(_read_settings(written), self.work)
        else:
            write(written, to_json(self.settings, indent=1).encode())
        remove_torn(self.work)
        self.done = sum((_done_in(_read_meta(part), part) for part in self._parts()), Done())

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _parts(self) -> list[Path]:
        """In order. Raises DataError where one is missing: the next would get the name of another."""
        parts = sorted(self.work.glob("part-*.parquet"))
        for number, part in enumerate(parts):
            if part.name != f"part-{number:06}.parquet":
                raise DataError(
                    f"{self.work}: expected part-{number:06}.parquet, got {part.name}: a part was removed, and its "
                    f"rows with it; remove {self.work} to begin anew"
                )
        return parts

    def _file(self, name: str, suffix: str) -> Path:
        return self.work / f"{name}-{self.done.num_parts:06}{suffix}"

    def _save_pools(self, save: Callable[[Path], None], number: int) -> None:
        with renamed(self.work / f"pools-{number:06}") as partial:
            save(partial)

    def _take_lock(self) -> None:
        self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.out}: another process is writing it; wait for it, or name another output"
            ) from error

    def _check_same(self, before: Any, where: Path) -> None:
        if not isinstance(before, dict):
            raise ConfigError(f"{where} exists and is not of `rcllm describe`; name another output, or remove it")
        names = sorted({*before, *self.settings})
        changed = [name for name in names if before.get(name) != self.settings.get(name)]
        if changed:
            told = "; ".join(f"{name} was {before.get(name)!r}, is {self.settings.get(name)!r}" for name in changed)
            raise ConfigError(
                f"{where} was begun with other settings: {told}. Use the same ones to go on, or name another output, "
                f"or remove {where} to begin anew"
            )


# ---- parquet ---------------------------------------------------------------------------------------------------------


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415  the one place that needs it here: an optional dependency
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError("writing parquet needs pyarrow; install it with: pip install 'rcllm[data]'") from error
    return pa, pq


def _columns(rows: Sequence[Described]) -> dict[str, list[Any]]:
    return {each.name: [getattr(row, each.name) for row in rows] for each in fields(Described)}


def _schema(pa: Any) -> Any:
    kinds = {"int": pa.int64(), "str": pa.string(), "float": pa.float64(), "datetime": pa.timestamp("us", "UTC")}
    special = dict.fromkeys(_DICTIONARY, pa.dictionary(pa.int32(), pa.string()))
    return pa.schema([(each.name, special.get(each.name, kinds[str(each.type)])) for each in fields(Described)])


def _write_table(path: Path, columns: Mapping[str, list[Any]], meta: Mapping[str, Any]) -> None:
    pa, pq = _arrow()
    table = pa.table(dict(columns), schema=_schema(pa))
    noted = table.replace_schema_metadata({_META: json.dumps(dict(meta)).encode()})
    pq.write_table(noted, path, write_page_checksum=True)


def _read_settings(path: Path) -> dict[str, Any] | None:
    """What a job noted of itself; None for a file of anything else."""
    try:
        return read_object(path.read_bytes(), str(path), DataError)
    except DataError:
        return None


def _read_meta(path: Path) -> dict[str, Any]:
    """What `_write_table` and `_join` noted; empty for a file of anything else, or for half of one."""
    pa, pq = _arrow()
    try:
        return read_object((pq.read_schema(path).metadata or {}).get(_META, b"{}"), str(path), DataError)
    except (pa.ArrowException, OSError, ValueError, DataError):
        return {}


def _done_in(meta: Mapping[str, Any], path: Path) -> Done:
    try:
        return parse(Done, meta["done"], error=DataError)
    except (KeyError, DataError) as error:
        raise DataError(
            f"{path}: expected what `rcllm describe` writes, got something else, or half of it; remove "
            f"{path.parent if path.name.startswith('part-') else path} to begin anew"
        ) from error


def _join(parts: Sequence[Path], target: Path, meta: Mapping[str, Any], kind: str) -> None:
    pa, pq = _arrow()
    schema = _schema(pa)
    names = [f"{kind}_id" if name == "name" else name for name in schema.names]
    named = pa.schema([pa.field(name, field.type) for name, field in zip(names, schema, strict=True)])
    with pq.ParquetWriter(target, named.with_metadata({_META: json.dumps(dict(meta)).encode()})) as writer:
        for part in parts:
            try:
                table = pq.read_table(part, schema=schema, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                first = str(error).partition("\n")[0]
                raise DataError(f"{part} is damaged ({first}); remove {part.parent} to begin anew") from error
            writer.write_table(table.rename_columns(names).cast(named))
