"""The terminal: results go to stdout, everything else to stderr.

Knows nothing of what is shown. Invariant: what is written to a file or pipe holds no control codes, bars or spinners;
text of users' data never steers a terminal and is never read as markup.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from rcllm.errors import ModelWarning, StoreWarning, TextWarning

if TYPE_CHECKING:
    from rcllm.core.ranking import ItemId
    from rcllm.engine.engine import Engine
    from rcllm.engine.warming import WarmProgress

INTERRUPTED = 130  # the exit code, as shells count it: 128 and the number of the signal
GOES_ON = "the same command goes on from what is finished"
_PIPE_WIDTH = 160  # tables are not folded to 80 columns where no terminal asks for it
_TOLD_EVERY_S = 30.0  # a line about progress, where no terminal shows it
_RATE_OVER_S = 300.0  # the time over which a rate is measured
_HARMLESS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}  # ␛ for escape, ␇ for bell
    | {0x7F: 0x2421}
    | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    | {code: f"\\u{code:04x}" for code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
)


def harmless(text: str) -> str:
    """The text with control characters, escapes and turns of direction shown in place of obeyed."""
    return text.translate(_HARMLESS)


class _SafeConsole(Console):
    """Shows text harmlessly, whoever made it; styles and bars are Rich's own and pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def console(*, stderr: bool = False) -> Console:
    """Made anew each time, because tests and pipes exchange the streams."""
    stream = sys.stderr if stderr else sys.stdout
    live = stream.isatty()  # Rich itself would also draw bars into a log where FORCE_COLOR is set
    width = None if live else _PIPE_WIDTH
    return _SafeConsole(file=stream, force_terminal=live, width=width, highlight=False, markup=False, emoji=False)


def say(text: str, style: str = "yellow") -> None:
    """One remark on stderr."""
    console(stderr=True).print(Text(text, style=style), soft_wrap=True)


@contextmanager
def warnings_said() -> Iterator[None]:
    """Our own warnings are one line each, without the place in the code that Python would name."""
    shown = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
    ) -> None:
        if issubclass(category, TextWarning | ModelWarning | StoreWarning):
            say(f"warning: {message}")
        else:
            shown(message, category, filename, lineno, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr where that is a terminal, else a line every half minute."""
    screen = console(stderr=True)
    if _is_live(screen):
        with screen.status(Text(what + " …")):
            yield
    else:
        with _told_again(lambda: [f"still {what}"]):
            yield


@contextmanager
def progress(*details: str) -> Iterator[Progress]:
    """A bar with its estimated end on stderr where that is a terminal, else a line every half minute.

    `details`: task fields to show as well.
    """
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    fields = [TextColumn("{task.fields[" + name + "]}", markup=False) for name in details]
    screen = console(stderr=True)
    with Progress(
        *columns,
        *fields,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=screen,
        disable=not _is_live(screen),
        speed_estimate_period=_RATE_OVER_S,
    ) as bar:
        if _is_live(screen):
            yield bar
        else:
            with _told_again(lambda: [_line(task, details) for task in bar.tasks if task.remaining != 0]):
                yield bar


@contextmanager
def _told_again(lines: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Says `lines()` every half minute while the body runs."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_TOLD_EVERY_S):
            for line in lines():
                say(line, "")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _line(task: Task, details: Iterable[str]) -> str:
    """How far a task is, how fast it goes and when it ends."""
    parts = [f"{task.completed:,.0f}" + (f" of {task.total:,.0f}" if task.total is not None else "")]
    parts += [text for name in details if (text := str(task.fields.get(name, "")))]
    if task.speed:
        parts.append(f"{task.speed:,.2f} a second")
    if task.time_remaining is not None:
        parts.append(f"about {timedelta(seconds=round(task.time_remaining))} left")
    return f"{task.description}: {', '.join(parts)}"


def _is_live(screen: Console) -> bool:
    """Whether bars can move."""
    return screen.is_terminal and not screen.is_dumb_terminal


@contextmanager
def interruptible(left: object) -> Iterator[None]:
    """Ctrl-C ends the command with 130 and says what is `left`, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {left}", "bold red")
        raise typer.Exit(INTERRUPTED) from None


def warm_with_progress(engine: Engine, item_ids: Iterable[ItemId] | None) -> WarmProgress:
    """`Engine.warm` under a bar that shows blocks, megabytes and the estimated end."""
    with progress("size") as bar:
        task = bar.add_task("warming blocks", total=None, size="")

        def show(now: WarmProgress) -> None:
            size = f"{now.computed_bytes / 1e6:,.0f} MB"
            bar.update(task, completed=now.done_blocks, total=now.total_blocks, size=size)

        return engine.warm(item_ids, on_progress=show)
