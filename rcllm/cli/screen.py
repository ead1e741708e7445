"""The terminal: results go to stdout, everything else to stderr.

Knows nothing of what is shown. Invariant: what is written to a file or pipe holds no control codes, bars or spinners.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from rcllm.core.ranking import ItemId
    from rcllm.engine.engine import Engine
    from rcllm.engine.warming import WarmProgress

_PIPE_WIDTH = 160  # tables are not folded to 80 columns where no terminal asks for it


def console(*, stderr: bool = False) -> Console:
    """Made anew each time, because tests and pipes exchange the streams."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def say(text: str, style: str = "yellow") -> None:
    """One remark on stderr."""
    console(stderr=True).print(Text(text, style=style), soft_wrap=True)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal."""
    screen = console(stderr=True)
    if screen.is_terminal:
        with screen.status(what + " …"):
            yield
    else:
        yield


@contextmanager
def progress(*details: str) -> Iterator[Progress]:
    """A bar with its estimated end on stderr, where that is a terminal. `details`: task fields to show as well."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    fields = [TextColumn("{task.fields[" + name + "]}") for name in details]
    screen = console(stderr=True)
    with Progress(
        *columns,
        *fields,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=screen,
        disable=not screen.is_terminal,
    ) as bar:
        yield bar


def warm_with_progress(engine: Engine, item_ids: Iterable[ItemId] | None) -> WarmProgress:
    """`Engine.warm` under a bar that shows blocks, megabytes and the estimated end."""
    with progress("size") as bar:
        task = bar.add_task("warming blocks", total=None, size="")

        def show(now: WarmProgress) -> None:
            size = f"{now.pool_bytes / 1e6:,.0f} MB"
            bar.update(task, completed=now.done_blocks, total=now.total_blocks, size=size)

        return engine.warm(item_ids, on_progress=show)
