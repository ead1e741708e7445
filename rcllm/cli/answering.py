"""Answers to a file of requests, written as they come: progress, failures in their place, the exit code.

Knows nothing of what is asked. Invariant: every request has one line in the output, an answer or its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import typer

from rcllm.cli.screen import progress, say
from rcllm.errors import RequestError
from rcllm.wire.lines import Failure, failure_to_json, writer

T = TypeVar("T")
_SHOWN_FAILURES = 20


def write_answers(
    answers: Iterable[T | Failure],
    total: int,
    to_json: Callable[[T], Mapping[str, object]],
    *,
    doing: str,
    source: str,
    out: str,
    strict: bool,
) -> None:
    """`doing` names the work, `source` the file of requests. Raises RequestError at the first failure if `strict`."""
    failed = 0
    with writer(out) as write, progress() as bar:
        task = bar.add_task(doing, total=total)
        for answer in answers:
            if isinstance(answer, Failure):
                if strict:
                    raise_first([answer], source)
                failed += 1
                if failed <= _SHOWN_FAILURES:
                    say(f"{source}, line {answer.number}: {answer.error}")
                write(failure_to_json(answer))
            else:
                write(to_json(answer))
            bar.advance(task)
    if failed:
        say(f"{failed:,} of {total:,} requests failed; each has a line with its error in the output", "bold red")
        raise typer.Exit(1)


def raise_first(lines: Sequence[object], source: str) -> None:
    """Raises RequestError for the first line that is a failure, if any is."""
    for line in lines:
        if isinstance(line, Failure):
            raise RequestError(f"{source}, line {line.number}: {line.error}") from None
