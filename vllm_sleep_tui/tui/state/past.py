"""What was, for the screen: the history's latest answer, and the GPUs' figures since the panel was opened."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot, ModelSnapshot
from vllm_sleep_tui.tui.state.operations import Operations
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet

STALE_SECONDS = 60.0
"""What is no event, requests and tokens, is asked for so often."""
BUSY_SECONDS = 5.0
"""The same while a model answers."""


class PastReader:
    """Keeps the history's latest answer and asks anew when something has been added to it."""

    def __init__(self, fleet: PanelFleet, operations: Operations, answered: Callable[[], None]) -> None:
        self.latest = Past()
        self._fleet = fleet
        self._operations = operations
        self._answered = answered
        self._question: object = None
        self._asked_at = 0.0
        self._is_new = True
        self._is_asking = False

    def heard(self) -> None:
        """An event has been kept: the next look asks."""
        self._is_new = True

    def look(self, snapshot: FleetSnapshot, window: float) -> None:
        """Ask, if something is new, and return at once; `answered` is called when the answer differs."""
        now = time.monotonic()
        answering = [model.name for model in snapshot.models if _answers(model)]
        is_other = self._question != (window, answering)
        is_stale = now - self._asked_at > (BUSY_SECONDS if answering else STALE_SECONDS)
        if self._is_asking or not (self._is_new or is_other or is_stale):
            return
        self._question, self._is_new = (window, answering), False
        self._is_asking, self._asked_at = True, now
        self._operations.spawn(self._ask(window))

    async def _ask(self, window: float) -> None:
        try:
            past = await self._fleet.past(window)
        finally:
            self._is_asking = False
        if past != self.latest:
            self.latest = past
            self._answered()


def _answers(model: ModelSnapshot) -> bool:
    serving = model.serving
    return serving is not None and bool(serving.running or serving.generation_tokens_per_s)


# ── the GPUs' figures ────────────────────────────────────────────────────────────────────────────────────


class Point(msgspec.Struct, frozen=True):
    """One reading."""

    time: float
    """UTC seconds."""
    value: float | None
    """None: not known at that time."""


class Ring:
    """Keeps the last `length` readings and forgets the older ones."""

    def __init__(self, length: int) -> None:
        self._points: deque[Point] = deque(maxlen=length)

    def __len__(self) -> int:
        return len(self._points)

    def append(self, time: float, value: float | None) -> None:
        """Add a reading taken at `time` (UTC seconds)."""
        self._points.append(Point(time, value))

    @property
    def latest(self) -> Point | None:
        """The newest reading; None before the first."""
        return self._points[-1] if self._points else None

    def since(self, time: float) -> tuple[Point, ...]:
        """The readings taken at `time` (UTC seconds) or later, oldest first."""
        return tuple(point for point in self._points if point.time >= time)


FINE_SECONDS, FINE_COUNT = 1.0, 600
"""Ten minutes to the second."""
COARSE_SECONDS, COARSE_COUNT = 20.0, 4320
"""A day, three readings a minute."""


class Series:
    """One figure of one GPU: the last minutes finely, the day before coarsely."""

    def __init__(self) -> None:
        self._fine = Ring(FINE_COUNT)
        self._coarse = Ring(COARSE_COUNT)

    def append(self, time: float, value: float | None) -> None:
        """Add a reading; those that come too close together are left out."""
        for ring, spacing in ((self._fine, FINE_SECONDS), (self._coarse, COARSE_SECONDS)):
            if ring.latest is None or time - ring.latest.time >= 0.9 * spacing:
                ring.append(time, value)

    def since(self, start: float) -> tuple[Point, ...]:
        """The readings from a moment on, oldest first."""
        fine = self._fine.since(start)
        first = fine[0].time if fine else start
        older = self._coarse.since(start) if first > start + FINE_SECONDS else ()
        return (*(point for point in older if point.time < first), *fine)


RATES, RATE_SECONDS = 5, 1.0
"""So many rates of generation are kept of each model, no closer together."""


class Readings:
    """Utilisation (per cent) and memory (share of the card, per cent) of each GPU, tokens of each model."""

    def __init__(self) -> None:
        self._utilization: dict[str, Series] = {}
        self._memory: dict[str, Series] = {}
        self._rates: dict[str, Ring] = {}

    def see(self, snapshot: FleetSnapshot) -> None:
        """Remember this moment."""
        for gpu in snapshot.gpus:
            self.utilization(gpu).append(snapshot.time, gpu.utilization)
            self.memory(gpu).append(snapshot.time, _share(gpu))
        for model in snapshot.models:
            rate = None if model.serving is None else model.serving.generation_tokens_per_s
            if rate is None:
                self._rates.pop(model.name, None)
                continue
            ring = self._rates.setdefault(model.name, Ring(RATES))
            if ring.latest is None or snapshot.time - ring.latest.time >= 0.9 * RATE_SECONDS:
                ring.append(snapshot.time, rate)

    def tokens(self) -> dict[str, tuple[float, ...]]:
        """The last generated tokens per second of each model that is awake."""
        return {
            name: tuple(point.value or 0.0 for point in ring.since(0.0)) for name, ring in self._rates.items()
        }

    def utilization(self, gpu: GpuSnapshot) -> Series:
        """How busy it was."""
        return self._utilization.setdefault(gpu.uuid, Series())

    def memory(self, gpu: GpuSnapshot) -> Series:
        """How full it was."""
        return self._memory.setdefault(gpu.uuid, Series())


def _share(gpu: GpuSnapshot) -> float | None:
    if gpu.used_bytes is None or not gpu.total_bytes:
        return None
    return 100.0 * gpu.used_bytes / gpu.total_bytes
