"""A real Valkey or Redis server on a free port of this machine, for as long as a test needs it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
needs_server = pytest.mark.skipif(PROGRAM is None, reason="needs valkey-server or redis-server, which is not installed")


@contextmanager
def serving(*options: str) -> Iterator[int]:
    """The port that it listens on. It keeps nothing on disk."""
    if PROGRAM is None:
        pytest.skip("needs valkey-server or redis-server, which is not installed")
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [PROGRAM, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
        server = subprocess.Popen([*command, "--dir", folder, *options], stdout=subprocess.DEVNULL)
        try:
            _wait_for(port)
            yield port
        finally:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
