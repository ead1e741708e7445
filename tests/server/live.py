"""A real server on a loopback port, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rcllm.config import ServerConfig
from rcllm.server.app import make_app
from rcllm.server.backend import Backend
from rcllm.server.run import HttpServer
from rcllm.server.viewers import Viewer


@contextmanager
def living(backend: Backend, config: ServerConfig | None = None, viewers: tuple[Viewer, ...] = ()) -> Iterator[str]:
    """Yields the address; drains at the end."""
    config = replace(config or ServerConfig(), port=0)
    listening, address = threading.Event(), list[str]()

    def told(where: str) -> None:
        address.append(where)
        listening.set()

    server = HttpServer(make_app(backend, config, viewers), config, told)
    thread = threading.Thread(target=server.run, name="server under test", daemon=True)
    thread.start()
    assert listening.wait(20), "the server did not come up"
    try:
        yield address[0]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
