"""Models that nobody has used for a while go to sleep, later they are stopped, as their config says.

Idleness counts from the end of the last answer, or from the wake if there was none since. It is reckoned by a
clock that nobody sets; the time of day is looked at once for each answer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_sleep_tui.config.types import IdleConfig, parse_duration
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.acquire import acquire
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.room import own_level
from vllm_sleep_tui.fleet.operations.server import GATE_LIMIT, Server
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record

if TYPE_CHECKING:  # a panel that is opening does without it
    from vllm_sleep_tui.engine.client import Gate


class _Seen(msgspec.Struct, frozen=True):
    base: float
    """UTC seconds of the last use, as read."""
    begin: float
    """The same moment on the monotonic clock."""
    last: float | None
    """UTC seconds of the last request, as read: after the clock was set back it is before `base`."""


class Idleness:
    """How long each launch has been idle."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def seconds(self, record: Record, gate: Gate, *, wall: float, clock: float) -> float:
        """Seconds since the last use; `wall` is the time of day, `clock` the monotonic one."""
        launch = record.launch or ""
        known = self._seen.get(launch)
        base = self._base(record, gate, known)
        last = gate.last_request
        if gate.in_flight:
            self._seen[launch] = _Seen(base, clock, last)
        elif known is None or known.base != base:
            begin = clock - max(0.0, wall - base)
            self._seen[launch] = _Seen(base, begin if known is None else max(known.begin, begin), last)
        elif known.last != last:
            begin = clock - max(0.0, wall - (last or wall))
            self._seen[launch] = _Seen(base, max(known.begin, begin), last)
        return clock - self._seen[launch].begin

    @staticmethod
    def _base(record: Record, gate: Gate, known: _Seen | None) -> float:
        """The last use; falling asleep is none."""
        last = gate.last_request or 0.0
        if record.state is State.AWAKE:
            return max(last, record.since)
        return known.base if known else last or record.since


def due(config: IdleConfig, state: State, seconds: float) -> str | None:
    """What a model that is idle for so long should do: "stop", "sleep" or nothing."""
    if config.stop_after and seconds >= parse_duration(config.stop_after):
        return "stop"
    if config.sleep_after and state is State.AWAKE and seconds >= parse_duration(config.sleep_after):
        return "sleep"
    return None


def poll_seconds(config: IdleConfig) -> float | None:
    """How often to look, a twentieth of the shorter limit; None if neither is set."""
    limits = [parse_duration(text) for text in (config.sleep_after, config.stop_after) if text]
    return min(5.0, max(0.25, min(limits) / 20)) if limits else None


class InUseAgainError(RefusedError):
    """A request came after all."""


class StillIdle:
    """Awaited between drain and sleep: raises InUseAgainError if a request came after all."""

    def __init__(self, look: Callable[[], Awaitable[Gate]], seen: Gate, name: str) -> None:
        self._look = look
        self._seen = seen
        self._name = name

    async def check(self) -> None:
        """Compare the gate with what it was."""
        gate = await self._look()
        if gate.in_flight or gate.last_request != self._seen.last_request:
            raise InUseAgainError(f"{self._name} is in use again.", "It stays awake.")

    def __await__(self) -> Generator[Any, None, None]:
        return self.check().__await__()


async def put_away(model: Model, what: str, seen: Gate, leads: Callable[[], bool] = lambda: True) -> None:
    """Sleep or stop a model unless it has been used since `seen`, or requests wait for it; raises PanelError
    if it fails."""
    before, operation = model.record, Operation(what, model.name)
    async with acquire(model, operation, make_room=False):
        if not model.record.is_same_stay(before) or model.is_wanted or not leads():
            return
        client, server = model.client(), Server(model, operation)
        still = StillIdle(lambda: client.gate(GATE_LIMIT), seen, model.name)
        with contextlib.suppress(InUseAgainError):
            await still
            if what == "stop" or model.record.resolved_level == "none":
                await server.stop(force=False, unless=still)
            else:
                await server.fall_asleep(own_level(model.record), unless=still)


def now_idle(idleness: Idleness, record: Record, gate: Gate) -> float:
    """Seconds that the model is idle now."""
    return idleness.seconds(record, gate, wall=time.time(), clock=time.monotonic())
