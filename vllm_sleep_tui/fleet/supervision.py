"""Looks after the servers while a panel is open: what died is written down, what was cut off is settled."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.locks import LockBusyError, hold, holder
from vllm_sleep_tui.fleet.operation import Operation
from vllm_sleep_tui.fleet.recovery import is_unfinished, needs_care, recover

INTERVAL = 0.5
log = logging.getLogger(__name__)


class Watcher:
    """One task that looks twice a second, and one more for each model that needs care."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._task: asyncio.Task[None] | None = None
        self._care: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="watcher")

    async def close(self) -> None:
        """Stop looking; care under way is cut off, to be settled by whoever comes next."""
        tasks = [task for task in (self._task, *self._care.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._care = {name: task for name, task in self._care.items() if not task.done()}
            for name in self._core.config.models:
                if needs_care(self._core, name) and name not in self._care:
                    self._care[name] = asyncio.create_task(self._look_after(name), name=f"care of {name}")
            await asyncio.sleep(INTERVAL)

    async def _look_after(self, name: str) -> None:
        """Settle one model, unless somebody else holds its locks: then it is in good hands."""
        core = self._core
        gpus = {*core.model(name).gpus, *core.records.read(name).gpus}
        paths = [*core.gpu_locks(gpus), *core.model_locks({name})]
        with contextlib.suppress(LockBusyError, PanelError):
            async with hold(paths, holder("settling", name), limit=0.0):
                if is_unfinished(core, name):
                    log.info("settling %s", name)
                    await recover(core, name, Operation("settling", name))
