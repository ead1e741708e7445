"""What a training keeps in one file, so that a run that was killed goes on: weights, optimiser and counters.

Knows nothing of what is trained. Invariant: the file is whole or not there, and is read back only under the settings
that it was written with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rcllm.durable import renamed, writing
from rcllm.errors import ConfigError, DataError

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`checkpoint.pt` in a training's folder; `restore` changes network and optimiser in place."""

    folder: Path
    network: torch.nn.Module
    optimiser: torch.optim.Optimizer
    settings: Mapping[str, Any]  # JSON values that must be the same for a run to go on
    told: str = "settings"  # what `settings` holds, in words

    def save(self, state: Mapping[str, Any]) -> None:
        """`state`: the counters, as plain values. Raises DataError."""
        content = {
            "settings": dict(self.settings),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "state": dict(state),
        }
        path = self.folder / CHECKPOINT
        with writing(path), renamed(path) as partial, partial.open("wb") as file:
            torch.save(content, file)

    def restore(self) -> dict[str, Any] | None:
        """The state that was saved; None where nothing was. Raises ConfigError for other settings, DataError."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        content = _read(path)
        if changes := _changes(content["settings"], self.settings):
            raise ConfigError(
                f"{path} was made with other {self.told}: {', '.join(changes)}; use another folder, or delete this one "
                "to begin anew"
            )
        try:
            self.network.load_state_dict(content["network"])
            self.optimiser.load_state_dict(content["optimiser"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _no_checkpoint(path, error) from error
        state: dict[str, Any] = content["state"]
        return state


def _read(path: Path) -> dict[str, Any]:
    """Raises DataError for what is no whole checkpoint; the reader of zipped pickles raises many kinds."""
    try:
        content = torch.load(path, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise _no_checkpoint(path, error) from error
    if not isinstance(content, dict) or not content.keys() >= {"settings", "network", "optimiser", "state"}:
        raise _no_checkpoint(path, "it holds something else")
    return content


def _no_checkpoint(path: Path, why: object) -> DataError:
    reason = next(iter(str(why).splitlines()), "")
    return DataError(f"{path} is not a whole checkpoint of this training ({reason}); remove it to begin anew")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = sorted(old.keys() | new.keys())
    return [f"{name} {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name)]
