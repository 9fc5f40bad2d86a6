"""Loops that look again and again, and outlive what nobody foresaw."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator

log = logging.getLogger(__name__)
_BEGAN = time.monotonic()


def until_beat(interval: float) -> float:
    """Seconds until the next whole `interval` of this process's life.

    Who waits for beats wakes with the others: at rest, to wake a process takes longer than most looks.
    """
    return interval - (time.monotonic() - _BEGAN) % interval


class FaultLog:
    """Around one look of a loop; each thing that went wrong in it is logged once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    @contextlib.contextmanager
    def catch(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is logged, and that is all."""
        try:
            yield
        except Exception as error:
            fault = f"{what}: {error!r}"
            if fault not in self._logged:
                self._logged.add(fault)
                log.exception("%s went wrong", what)


class Poller:
    """Calls `look` at each beat of `interval` seconds from `start` to `close`, the first time at once."""

    def __init__(self, name: str, interval: float, look: Callable[[], Awaitable[None]]) -> None:
        self._name = name
        self.interval = interval
        """May be changed at any time."""
        self._look = look
        self._faults = FaultLog()
        self._task: asyncio.Task[None] | None = None
        self._rest: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Stop looking; a look under way is cut off."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def hurry(self) -> None:
        """Look at once, without waiting for the next beat."""
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with self._faults.catch(self._name):
                await self._look()
            self._rest = loop.create_future()
            beat = loop.call_later(until_beat(self.interval), self.hurry)
            try:
                await self._rest
            finally:
                beat.cancel()
