"""Answers to a file of requests, written as they come: progress, failures in their place, going on, the exit code.

Knows nothing of what is asked. Invariant: every request has one line in the output, an answer or its error; what an
interruption leaves can be gone on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer
from blake3 import blake3

from rcllm.cli.outputs import check_file
from rcllm.cli.screen import progress, say
from rcllm.config import Config, StoreConfig
from rcllm.core.ranking import Item
from rcllm.errors import ConfigError, RcllmError, RequestError
from rcllm.fetch import digest
from rcllm.plain_json import as_json
from rcllm.prompt.template import Template
from rcllm.version import __version__
from rcllm.wire.answer_file import CONTENT, LINE, Answers, job_path
from rcllm.wire.lines import Failure, RequestFile, RequestLine, failure_to_json

if TYPE_CHECKING:
    from rcllm.engine.engine import Engine

R = TypeVar("R")  # a request
A = TypeVar("A")  # an answer
_SHOWN_FAILURES = 20
_OTHER_FORMATS = (".gz", ".csv", ".tsv", ".parquet", ".pq")  # of those that requests and items may have
LOADED = ("the model", "the prompts")  # settings that are known when the model is loaded
_CHANGES_NOTHING = {  # what is computed where and in which pieces, not what comes out
    "model": ("threads",),
    "cache": ("memory_mb", "pool_mb", "pass_tokens"),
    "store": tuple(field.name for field in fields(StoreConfig)),
}


@dataclass(frozen=True, slots=True)
class Work(Generic[R, A]):
    """What is asked, and how it is answered."""

    doing: str  # for the progress bar
    requests: RequestFile[R]
    total: int
    answer: Callable[[Sequence[R]], Sequence[A | RcllmError]]  # a response or its error for each request
    to_json: Callable[[A], Mapping[str, object]]  # raises ModelError for an answer that is none
    batch: int
    strict: bool  # stop at the first failure


def check_out(out: str, *reads: object) -> None:
    """Whether answers can go to `out`, which is none of what is read. Raises ConfigError, DataError."""
    check_file(out, *reads, beside=job_path(Path(out)))
    if Path(out).suffix.lower() in _OTHER_FORMATS:
        better = Path(out).with_suffix(".jsonl")
        raise ConfigError(f"--out {out}: answers are JSON lines, and the name says otherwise; name it {better}")


def write_answers(work: Work[Any, Any], answers: Answers, conclude: Callable[[], None] = lambda: None) -> None:
    """Answers what `answers` has no answer to yet, then `conclude`s. Ends the command with 1 where something failed."""
    if answers.answered:
        say(f"{len(answers.answered):,} of {work.total:,} requests are answered already; going on with the others")
    failed = 0
    with progress() as bar:
        task = bar.add_task(work.doing, total=work.total, completed=len(answers.answered))
        for line, answer in _each(work, answers.answered):
            answers.write(answer)
            bar.advance(task)
            if isinstance(line, Failure):
                failed += 1
                _tell(work, line, failed)
    answers.finish()
    conclude()
    if failed > _SHOWN_FAILURES:
        say(f"… and {failed - _SHOWN_FAILURES:,} more")
    if failed:
        say(f"{failed:,} of {work.total:,} requests failed; each has a line with its error in the output", "bold red")
        raise typer.Exit(1)


def _tell(work: Work[Any, Any], failure: Failure, count: int) -> None:
    told = f"{work.requests.name}, line {failure.number}: {failure.error}"
    if work.strict:
        raise RequestError(told)
    if count <= _SHOWN_FAILURES:
        say(told)


def _each(work: Work[R, A], answered: set[int]) -> Iterator[tuple[RequestLine[R] | Failure, Mapping[str, object]]]:
    """Each line that has no answer yet, in order, with what is written of it; a failure where there is no answer."""
    todo = (line for line in work.requests if line.number not in answered)
    while some := list(islice(todo, work.batch)):
        asked = [line.request for line in some if isinstance(line, RequestLine)]
        found = iter(work.answer(asked) if asked else [])
        for line in some:
            if isinstance(line, RequestLine):
                yield _written(line, next(found), work.to_json)
            else:
                yield line, failure_to_json(line)


def _written(
    line: RequestLine[Any], answer: A | RcllmError, to_json: Callable[[A], Mapping[str, object]]
) -> tuple[RequestLine[Any] | Failure, Mapping[str, object]]:
    request_id = line.request.request_id
    try:
        if not isinstance(answer, RcllmError):
            return line, {"request_id": request_id, LINE: line.number, **to_json(answer)}
    except RcllmError as error:
        answer = error
    failure = Failure(line.number, request_id, str(answer))
    return failure, failure_to_json(failure)


# ---- what answers depend on ------------------------------------------------------------------------------------------


def settings_of(command: str, config: Config, requests: RequestFile[Any], **given: object) -> dict[str, Any]:
    """What answers depend on as far as it is known before the model is loaded, by names that a user knows.

    `given`: a catalogue, groups of options, single values. A file stands for its content, whatever it is called.
    """
    plain = as_json(config)
    del plain["server"]  # no answer depends on it, and it holds keys
    for section, names in _CHANGES_NOTHING.items():
        plain[section] = {name: value for name, value in plain[section].items() if name not in names}
    plain["rank"]["level"] = str(config.rank.level)
    settings: dict[str, Any] = {"command": f"rcllm {command}", "version": __version__}
    settings["the requests"] = _content(requests.path)
    settings["the template"] = f"{CONTENT}{Template.load(config.prompt.template).fingerprint.hex()}"
    settings |= {f"{section}.{name}": value for section, values in plain.items() for name, value in values.items()}
    for name, value in given.items():
        settings |= _described(name, value)
    return settings


def loaded_settings(engine: Engine) -> dict[str, Any]:
    """What answers depend on that is known when the model is loaded: `LOADED`."""
    contexts = [context.digest for some in engine.prompter.contexts.values() for context in some.values()]
    prompts = blake3(engine.prompter.namespace + b"".join(contexts)).hexdigest()
    return dict(zip(LOADED, (f"{CONTENT}{engine.model_id}", f"{CONTENT}{prompts}"), strict=True))


def _described(name: str, value: object) -> dict[str, Any]:
    match value:
        case Mapping():
            return {f"the {name}": _catalogue_content(value)}
        case Path():
            return {_option(name): _content(value)}
        case None | bool() | int() | float() | str():
            return {_option(name): value}
        case list() | tuple():
            return {_option(name): [str(each) for each in value]}
    options: dict[str, Any] = {}
    for each in fields(value):  # type: ignore[arg-type]  # a group of options
        options |= _described(each.name, getattr(value, each.name))
    return options


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _content(path: Path) -> str | None:
    """Of a folder, its name; None for what is not there."""
    if path.is_file():
        return f"{CONTENT}{digest(path)}"
    return str(path.resolve()) if path.exists() else None


def _catalogue_content(catalogue: Mapping[Any, Item]) -> str:
    state = blake3()
    for item in catalogue.values():
        state.update(repr((item.item_id, dict(item.fields), dict(item.volatile))).encode())
    return f"{CONTENT}{state.hexdigest()}"
