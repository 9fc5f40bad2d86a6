"""What the history says, asked in a thread when something has happened: the dashboard's look at the past."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import (
    History,
    PastSwitch,
    Percentiles,
    Saved,
    Served,
    StateSpan,
    midnight,
)
from vllm_sleep_tui.fleet.store.history_tables import BUCKET

if TYPE_CHECKING:
    from vllm_sleep_tui.tui.state.operations import Operations

SETTLING_SECONDS = 4.0
"""What happened is written a moment after it shows on the screen; so long it is asked for again."""
SPACING_SECONDS = 1.0
STALE_SECONDS = 60.0
"""Without anything new the answer is kept so long."""
BUSY_SECONDS = 5.0
"""The same while a model answers."""
STRETCHES = 120
"""So many of them make up the window in which requests and tokens are told; none is shorter than is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """One answer of the history."""

    percentiles: Mapping[str, Mapping[int, Percentiles]] = field(default_factory=dict)
    """Of switches, by model and level."""
    cold_starts: Mapping[str, float] = field(default_factory=dict)
    """The usual one of each model, in seconds; a model whose is not known is left out."""
    switches_today: int = 0
    """To models that slept; a start is none."""
    saved_today: Saved = field(default_factory=lambda: Saved(switches=0, seconds=0.0))
    spans: tuple[StateSpan, ...] = ()
    switches: tuple[PastSwitch, ...] = ()
    """In the window, like the spans and what was served."""
    served: tuple[Served, ...] = ()


def read_past(history: History, models: Sequence[str], window: float) -> Past:
    """Ask for everything that the dashboard shows, over the last `window` seconds (blocks for ms)."""
    now = time.time()
    stretch = max(BUCKET, int(window / STRETCHES))
    colds = {name: history.usual_cold_start(name) for name in models}
    return Past(
        percentiles={name: history.percentiles(name) for name in models},
        cold_starts={name: seconds for name, seconds in colds.items() if seconds is not None},
        switches_today=sum(past.from_state is State.ASLEEP for past in history.switches_today()),
        saved_today=history.saved_since(midnight(now)),
        spans=tuple(history.states_between(now - window, now)),
        switches=tuple(history.switches_since(now - window)),
        served=tuple(history.served_between(now - window, now, stretch)),
    )


class PastReader:
    """Keeps the latest answer and asks anew when the fleet has changed."""

    def __init__(self, history: History, operations: Operations, answered: Callable[[], None]) -> None:
        self.latest = Past()
        self._history = history
        self._operations = operations
        self._answered = answered
        self._question: object = None
        self._changed_at = self._asked_at = 0.0
        self._is_asking = False

    def look(self, snapshot: FleetSnapshot, window: float) -> None:
        """Ask, if something is new, and return at once; `answered` is called when the answer differs."""
        now = time.monotonic()
        answering = [model.name for model in snapshot.models if _answers(model)]
        known = [(model.name, model.state, model.last_switch) for model in snapshot.models]
        question = (window, known, answering)
        if question != self._question:
            self._question, self._changed_at = question, now
        settling = now - self._changed_at < SETTLING_SECONDS and now - self._asked_at > SPACING_SECONDS
        is_new = self._asked_at <= self._changed_at
        is_stale = now - self._asked_at > (BUSY_SECONDS if answering else STALE_SECONDS)
        if self._is_asking or not (is_new or settling or is_stale):
            return
        self._is_asking, self._asked_at = True, now
        self._operations.spawn(self._ask([model.name for model in snapshot.models], window))

    async def _ask(self, models: Sequence[str], window: float) -> None:
        try:
            past = await asyncio.to_thread(read_past, self._history, models, window)
        finally:
            self._is_asking = False
        if past != self.latest:
            self.latest = past
            self._answered()


def _answers(model: ModelSnapshot) -> bool:
    serving = model.serving
    return serving is not None and bool(serving.running or serving.generation_tokens_per_s)
