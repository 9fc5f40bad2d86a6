"""Servers that died by themselves are started again: after a pause, a few times, where there is room.

What is due stands in the record, so that the next leader goes on counting where the last one stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.operations import switch as actions
from vllm_sleep_tui.fleet.operations.acquire import locked
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.reconcile import recover
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store import last_failure as died
from vllm_sleep_tui.fleet.store.records import Record

PAUSES = (1.0, 10.0, 30.0)
"""Seconds before the first, second and third restart; there is no fourth within WINDOW."""
WINDOW = 600.0
NO_ROOM_PAUSE = 5.0
"""Seconds until a restart that found no room looks again."""
log = logging.getLogger(__name__)


def is_wanted(core: Core, record: Record) -> bool:
    """Whether the server died while it ran and its model's config wants it back."""
    fell = record.state is State.FAILED and record.fell is not None
    model = core.config.models.get(record.name)  # a reload may have removed it meanwhile
    return fell and model is not None and model.restart == "on-failure"


def recent(record: Record) -> tuple[float, ...]:
    """When it was restarted lately; a clock that was set back leaves times ahead of it, which count not."""
    now = time.time()
    return tuple(at for at in record.restarts if 0 <= now - at < WINDOW)


class Restarter:
    """Remembers when each failure was first seen, by a clock that nobody sets."""

    def __init__(
        self, core: Core, pauses: tuple[float, ...] = PAUSES, leads: Callable[[], bool] = lambda: True
    ) -> None:
        self._core = core
        self._leads = leads
        self._pauses = pauses
        self._seen: dict[tuple[str, float], float] = {}
        self._not_before: dict[str, float] = {}

    def is_due(self, name: str) -> bool:
        """Whether the model should be started again now."""
        record = self._core.records.read(name)
        if not is_wanted(self._core, record) or time.monotonic() < self._not_before.get(name, 0.0):
            return False
        tried = len(recent(record))
        seen = self._seen.setdefault((name, record.since), time.monotonic())
        return tried >= len(self._pauses) or time.monotonic() - seen >= self._pauses[tried]

    async def act(self, name: str) -> None:
        """Start it again and bring it to where it was; nobody is sent to sleep for it."""
        operation = Operation("restart", name)
        async with locked(self._core, name, operation, make_room=True) as room:
            record = self._core.records.read(name)
            if not is_wanted(self._core, record) or not self._leads():
                return
            tried = recent(record)
            if len(tried) >= len(self._pauses):
                self._give_up(record)
                return
            if room.leaving or not room.fits:
                self._not_before[name] = time.monotonic() + NO_ROOM_PAUSE
                return
            log.info("%s: restart %d of %d: %s", name, len(tried) + 1, len(self._pauses), record.reason)
            self._core.write(record, restarts=(*tried, time.time()), last_failure=died.keep(record))
            fell = State.ASLEEP if record.fell is State.ASLEEP else None
            await actions.bring_up(self._core, name, operation, fell=fell)
            await recover(self._core, name, operation)

    def _give_up(self, record: Record) -> None:
        """A crash loop: say so and leave it."""
        said = f"Restarted {len(self._pauses)} times within {WINDOW / 60:.0f} minutes, it died each time."
        log.warning("%s: %s", record.name, said)
        self._core.write(record, fell=None, reason=f"{record.reason} {said}")
