"""How a command ends that could not go on: one line for a person, and the exit code.

The one place that knows which errors a user's files, options and machine can cause. Knows nothing of commands.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from rcllm.cli.screen import INTERRUPTED
from rcllm.errors import ConfigError

_KEPT = "what was finished before is kept where the command keeps it: run it again with the same options to go on"


@dataclass(frozen=True, slots=True)
class Ending:
    words: str  # empty: there is nobody to tell
    code: int


def ended_by(error: BaseException) -> Ending:
    """The words and the exit code for an error of ours, of the system, of memory, or for an interrupt."""
    match error:
        case ConfigError():
            return Ending(f"error: {error}", 2)
        case KeyboardInterrupt():
            return Ending(f"interrupted; {_KEPT}", INTERRUPTED)
        case MemoryError():
            return Ending(
                "error: there is not enough memory. Give the cache less (--memory-mb), or take fewer at once (--batch)",
                1,
            )
        case BrokenPipeError():
            _silence_stdout()
            return Ending("", 141)
        case OSError():
            return Ending(f"error: {_of_the_system(error)}", 1)
    return Ending(f"error: {error}", 1)


def _of_the_system(error: OSError) -> str:
    """«PATH: cannot be used: Permission denied», where the system says which path it was."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the system refused: {reason}"
    hint = ""
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        hint = "; a file stands where a folder is wanted, or a folder where a file is: name another path"
    elif isinstance(error, PermissionError):
        hint = "; name a place that you may write to"
    where = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    home = os.environ.get("RCLLM_HOME")
    if home and where.startswith(home):
        hint += " (RCLLM_HOME names this folder)"
    return f"{where}: cannot be used: {reason}{hint}"


def _silence_stdout() -> None:
    """Nobody reads any more, so that flushing at the end must not fail once again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
