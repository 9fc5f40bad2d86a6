"""The last ten minutes: when each model was awake, asleep, or on its way."""

from __future__ import annotations

from bisect import bisect_right

from textual.geometry import Size

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.detail import rule
from vllm_sleep_tui.tui.paint import Line, Painted, Span, left
from vllm_sleep_tui.tui.view import View

SPAN_SECONDS = 600.0
_NAME_WIDTH = 12


class History:
    """The states of each model over time, as the panel saw them."""

    def __init__(self) -> None:
        self._changes: dict[str, list[tuple[float, State]]] = {}

    def see(self, snapshot: FleetSnapshot) -> None:
        """Remember what changed; what was before the first look is told by `since`."""
        for model in snapshot.models:
            changes = self._changes.setdefault(model.name, [])
            if changes and changes[-1][1] is model.state:
                continue
            since = model.since if model.since is not None else snapshot.time
            changes.append((max(since, changes[-1][0]) if changes else since, model.state))
            while len(changes) > 1 and changes[1][0] < snapshot.time - SPAN_SECONDS:
                del changes[0]

    def states(self, name: str, now: float, cells: int) -> list[State | None]:
        """The state in each of the cells that the last ten minutes are cut into; None where nobody looked."""
        changes = self._changes.get(name, [])
        times = [when for when, _ in changes]
        found: list[State | None] = []
        for cell in range(cells):
            end = now - SPAN_SECONDS * (cells - 1 - cell) / cells
            begin = end - SPAN_SECONDS / cells
            last = bisect_right(times, end) - 1
            within = [state for when, state in changes if begin < when <= end]
            # A wake shorter than a cell must not vanish.
            if State.AWAKE in within:
                found.append(State.AWAKE)
            else:
                found.append(changes[last][1] if last >= 0 else None)
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
        self._history = History()

    def show(self, view: View) -> None:
        """Take and show this moment."""
        self._view = view
        self._history.see(view.snapshot)
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """The rule, and a line for each model."""
        view = self._view
        if view is None:
            return []
        cells = max(1, size.width - _NAME_WIDTH)
        lines: list[Line] = [rule([("last 10 minutes", "muted")], size.width)]
        for model in view.snapshot.models:
            color = view.colors[model.name]
            # Whole cells of time: the picture moves one cell at a time, not a little with each look.
            step = SPAN_SECONDS / cells
            now = (view.snapshot.time // step + 1) * step
            states = self._history.states(model.name, now, cells)
            spans = _joined([_cell(state, color) for state in states])
            lines.append((("  " + left(model.name, _NAME_WIDTH - 2), f"{color} bold"), *spans))
        return lines
