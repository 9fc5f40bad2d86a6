"""A server that does not answer in time is silent only if it does nothing either.

Its guard answers within a millisecond. On a machine with many more busy processes than cores, or while vLLM's
API server is at work on a long prompt, that took more than 5 s, and healthy servers were ended for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vllm_sleep_tui.engine.failures import EngineTimeout
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.telemetry.processes import Effort, ProcessTable, effort

QUICK_SECONDS = 0.1
"""An answer that comes within this needs no look at what the server does, which takes 10 ms of a switch."""
T = TypeVar("T")


async def patiently(model: Model, ask: Callable[[], Awaitable[T]]) -> T:
    """The answer to `ask`, which may be asked twice; again while the server works, `limits.call` s in all.

    Raises what `ask` raises: EngineTimeout at once if the server did nothing meanwhile.
    """
    deadline = time.monotonic() + model.core.limits.call
    while True:
        before: dict[int, Effort] = {}
        asking = asyncio.ensure_future(ask())
        try:
            if not (await asyncio.wait({asking}, timeout=QUICK_SECONDS))[0]:
                before = await asyncio.to_thread(efforts, model.record)
            return await asking
        except EngineTimeout:
            after = await asyncio.to_thread(efforts, model.record)
            if time.monotonic() >= deadline or not is_working(before, after):
                raise
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def efforts(record: Record) -> dict[int, Effort]:
    """What the API server and what wraps it have done; the engines, which may spin for ever, are left out."""
    if record.server is None:
        return {}
    engines = frozenset(engine.pid for engine in record.engines)
    pids = (record.server.pid, *ProcessTable.read().descendants(record.server.pid, stop_at=engines))
    return {pid: now for pid in pids if (now := effort(pid)) is not None}


def is_working(earlier: dict[int, Effort], later: dict[int, Effort]) -> bool:
    """Whether one of the processes has used its processor in between, or waits for one."""
    return any(
        now.wants_to_run or (pid in earlier and now.seconds > earlier[pid].seconds)
        for pid, now in later.items()
    )
