"""Numbers from the host to the device, without waiting: whoever waits there waits for all that was launched before."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def upload(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """On the CPU the same memory; a GPU copies it when its turn comes, from pinned memory that stays until then."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
