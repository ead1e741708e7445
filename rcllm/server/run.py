"""The application as a process: a socket, signals, logs, and a garbage collector that stays out of the way.

Knows nothing of endpoints. Invariant: the first signal drains, the second ends at once; nothing listens at an address
that others reach unless there are keys or somebody said that it may.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rcllm.config import ServerConfig
from rcllm.errors import ConfigError
from rcllm.server.app import make_app
from rcllm.server.backend import Backend
from rcllm.server.keys import check_address
from rcllm.server.patience import Patience
from rcllm.server.served import Served
from rcllm.server.spans import Spans
from rcllm.server.viewers import Viewer

logger = logging.getLogger(__name__)
_LOOK_S = 0.2  # how often warming is asked after


class HttpServer(uvicorn.Server):
    """`run` returns when it was told to end and has drained. `on_listening` is told the address."""

    def __init__(self, app: FastAPI, config: ServerConfig, on_listening: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=Patience,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(config.drain_s) + 1,
            )
        )
        self._served: Served = app.state.served
        self._on_listening = on_listening
        self._freezing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            self._freezing = asyncio.create_task(self._freeze())

    async def _freeze(self) -> None:
        """Once warm, what is there stays: a full collection would look at all of it, and stop a request meanwhile."""
        while self._served.backend.stats().warmth.running:
            await asyncio.sleep(_LOOK_S)
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # a pass that runs could not be ended in any other way
        logger.info("draining: requests under way are answered, no new ones are taken; a second signal ends at once")
        self._served.is_closing = self.should_exit = True


def check_free(config: ServerConfig) -> None:
    """Raises ConfigError for an address that cannot be listened at, before anything is loaded for it."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise _not_there(config, error) from error  # what else is wrong may be of one of several addresses


def _not_there(config: ServerConfig, error: BaseException) -> ConfigError:
    why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return ConfigError(
        f"the server could not begin at {config.host}:{config.port}{why}: is another one there? Choose another --port"
    )


def serve(
    backend: Backend,
    config: ServerConfig,
    on_listening: Callable[[str], None] = lambda address: None,
    viewers: tuple[Viewer, ...] = (),
    spans: Spans | None = None,
) -> None:
    """Listens until a signal comes. Raises ConfigError for an address that may not be used, or is taken."""
    check_address(config)
    server = HttpServer(make_app(backend, config, viewers, spans), config, on_listening)
    try:
        server.run()
    except SystemExit as error:  # uvicorn has logged why
        raise _not_there(config, error) from error
