"""Servers that died by themselves are started again: after a pause, a few times, where there is room.

What is due stands in the record, so that the next leader goes on counting where the last one stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.acquire import acquire
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.reconcile import reconcile
from vllm_sleep_tui.fleet.operations.supervised import Supervised
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store import last_failure
from vllm_sleep_tui.fleet.store.records import Record

PAUSES = (1.0, 10.0, 30.0)
"""Seconds before the first, second and third restart; there is no fourth within WINDOW."""
WINDOW = 600.0
NO_ROOM_PAUSE = 5.0
"""Seconds until a restart that found no room looks again."""
log = logging.getLogger(__name__)


def is_wanted(model: Model) -> bool:
    """Whether the server died while it ran and its model's config wants it back."""
    record = model.record
    died = record.state is State.FAILED and record.fell is not None
    config = model.core.config.models.get(model.name)  # a reload may have removed it meanwhile
    return died and config is not None and config.restart == "on-failure"


def recent(record: Record) -> tuple[float, ...]:
    """When it was restarted lately; a clock that was set back leaves times ahead of it, which count not."""
    now = time.time()
    return tuple(at for at in record.restarts if 0 <= now - at < WINDOW)


class Restarter:
    """Remembers when each failure was first seen, on the monotonic clock."""

    def __init__(self, pauses: tuple[float, ...] = PAUSES, leads: Callable[[], bool] = lambda: True) -> None:
        self._leads = leads
        self._pauses = pauses
        self._first_seen: dict[tuple[str, float], float] = {}
        self._not_before: dict[str, float] = {}

    def is_due(self, model: Model) -> bool:
        """Whether the model should be started again now, by its record as it was just read."""
        record, now = model.record, time.monotonic()
        if not is_wanted(model) or now < self._not_before.get(model.name, 0.0):
            return False
        tried = len(recent(record))
        first_seen = self._first_seen.setdefault((model.name, record.since), now)
        return tried >= len(self._pauses) or now - first_seen >= self._pauses[tried]

    async def act(self, model: Model) -> None:
        """Start it again and bring it to where it was; nobody is sent to sleep for it."""
        name, operation = model.name, Operation("restart", model.name)
        async with acquire(model, operation, make_room=True) as (room, _):
            record = model.record
            if not is_wanted(model) or not self._leads():
                return
            tried = recent(record)
            if len(tried) >= len(self._pauses):
                self._give_up(model)
                return
            if room.leaving or not room.fits:
                self._not_before[name] = time.monotonic() + NO_ROOM_PAUSE
                return
            log.info("%s: restart %d of %d: %s", name, len(tried) + 1, len(self._pauses), record.reason)
            model.write(restarts=(*tried, time.time()), last_failure=last_failure.keep(record))
            died_from = State.ASLEEP if record.fell is State.ASLEEP else None
            await Supervised(model).bring_up(operation, died_from=died_from)
            await reconcile(model, operation)

    def _give_up(self, model: Model) -> None:
        """A crash loop: say so and leave it."""
        why = f"Restarted {len(self._pauses)} times within {WINDOW / 60:.0f} minutes, it died each time."
        log.warning("%s: %s", model.name, why)
        model.write(fell=None, reason=f"{model.record.reason} {why}")
        model.publish("restart")
