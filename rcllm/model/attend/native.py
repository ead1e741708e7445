"""Builds, loads and calls the compiled CPU kernels of `kernels.cpp` and its headers.

Knows nothing of models. Invariant: a library is used only on the kind of processor, and for the source, that it was
compiled for: its file name is a hash of both. Without a C++ compiler there are no kernels, `kernels()` returns None,
and everything runs on torch alone, slower and equally right. `RCLLM_NATIVE=0` forces that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from rcllm.fetch import cache_dir
from rcllm.model.spec import INT8_GROUP, WEIGHT_GROUP

SOURCE = Path(__file__).with_name("kernels.cpp")
HEADERS = (
    "attention.h",
    "cached.h",
    "integers.h",
    "layers.h",
    "products.h",
    "quantised.h",
    "tiles.h",
    "vectors.h",
)  # that it includes, beside it
INSTRUCTIONS = {"bf16": "AVX512-BF16", "int8": "VNNI"}  # that products of less than fp32 are for
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi")


class Kernels:
    """The library's functions behind checked tensor arguments; all tensors fp32 on the CPU, rows contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.panel: int = library.rcllm_panel()  # outputs of a packed matrix that are stored together
        has = {"fp32": 1, "bf16": library.rcllm_has_bf16(), "int8": library.rcllm_has_vnni()}
        self.products = frozenset(name for name in has if has[name])  # the processor's; others are imitated, to the bit
        self.row_tile: int = library.rcllm_row_tile()  # rows, times heads per KV head, that attention computes together
        self.int8_group: int = library.rcllm_int8_group()
        assert self.int8_group == INT8_GROUP, "blocks have one layout"
        assert library.rcllm_weight_group() == WEIGHT_GROUP, "quantised matrices have one layout"

        for count in (library.rcllm_quantised_bytes, library.rcllm_room, library.rcllm_product_room):
            count.restype = ctypes.c_int64

    def count(self, name: str, *arguments: torch.Tensor | int) -> int:
        """What `rcllm_<name>` returns."""
        return int(getattr(self._library, f"rcllm_{name}")(*(_argument(value) for value in arguments)))

    def call(self, name: str, *arguments: torch.Tensor | int | float | None) -> None:
        """Calls `rcllm_<name>`; tensors go as pointers (None as null), ints as int64, floats as float."""
        getattr(self._library, f"rcllm_{name}")(*(_argument(value) for value in arguments))


def _argument(value: torch.Tensor | int | float | None) -> object:
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu", "kernels take CPU tensors"
        assert value.stride(-1) in (0, 1), "kernels take contiguous rows"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if value is not None else ctypes.c_void_p(None)


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The kernels of this machine, compiled on first use (seconds), or None where that is not possible."""
    if os.environ.get("RCLLM_NATIVE") == "0" or (compiler := find_compiler()) is None:
        return None
    try:
        library = cache_dir() / "native" / f"{_identity(compiler)}.so"
        if not library.exists():
            _build(compiler, library)
        return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.CalledProcessError):
        return None


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, else g++ (the kernels use its vector extensions)."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _identity(compiler: str) -> str:
    """Names the source, the flags, the compiler and the instruction set that `-march=native` means here."""
    target = _run([compiler, *FLAGS, "-Q", "--help=target"])
    version = _run([compiler, "--version"])
    parts: Sequence[bytes] = (
        SOURCE.read_bytes(),
        *(SOURCE.with_name(name).read_bytes() for name in HEADERS),
        " ".join(FLAGS).encode(),
        target,
        version,
        platform.machine().encode(),
    )
    return hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()


def _build(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        # OpenMP is not linked: its symbols resolve to the runtime that torch has loaded. A second runtime would keep a
        # second pool of spinning threads on the same cores.
        _run([compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.replace(library)


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
