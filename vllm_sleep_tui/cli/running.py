"""Runs a long operation from a shell: progress on stderr, Ctrl-C stops it at its next safe point."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from vllm_sleep_tui.cli.common import say
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import CancelledByUser
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.paths import state_dir

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.fleet import Fleet

Result = TypeVar("Result")
DETAIL_SECONDS = 1.0
"""A phase is printed at once, its details no more often than this."""


class Reporter:
    """Prints progress, a line for each step: ``qwen  loading  weights 2/4``."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, str, float]] = {}

    def __call__(self, progress: Progress) -> None:
        """Say what is new."""
        phase, detail, said_at = self._said.get(progress.model, ("", "", 0.0))
        if progress.phase == phase and (
            progress.detail == detail or time.monotonic() - said_at < DETAIL_SECONDS
        ):
            return
        self._said[progress.model] = (progress.phase, progress.detail, time.monotonic())
        say("  ".join(filter(None, (progress.model, progress.phase, progress.detail))))


def with_fleet(
    loaded: LoadedConfig, act: Callable[[Fleet], Awaitable[Result]], *, looks: bool = True
) -> Result:
    """Open the fleet and act on it, see `Fleet`; raises PanelError, CancelledByUser after an interruption."""

    async def opened() -> Result:
        from vllm_sleep_tui.fleet.fleet import Fleet  # which a usage error does without

        fleet = Fleet(loaded, state_dir(), looks=looks)
        try:
            async with fleet:
                return await act(fleet)
        finally:
            if fleet.history_note:  # known now: it is written at the end
                say(fleet.history_note)

    return asyncio.run(_interruptible(opened))


async def _interruptible(begin: Callable[[], Awaitable[Result]]) -> Result:
    """Await it; the first signal cancels it, and it is waited for, because it ends at its next safe point."""
    task = asyncio.ensure_future(begin())
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if not task.cancelling():
            task.cancel()
        say("Stopping at the next safe point…")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        raise CancelledByUser("Interrupted.") from None
