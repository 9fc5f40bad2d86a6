"""A witness that looks at the records all the time: no two models of one GPU are ever being moved at once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import combinations
from typing import Self

from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record

MOVING = frozenset({State.STARTING, State.FALLING_ASLEEP, State.WAKING, State.STOPPING})
LOOK_SECONDS = 0.005


class Watch:
    """Looks until it is left; remembers every launch and every overlap."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.launches: set[str] = set()
        self._found: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def take(self) -> list[str]:
        """The overlaps seen since the last call."""
        found, self._found = self._found, []
        return found

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """One look. Two records are not read in one moment, so the first is read again after the second."""
        records = [self.core.records.read(name) for name in self.core.config.models]
        self.launches |= {record.launch for record in records if record.launch}
        moving = [record for record in records if record.state in MOVING]
        for one, other in combinations(moving, 2):
            if set(self._gpus(one)) & set(self._gpus(other)) and self._is_still(one):
                self._found.append(f"overlap: {one.name} is {one.state} and {other.name} is {other.state}")

    def _gpus(self, record: Record) -> tuple[int, ...]:
        return record.gpus or self.core.model_config(record.name).gpus

    def _is_still(self, record: Record) -> bool:
        now = self.core.records.read(record.name)
        return (now.state, now.since) == (record.state, record.since)
