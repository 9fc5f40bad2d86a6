"""The states of each model over time, and the cells that show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import StateSpan
from vllm_sleep_tui.tui.drawing.paint import Span


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


class Frame(NamedTuple):
    """The moments that a row of cells stands for."""

    end: float
    """UTC seconds."""
    seconds: float
    cells: int

    @property
    def step(self) -> float:
        """Seconds a cell."""
        return self.seconds / self.cells

    @property
    def start(self) -> float:
        """Of the first cell."""
        return self.end - self.seconds

    def cell(self, moment: float) -> int:
        """The cell that a moment lies in, or the nearest one."""
        return min(self.cells - 1, max(0, int((moment - self.start) // self.step)))

    def middle(self, cell: int) -> float:
        """The moment in the middle of a cell."""
        return self.start + (cell + 0.5) * self.step


class Change(NamedTuple):
    """A state that was entered."""

    time: float
    """UTC seconds."""
    state: State
    level: int | None


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
            self._told.setdefault(span.model, []).append(Change(span.start, span.state, span.level))

    def see(self, snapshot: FleetSnapshot) -> None:
        """Remember what changed; what was before the first look is told by `since`."""
        for model in snapshot.models:
            changes = self._seen.setdefault(model.name, [])
            if not changes or changes[-1].state is not model.state:
                entered = _entered(model, snapshot.time, changes)
                changes.append(Change(entered, model.state, model.level))
            while len(changes) > 1 and changes[1].time < snapshot.time - WINDOWS[-1].seconds:
                del changes[0]

    def changes(self, name: str) -> list[Change]:
        """All that is known of a model, the oldest first; what both tell is the history's."""
        told = self._told.get(name, [])
        after = told[-1].time if told else 0.0
        return [*told, *(change for change in self._seen.get(name, []) if change.time > after)]


def _entered(model: ModelSnapshot, now: float, before: Sequence[Change]) -> float:
    if model.since is None:
        return now
    # A death is seen before it is written down: its `since` is still that of the state before.
    return now if before and model.since <= before[-1].time else model.since


def cells_of_states(changes: Sequence[Change], frame: Frame) -> list[Change | None]:
    """What shows in each cell; None where nobody looked.

    What is short must not vanish: a cell with a failure in it shows that, one with a wake in it the wake.
    """
    found: list[Change | None] = [None] * frame.cells
    for change, following in zip(changes, [*changes[1:], None], strict=True):
        stop = frame.end if following is None else following.time
        if stop <= frame.start or change.time >= frame.end:
            continue
        first, last = (int((at - frame.start) / frame.step) for at in (max(change.time, frame.start), stop))
        for cell in range(first, min(last + 1, frame.cells)):
            before = found[cell]
            if before is None or _gives_way(before.state, change.state):
                found[cell] = change
    return found


def _gives_way(before: State, now: State) -> bool:
    return before is not State.FAILED and (before is not State.AWAKE or now is State.FAILED)


def glyph(change: Change | None, color: str) -> Span:
    """One cell of a lane."""
    if change is None or change.state is State.STOPPED:
        return ("·", "faint")
    if change.state is State.AWAKE:
        return ("█", color)
    if change.state is State.ASLEEP:
        return ("▁", color)
    if change.state is State.FAILED:
        return ("✗", "bad")
    return ("▄", "muted")


def marked(span: Span) -> Span:
    """The same cell under the cursor, whose line goes through all rows; a full cell keeps its ground."""
    text, paint = span
    return ("│", f"ink-{paint} on-{paint} bold" if text == "█" else "text bold")


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same text with as few spans as there are paints in a row."""
    result: list[Span] = []
    for text, paint in spans:
        if result and result[-1][1] == paint:
            result[-1] = (result[-1][0] + text, paint)
        else:
            result.append((text, paint))
    return result
