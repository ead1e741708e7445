"""Blocks that are read where LMDB maps them, and the read transactions that keep their bytes in place.

A lease is one read transaction. It lives until the last view of its blocks dies, and while it does LMDB reuses no page
that its blocks lie in. Knows nothing of blocks. Invariant: the map is not closed while a lease lives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import lmdb
import numpy as np


class Leases:
    """The leases of one environment, and the end of it."""

    def __init__(self, env: lmdb.Environment, clock: Callable[[], float], at_end: Callable[[], None]) -> None:
        """`at_end` is called when it was closed and the last lease has ended."""
        self._env, self._clock, self._at_end = env, clock, at_end
        self._pid = os.getpid()
        self._began: dict[int, float] = {}
        self._lock = threading.RLock()  # a lease may end by garbage collection, wherever its thread is
        self._closing = False

    def begin(self) -> Lease:
        with self._lock:
            assert not self._closing, "a closed store was asked for blocks"
            lease = Lease(self, self._env.begin(buffers=True))
            self._began[id(lease)] = self._clock()
            return lease

    def end(self, lease: Lease) -> None:
        if os.getpid() != self._pid:
            _FORKED.append(lease.txn)  # the slot in the lock file is the parent's, whose blocks must stay in place
            return
        with self._lock:
            del self._began[id(lease)]
            lease.txn.abort()
            if self._closing and not self._began:
                self._at_end()

    @property
    def are_closed(self) -> bool:
        """Whether no new one is given."""
        return self._closing

    def close(self) -> None:
        with self._lock:
            self._closing = True
            if not self._began:
                self._at_end()

    def __len__(self) -> int:
        return len(self._began)

    def oldest_s(self) -> float:
        with self._lock:
            return self._clock() - min(self._began.values()) if self._began else 0.0


_FORKED: list[Any] = []  # transactions of a parent process, never to be ended here


class Lease:
    """One read transaction. Ends with the last reference to it."""

    def __init__(self, leases: Leases, txn: Any) -> None:
        self._leases, self.txn = leases, txn

    def lend(self, data: memoryview) -> memoryview:
        """The same bytes, read-only, which keep the lease alive."""
        return np.asarray(_Lent(self, data)).data

    def __del__(self) -> None:
        self._leases.end(self)


class _Lent:
    """Bytes as numpy takes them in place: its array keeps this, and this keeps the lease."""

    def __init__(self, lease: Lease, data: memoryview) -> None:
        self._lease = lease
        self.__array_interface__ = {
            "data": (address_of(data), True),
            "shape": (len(data),),
            "typestr": "|u1",
            "version": 3,
        }


def address_of(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0]) if data.nbytes else 0
