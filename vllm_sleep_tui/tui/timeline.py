"""When each model was awake, asleep, or on its way, over a window of minutes to a day."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from textual.geometry import Size

from vllm_sleep_tui.fleet.history import StateSpan
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.detail import rule
from vllm_sleep_tui.tui.paint import Line, Painted, Span, left
from vllm_sleep_tui.tui.view import View

_NAME_WIDTH = 12


class Window(NamedTuple):
    """How far back a picture goes."""

    seconds: float
    words: str
    short: str


WINDOWS = (
    Window(600.0, "10 minutes", "10 min"),
    Window(3600.0, "hour", "1 h"),
    Window(6 * 3600.0, "6 hours", "6 h"),
    Window(86400.0, "24 hours", "24 h"),
)

Change = tuple[float, State]
"""When (UTC seconds) which state was entered."""


class Lanes:
    """The states of each model over time: what the history told, and since then what the panel saw."""

    def __init__(self) -> None:
        self._told: dict[str, list[Change]] = {}
        self._seen: dict[str, list[Change]] = {}
        self._spans: Sequence[StateSpan] = ()

    def hear(self, spans: Sequence[StateSpan]) -> None:
        """Take the history's answer in place of the last one."""
        if spans is self._spans:
            return
        self._spans, self._told = spans, {}
        for span in spans:
            self._told.setdefault(span.model, []).append((span.start, span.state))

    def see(self, snapshot: FleetSnapshot) -> None:
        """Remember what changed; what was before the first look is told by `since`."""
        for model in snapshot.models:
            changes = self._seen.setdefault(model.name, [])
            if not changes or changes[-1][1] is not model.state:
                changes.append((_entered(model, snapshot.time, changes), model.state))
            while len(changes) > 1 and changes[1][0] < snapshot.time - WINDOWS[-1].seconds:
                del changes[0]

    def changes(self, name: str) -> list[Change]:
        """All that is known of a model, the oldest first; what both tell is the history's."""
        told = self._told.get(name, [])
        after = told[-1][0] if told else 0.0
        return [*told, *(change for change in self._seen.get(name, []) if change[0] > after)]


def _entered(model: ModelSnapshot, now: float, before: Sequence[Change]) -> float:
    if model.since is None:
        return now
    # A death is seen before it is written down: its `since` is still that of the state before.
    return now if before and model.since <= before[-1][0] else model.since


def cells_of_states(changes: Sequence[Change], end: float, seconds: float, count: int) -> list[State | None]:
    """The state in each of `count` cells up to `end`; None where nobody looked.

    What is short must not vanish: a cell with a failure in it shows that, one with a wake in it the wake.
    """
    found: list[State | None] = [None] * count
    step, start = seconds / count, end - seconds
    for (begin, state), following in zip(changes, [*changes[1:], None], strict=True):
        stop = end if following is None else following[0]
        if stop <= start or begin >= end:
            continue
        first, last = int((max(begin, start) - start) / step), int((min(stop, end) - start) / step)
        for cell in range(first, min(last + 1, count)):
            if found[cell] is not State.FAILED and (found[cell] is not State.AWAKE or state is State.FAILED):
                found[cell] = state
    return found


def _cell(state: State | None, color: str) -> Span:
    if state is None or state is State.STOPPED:
        return ("·", "faint")
    if state is State.AWAKE:
        return ("█", color)
    if state is State.ASLEEP:
        return ("▁", color)
    if state is State.FAILED:
        return ("✗", "bad")
    return ("▄", "muted")


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for text, paint in spans:
        if joined and joined[-1][1] == paint:
            joined[-1] = (joined[-1][0] + text, paint)
        else:
            joined.append((text, paint))
    return joined


class Timeline(Painted):
    """One line a model."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._view: View | None = None
        self._lanes = Lanes()
        self._zoom = 0
        self._drawn: dict[str, tuple[object, list[Span]]] = {}

    @property
    def window(self) -> Window:
        """How far back it goes."""
        return WINDOWS[self._zoom]

    def zoom(self, step: int) -> None:
        """Go further back or less far, stopping at the ends."""
        self._zoom = min(len(WINDOWS) - 1, max(0, self._zoom + step))
        self.repaint()

    def show(self, view: View) -> None:
        """Take and show this moment."""
        self._view = view
        self._lanes.hear(view.past.spans)
        self._lanes.see(view.snapshot)
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """The rule, and a line for each model."""
        view = self._view
        if view is None:
            return []
        lines: list[Line] = [rule([(f"last {self.window.words}", "muted"), ("  + −", "faint")], size.width)]
        for model in view.snapshot.models:
            color = view.colors[model.name]
            cells = self._cells(model.name, color, view.snapshot.time, max(1, size.width - _NAME_WIDTH))
            lines.append((("  " + left(model.name, _NAME_WIDTH - 2), f"{color} bold"), *cells))
        return lines

    def _cells(self, name: str, color: str, now: float, count: int) -> list[Span]:
        """The spans of one lane, drawn again only when they could differ."""
        # Whole cells of time: the picture moves one cell at a time, not a little with each look.
        step = self.window.seconds / count
        end = (now // step + 1) * step
        changes = self._lanes.changes(name)
        key = (end, count, color, changes)
        known = self._drawn.get(name)
        if known is None or known[0] != key:
            states = cells_of_states(changes, end, self.window.seconds, count)
            self._drawn[name] = known = (key, _joined([_cell(state, color) for state in states]))
        return known[1]
