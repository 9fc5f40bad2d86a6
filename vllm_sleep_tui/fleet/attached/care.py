"""What the leader does for attached servers: idle ones go to sleep, those that hang are named, none is ended.

Their use is what `/metrics` tells: requests running and waiting, and counters that move with each answer. It
is reckoned from the leader's first look on, by a clock that nobody sets.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.engine.metrics import Page
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.attached.backend import Attached
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import LockBusyError, hold, holder
from vllm_sleep_tui.fleet.store.records import Hang
from vllm_sleep_tui.fleet.supervision import idle

log = logging.getLogger(__name__)


class Use(msgspec.Struct, frozen=True):
    """What a page of metrics tells of a server's use."""

    under_way: float
    signs: tuple[float | None, ...]


class _Still(msgspec.Struct, frozen=True):
    use: Use
    since: float
    """On the monotonic clock: nothing has moved since."""


async def read_use(model: Model) -> Use | None:
    """The server's use now; None if it does not tell."""
    try:
        page = Page.read(await Attached(model).client.metrics(), time.monotonic())
    except EngineError:
        return None
    if page.under_way is None:
        return None
    return Use(page.under_way, (*page.signs_of_life, page.requests))


class AttachedCare:
    """Remembers of each attached server since when nothing moved."""

    def __init__(self, hang_limit: float, leads: Callable[[], bool] = lambda: True) -> None:
        self._leads = leads
        self._hang_limit = hang_limit
        self._still: dict[str, _Still] = {}
        self._refused: dict[str, float | None] = {}

    async def look(self, model: Model) -> None:
        """Does it hang, is it idle? Raises PanelError if it is and cannot be put to sleep."""
        name, seen = model.name, Attached(model).last_probe
        if seen is None or seen.state is not State.AWAKE:
            self._still.pop(name, None)
            await self._note_hang(model, None)
            return
        use = await read_use(model)
        seconds = self._seconds(name, use)
        unsure = 0.0 if seen.unsure_since is None else time.monotonic() - seen.unsure_since
        symptom = None
        if use is not None and use.under_way and seconds >= self._hang_limit:
            symptom = f"{use.under_way:.0f} requests under way and no token"
        elif unsure >= self._hang_limit:
            symptom = "no word on whether it sleeps"
        await self._note_hang(model, symptom)
        is_idle = use is not None and not use.under_way and seen.unsure_since is None
        if (
            use is not None
            and is_idle
            and not model.is_wanted
            and idle.due(model.config.idle, State.AWAKE, seconds) == "sleep"
        ):
            await self._put_away(model, use, seen.since)

    def _seconds(self, name: str, use: Use | None) -> float:
        """Seconds since anything moved; 0 where it is not known."""
        if use is None:
            self._still.pop(name, None)
            return 0.0
        known, now = self._still.get(name), time.monotonic()
        if known is None or known.use != use:
            self._still[name] = _Still(use, now)
            return 0.0
        return now - known.since

    async def _put_away(self, model: Model, use: Use, since: float | None) -> None:
        name = model.name
        if self._refused.get(name, 0.0) == since:
            return

        async def still_idle() -> None:
            if await read_use(model) != use or not self._leads():
                raise idle.InUseAgainError(f"{name} is in use again.", "It stays awake.")

        log.info("%s: sleep, nobody has used it for a while", name)
        try:
            with contextlib.suppress(idle.InUseAgainError):
                await Attached(model).sleep(None, Operation("sleep", name), unless=still_idle)
        except PanelError:
            self._refused[name] = since  # no sleep mode, say: once is enough
            raise

    async def _note_hang(self, model: Model, symptom: str | None) -> None:
        """Write down that it hangs, or no longer; left for the next look while somebody operates on it."""
        name, known = model.name, model.read().hang
        if symptom == (known and known.symptom) and (known is None or known.by == actor()):
            return
        with contextlib.suppress(LockBusyError):
            async with hold([model.lock], holder("looking", name), limit=0.0):
                since = time.time() - self._hang_limit
                hang = None if symptom is None else Hang(symptom=symptom, since=since, by=actor())
                model.read()
                model.write(hang=hang)
            if symptom is not None:
                log.warning("%s: it hangs: %s", name, symptom)
