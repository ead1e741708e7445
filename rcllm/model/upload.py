"""Numbers from the host to the device and back, without waiting for more than what was launched before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch


def is_near(device: torch.device) -> bool:
    """Whether the host may look at what is computed there without waiting for it."""
    return device.type == "cpu"


def upload(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """On the CPU the same memory; a GPU copies it when its turn comes, from pinned memory that stays until then."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Copies values to the host behind what was launched; what this returns waits for that copy, and for no more."""
    if is_near(values.device):
        return lambda: values
    here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> torch.Tensor:
        copied.synchronize()
        return here

    return arrived
