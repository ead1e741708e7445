"""A file of answers that grows line by line, and that a later run of the same command goes on with.

Knows nothing of what is asked. Beside the answers OUT stands OUT.job.json, which says what they depend on. Invariant:
whatever kills the process, OUT holds whole lines alone once it was opened again; every answer that was written before
is in it; lines of another job are never mixed with them. One process at a time writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rcllm.durable import renamed, write
from rcllm.errors import ConfigError, DataError
from rcllm.plain_json import to_json

Settings = Mapping[str, Any]  # what the answers depend on, by the name that a user knows it under
LINE = "line"  # the field that says which request a line answers: its line in the file of requests
FAILED = "error"  # the field that a line has whose request could not be answered
CONTENT = "digest:"  # begins a setting that stands for the content of a file


class Answers(Protocol):
    """Where answers go. `write` raises DataError where they cannot be kept."""

    answered: set[int]  # lines of requests that have an answer, also of earlier runs

    def write(self, answer: Mapping[str, object]) -> None: ...

    def finish(self) -> None:
        """Called when every request has a line."""
        ...

    def __str__(self) -> str:
        """How much is there and how to go on, in words for a person."""
        ...


class Stream:
    """Answers that leave at once and are not kept here: stdout, a pipe, a device."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.answered: set[int] = set()
        self._written = 0

    def write(self, answer: Mapping[str, object]) -> None:
        try:
            self._file.write(_line(answer))
            self._file.flush()
        except BrokenPipeError:
            raise  # the reader has seen enough
        except OSError as error:
            _forget_output(self._file)
            raise DataError(f"{self._name} cannot be written: {error.strerror}; {self}") from error
        self._written += 1

    def finish(self) -> None:
        pass

    def __str__(self) -> str:
        return f"{self._written:,} answers were written; with --out FILE they are kept, and the command can go on"


class AnswerFile:
    """Answers in a file that earlier runs of the same job may have begun."""

    def __init__(self, out: Path, file: FileIO) -> None:
        """`file`: of `out`, open for reading and appending. Raises ConfigError where a line is no answer."""
        self._out, self._file = out, file
        self.answered: set[int] = set()
        self._places: dict[int, int] = {}  # where the last line about a request begins, in bytes
        self._end = 0  # of the last whole line
        self._sorted = True  # one line for each request, in their order
        self._read()

    def write(self, answer: Mapping[str, object]) -> None:
        raw = rest = _line(answer)
        try:
            while rest:  # one write may take a part where the disk is nearly full
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next run does it
                self._file.truncate(self._end)
            raise DataError(f"{self._out} cannot be written: {error.strerror}; {self}") from error
        self._note(answer, len(raw))

    def finish(self) -> None:
        """Puts the lines in the order of the requests, where failures of earlier runs were tried again."""
        try:
            os.fsync(self._file.fileno())
            if not self._sorted:
                target_path = self._out.resolve()  # a link stays a link
                with self._out.open("rb") as source, renamed(target_path) as partial, partial.open("wb") as target:
                    for _, place in sorted(self._places.items()):
                        source.seek(place)
                        target.write(source.readline())
        except OSError as error:
            raise DataError(f"{self._out} cannot be put in order: {error.strerror}; {self}") from error

    def __str__(self) -> str:
        return f"{self._out} holds {len(self.answered):,} answers; run the same command again to go on from there"

    def _note(self, answer: Mapping[str, object], size: int) -> None:
        number = answer[LINE]
        assert isinstance(number, int)
        self._sorted &= not self._places or number > next(reversed(self._places))
        self._places[number] = self._end
        if FAILED not in answer:
            self.answered.add(number)
        self._end += size

    def _read(self) -> None:
        with self._out.open("rb") as lines:
            for index, raw in enumerate(lines, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    self._note(_parsed(raw), len(raw))
                except ValueError as error:
                    raise ConfigError(
                        f"{self._out}, line {index}: expected an answer of this command, got {raw[:60]!r}; name "
                        "another file, or give --restart to begin this one anew"
                    ) from error
        self._file.truncate(self._end)  # what a kill left of a line goes


@contextlib.contextmanager
def opened_answers(out: str, settings: Settings, *, restart: bool = False) -> Iterator[Answers]:
    """Where answers go: `-` is stdout, anything that exists and is no plain file is written to as it is.

    A file goes on after the answers that it holds, if they are of the same `settings`; `restart` begins it anew.
    Raises ConfigError where it holds something else or another process writes it, DataError where it cannot be written.
    """
    if out == "-":
        yield Stream(sys.stdout.buffer, "stdout")
        return
    path = Path(out)
    if _is_stream(path):
        with path.open("wb") as device:
            yield Stream(device, out)
        return
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+b", buffering=0))
            _take(path, file.fileno())
            _begin(path, settings, restart=restart)
            answers = AnswerFile(path, file)
        except OSError as error:
            raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
        yield answers


def check_same_job(out: str, settings: Settings, later: Collection[str] = ()) -> None:
    """Whether a file holds answers under these settings. Raises ConfigError, DataError.

    `later`: the names of those that are not known yet.
    """
    path = Path(out)
    if out == "-" or _is_stream(path) or not path.exists() or path.stat().st_size == 0:
        return
    if not job_path(path).exists():
        raise ConfigError(
            f"{path} is there already, and nothing beside it says that this command wrote it: name another file, or "
            "give --restart to replace it"
        )
    before = _noted(job_path(path))
    names = [name for name in dict.fromkeys([*settings, *before]) if name in settings or name not in later]
    told = [_difference(name, before.get(name), settings.get(name)) for name in names]
    if told := [each for each in told if each]:
        raise ConfigError(
            f"{path} holds answers of another job: {'; '.join(told)}. Name another file, or give --restart to replace "
            "them"
        )


def job_path(out: Path) -> Path:
    return out.with_name(out.name + ".job.json")


def _begin(path: Path, settings: Settings, *, restart: bool) -> None:
    """Notes what the answers depend on, before the first of them."""
    if restart:
        os.truncate(path, 0)
    check_same_job(str(path), settings)
    if path.stat().st_size == 0:
        write(job_path(path), (to_json(dict(settings), indent=1) + "\n").encode())


def _take(path: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{path}: another process is writing it; wait for it, or name another file") from error


def _noted(path: Path) -> dict[str, Any]:
    try:
        noted = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected what the answers beside it depend on, got something else ({error}); name another file, "
            "or give --restart to begin anew"
        ) from error
    return noted if isinstance(noted, dict) else {}


def _difference(name: str, before: object, now: object) -> str:
    """In words; empty where there is none."""
    if before == now:
        return ""
    if now is None and _is_content(before):
        return f"nothing is given for {name} now"
    if _is_content(now):
        return f"the content of {name} is another" if before is not None else f"{name} is new"
    return f"{name} was {before!r}, is {now!r}"


def _is_content(value: object) -> bool:
    return isinstance(value, str) and value.startswith(CONTENT)


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _line(answer: Mapping[str, object]) -> bytes:
    return (to_json(answer) + "\n").encode()


def _parsed(raw: bytes) -> Mapping[str, object]:
    """Raises ValueError."""
    value = json.loads(raw)
    if not isinstance(value, dict) or not isinstance(value.get(LINE), int):
        raise ValueError("no answer")
    return value


def _forget_output(file: BinaryIO) -> None:
    """What stdout did not take would be tried again when the process ends, and change the exit code."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, file.fileno())
        os.close(handle)
