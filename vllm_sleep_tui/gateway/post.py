"""Who opens the gateway: `serve` or the panel, one at a time for each config and user."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.config.types import GatewayConfig
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.fleet import Fleet

if TYPE_CHECKING:
    from vllm_sleep_tui.gateway.asks import AskView
    from vllm_sleep_tui.gateway.gateway import Gateway

LOOK_SECONDS = 0.5
"""Between two tries for the seat."""
RETRY_SECONDS = 5.0
"""Until a port that was taken is tried again."""
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
        """Begin to try for the seat; who tries already tries again now."""
        if self._task is not None:
            self._task.cancel()
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
        return GatewayView(url=url_of(self._config), is_open=False, note=self._note)

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
        from vllm_sleep_tui.gateway.gateway import Gateway  # only who opens one pays for it

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


def url_of(config: GatewayConfig) -> str:
    """What clients are given."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}/v1"
