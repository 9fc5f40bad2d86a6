"""The gateway as a whole, while it is open; `Post` keeps it so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from vllm_sleep_tui.config.types import GatewayConfig
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.gateway.app import App
from vllm_sleep_tui.gateway.asks import Asks, view
from vllm_sleep_tui.gateway.desk import Desk
from vllm_sleep_tui.gateway.names import Names
from vllm_sleep_tui.gateway.post import GatewayView, url_of

ENDING_SECONDS = 1
"""For answers under way when it closes."""
KEEP_ALIVE_SECONDS = 65


class Gateway:
    """One endpoint over the models of a fleet, while it is open."""

    def __init__(self, fleet: Fleet, config: GatewayConfig) -> None:
        self.config = config
        self.url = url_of(config)
        self.asks = Asks()
        self._fleet = fleet
        self._desk = Desk(fleet, config, self.asks, fleet.want)
        self._app = App(fleet, config, self._desk, self.asks, self._names())
        self._server: Any = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def is_switching(self) -> bool:
        """Whether a switch that a request caused is under way."""
        return self._desk.is_switching

    async def open(self) -> None:
        """Listen and serve; raises OperationError if the port is not to be had."""
        import uvicorn  # only who opens a gateway pays for it

        from vllm_sleep_tui.gateway.server import BoundedProtocol

        listener = _listen(self.config)
        config = uvicorn.Config(
            self._app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=2048,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=ENDING_SECONDS,
        )
        self._server = uvicorn.Server(config)
        # Signals are for who has opened it.
        self._server.capture_signals = contextlib.nullcontext
        self._desk.start()
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    def reload(self) -> None:
        """The config's models have changed."""
        self._app.names = self._names()

    async def close(self) -> None:
        """Refuse who waits, let answers under way end for a moment, and stop."""
        await self._desk.close()
        if self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait({self._serving}, timeout=ENDING_SECONDS + 1)
        self._app.close()

    def view(self) -> GatewayView:
        """How it is now."""
        return GatewayView(
            url=self.url,
            is_open=True,
            asks=tuple(view(ask) for ask in self.asks.under_way),
            last=tuple(reversed(self.asks.last)),
            switches=sum(self.asks.switches.values()),
        )

    def _names(self) -> Names:
        models = self._fleet.loaded.config.models
        return Names(
            {name: self._fleet.served_names(name) for name in models},
            {name: self._fleet.adapters(name) for name in models},
        )


def _listen(config: GatewayConfig) -> socket.socket:
    """A listening socket; raises OperationError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named, as asyncio turns Nagle's algorithm off only for what says that it is TCP: 40 ms a request.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OperationError(
            f"Port {config.port} of {config.host} is not to be had: {error.strerror}.",
            "End what has it, or choose another with `gateway: {port: …}`.",
        ) from None
    return listener
