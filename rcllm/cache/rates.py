"""How fast tiers are read and blocks are computed, learned from what was timed: what fetch or compute is decided by.

Never imports torch. Invariant: a rate is positive. What was timed long ago counts less, and a tier that is passed over
is thought a little faster each time, so that one bad moment does not condemn it for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rcllm.core.receipts import Source
from rcllm.durable import write
from rcllm.errors import ModelError
from rcllm.plain_json import read_json_if_there, to_json

_KEPT = 0.9  # of the weight of what was timed before, each time
_HOPE = 1.01
_FIRST_BYTES_PER_S: dict[Source, float] = {"host": 10e9, "disk": 1e9, "peer": 1e9, "shared": 100e6}
_FIRST_FLOPS_PER_S = 100e9
_FIRST_UP_BYTES_PER_S = 20e9
_FIRST_LOCKED_BYTES_PER_S = 1e12  # of page-locked memory: it is read where it is, and then goes up


@dataclass(slots=True)
class Rate:
    """Units per second."""

    per_s: float
    is_guess: bool = True  # nothing was timed so far, here or by whoever left it
    timed_s: float = 0.0  # how much time stands behind it, discounted
    _amount: float = 0.0

    def saw(self, amount: float, seconds: float) -> None:
        """Something of this size took so long."""
        if amount > 0.0 and seconds > 0.0:
            self._amount, self.timed_s = self._amount * _KEPT + amount, self.timed_s * _KEPT + seconds
            self.per_s, self.is_guess = self._amount / self.timed_s, False

    def ms(self, amount: float) -> float:
        return amount / self.per_s * 1e3

    def hope(self) -> None:
        """It was passed over, so it may have become faster unseen."""
        self.per_s *= _HOPE
        self._amount *= _HOPE


class Rates:
    """Bytes per second of each tier below the device, and FLOPs per second of the device. One thread writes each.

    up: bytes per second from the host to a GPU, beside what a tier takes; None on the CPU, which reads where it is.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        self.bytes_of: dict[Source, Rate] = {tier: Rate(first) for tier, first in _FIRST_BYTES_PER_S.items()}
        self.flops = Rate(_FIRST_FLOPS_PER_S)
        if on_gpu:
            self.bytes_of["host"] = Rate(_FIRST_LOCKED_BYTES_PER_S)
        self.up = Rate(_FIRST_UP_BYTES_PER_S) if on_gpu else None

    def fetch_ms(self, tier: Source, num_bytes: int) -> float:
        """Until a block of a tier is on the device; nothing for what is."""
        if tier == "device":
            return 0.0
        return self.bytes_of[tier].ms(num_bytes) + (self.up.ms(num_bytes) if self.up is not None else 0.0)

    def told(self) -> str:
        """For people: «disk 1.10 GB/s, computing 95 GFLOP/s»; what nothing was timed of is called a guess."""
        ways: list[tuple[str, Rate]] = list(self.bytes_of.items())
        ways += [] if self.up is None else [("host to GPU", self.up)]
        tiers = (f"{way} {rate.per_s / 1e9:,.2f} GB/s{_guessed(rate)}" for way, rate in ways)
        return ", ".join([*tiers, f"computing {self.flops.per_s / 1e9:,.0f} GFLOP/s{_guessed(self.flops)}"])

    def timed(self) -> dict[str, float]:
        """Those that something was timed of, by name and unit."""
        return {name: rate.per_s for name, rate in self._named() if not rate.is_guess}

    # ---- kept beside a store, so that the next process need not learn them again ----

    def save(self, path: Path) -> None:
        """Raises OSError."""
        write(path, to_json(self.timed()).encode())

    def load(self, path: Path) -> None:
        """Begins with what a process wrote; a file that is not there or says nothing useful is left alone."""
        try:
            known = read_json_if_there(path, "what a process learned of its tiers")
        except (ModelError, OSError):
            return
        for name, rate in self._named():
            per_s = known.get(name)
            if isinstance(per_s, float | int) and 0 < per_s < float("inf"):
                rate.per_s, rate.is_guess = float(per_s), False

    def _named(self) -> Iterator[tuple[str, Rate]]:
        yield from ((f"{tier}_bytes_per_s", rate) for tier, rate in self.bytes_of.items())
        yield "flops_per_s", self.flops
        if self.up is not None:
            yield "up_bytes_per_s", self.up


def _guessed(rate: Rate) -> str:
    return " (a first guess)" if rate.is_guess else ""
