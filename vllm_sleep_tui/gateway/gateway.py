"""The gateway as a whole: opened by `serve` or the panel, one at a time for each config and user."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

import msgspec

from vllm_sleep_tui.config.types import GatewayConfig
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.gateway.app import App
from vllm_sleep_tui.gateway.asks import Asks, AskView, view
from vllm_sleep_tui.gateway.desk import Desk
from vllm_sleep_tui.gateway.names import Names

LOOK_SECONDS = 0.5
"""Between two tries for the seat."""
RETRY_SECONDS = 5.0
"""Until a port that was taken is tried again."""
ENDING_SECONDS = 1
"""For answers under way when it closes."""
KEEP_ALIVE_SECONDS = 65
SEAT = "gateway"
NOT_OPEN = "not opened here"
log = logging.getLogger(__name__)


class GatewayView(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway for a screen."""

    url: str
    is_open: bool
    note: str = ""
    """Why it is not open."""
    asks: tuple[AskView, ...] = ()
    """Under way, the first one first."""
    last: tuple[AskView, ...] = ()
    """Over, the last one first."""
    switches: int = 0
    """That requests have caused."""


class Gateway:
    """One endpoint over the models of a fleet, while it is open."""

    def __init__(self, fleet: Fleet, config: GatewayConfig) -> None:
        self.config = config
        self.url = f"http://{_in_url(config.host)}:{config.port}/v1"
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


class Post:
    """Keeps a gateway open in this process, unless another one of this user does so for the same config."""

    def __init__(self, fleet: Fleet, config: GatewayConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._seat = fleet.seat(SEAT)
        self._gateway: Gateway | None = None
        self._note = NOT_OPEN
        self._task: asyncio.Task[None] | None = None
        self._closing = 0
        self._ending: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to try for the seat."""
        self._task = asyncio.create_task(self._keep())

    @property
    def is_started(self) -> bool:
        """Whether it is open here, or is to be as soon as it can."""
        return self._task is not None

    @property
    def is_switching(self) -> bool:
        """Whether a switch that a request caused is under way."""
        return self._gateway is not None and self._gateway.is_switching

    def view(self) -> GatewayView:
        """How it is now."""
        if self._gateway is not None:
            return self._gateway.view()
        return GatewayView(
            url=f"http://{_in_url(self._config.host)}:{self._config.port}/v1", is_open=False, note=self._note
        )

    async def reload(self, config: GatewayConfig) -> None:
        """Go on with a changed config; another address, or other keys, are a new gateway."""
        if config != self._config:
            self._config = config
            await self._close_gateway()
        elif self._gateway is not None:
            self._gateway.reload()

    @property
    def is_closing(self) -> bool:
        """Whether it is on its way out."""
        return self._closing > 0 or self._ending is not None

    async def close(self) -> None:
        """Close it and leave the seat."""
        self._closing += 1
        try:
            task, self._task = self._task, None
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await self._close_gateway()
            self._seat.leave()
            self._note = NOT_OPEN
        finally:
            self._closing -= 1

    async def _keep(self) -> None:
        while True:
            pause = LOOK_SECONDS
            if not self._seat.take():
                if self._gateway is not None:
                    log.warning("gateway: another process has it now")
                    await self._close_gateway()
                who = self._seat.who()
                self._tell(f"another process has it (pid {who.pid})" if who else "another process has it")
            elif self._gateway is None and not self.is_closing:  # who closes still has the port
                gateway = Gateway(self._fleet, self._config)
                try:
                    await gateway.open()
                except OperationError as error:
                    self._tell(f"{error.what} {error.cure}")
                    pause = RETRY_SECONDS
                except Exception:  # it is tried again, and nothing else ends with it
                    log.exception("gateway: something unforeseen kept it from opening")
                    pause = RETRY_SECONDS
                else:
                    self._gateway = gateway
                    self._note = ""
                    log.info("gateway: %s", gateway.url)
            await asyncio.sleep(pause)

    def _tell(self, note: str) -> None:
        if note != self._note:
            self._note = note
            log.warning("gateway: %s", note)

    async def _close_gateway(self) -> None:
        """Until it is closed, whoever began that: who is cancelled meanwhile leaves it closing."""
        if self._gateway is not None:
            gateway, self._gateway = self._gateway, None
            self._ending = asyncio.create_task(gateway.close())
            self._ending.add_done_callback(self._ended)
        if self._ending is not None:
            await asyncio.shield(self._ending)

    def _ended(self, _: object) -> None:
        self._ending = None


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


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
