"""What all trainings hold to about their folder: whose it is, and what is said when a training goes astray.

Knows nothing of what is trained. Invariant: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rcllm.durable import check_writable
from rcllm.errors import ConfigError, ModelError

CHECKPOINT = "checkpoint.pt"


def check_folder(folder: Path, made: Sequence[str], record: str) -> None:
    """Whether a training may write into `folder`: asked before anything expensive begins.

    `made`: what the training writes and would replace. These names may be there if a checkpoint, or the file `record`
    that the training leaves beside its results, says that they are its own. Raises ConfigError, DataError.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: expected the name of a folder, which is made where there is none")
    check_writable(folder / CHECKPOINT)
    own = any((folder / name).exists() for name in (CHECKPOINT, record))
    if not own and (there := [name for name in made if (folder / name).exists()]):
        raise ConfigError(
            f"{folder} holds {', '.join(there)} of something else, which training would replace: name another folder"
        )


def not_numbers(what: str, folder: Path) -> ModelError:
    """The error of a training whose loss or weights became infinite or NaN; what is on disk is from before."""
    return ModelError(
        f"the {what} became infinite or not a number: the training went astray. What {folder} holds is from before "
        "that and is good; lower the learning rate and train into another folder"
    )
