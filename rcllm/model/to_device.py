"""From the host to a device, in the order of what is launched there and without waiting for it.

A plain copy waits until the device has done all that was launched before, for memory that is not pinned may move.
Knows nothing of what is sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def is_near(device: torch.device) -> bool:
    """Whether the host may look at what is computed there without waiting for it."""
    return device.type == "cpu"


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; on the CPU it may share the array's memory."""
    there = torch.from_numpy(np.require(array, requirements=("C", "W")))
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)
