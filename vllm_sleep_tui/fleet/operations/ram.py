"""RAM for pinned pools: one first level 1 sleep at a time on the whole machine.

Two on different GPUs would both find the RAM free, and the second would fail in the middle of its sleep.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.room import check_ram
from vllm_sleep_tui.fleet.store.locks import LockBusyError, cure_for, describe, hold, holder


@contextlib.asynccontextmanager
async def room_to_pin(core: Core, name: str, operation: Operation, *, needed: bool) -> AsyncIterator[None]:
    """Hold the right to pin RAM if it is `needed`; raises RefusedError with the numbers if it is short."""
    if not needed:
        yield
        return
    try:
        async with hold([core.ram_lock()], holder("pinning", name), checkpoint=operation.checkpoint):
            check_ram(core, name)
            yield
    except LockBusyError as error:
        raise RefusedError(
            f"{name}: the right to pin RAM is held by {describe(error.holder)}.",
            cure_for(error.holder, error.path),
        ) from error
