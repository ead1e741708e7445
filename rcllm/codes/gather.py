"""Large gathers in pieces: one call of numpy keeps the interpreter, and requests that run would wait for it."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

A = TypeVar("A", bound=np.generic)
_PIECE = 1 << 16


def gathered(array: npt.NDArray[A], index: npt.NDArray[Any]) -> npt.NDArray[A]:
    """array[index] for whole numbers, along the first axis."""
    out = np.empty((len(index), *array.shape[1:]), array.dtype)
    for start in range(0, len(index), _PIECE):
        out[start : start + _PIECE] = array[index[start : start + _PIECE]]
    return out
