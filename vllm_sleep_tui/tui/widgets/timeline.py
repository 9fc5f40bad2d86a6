"""When each model was awake, asleep, or on its way, and what it served, over a window of minutes to a day."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textual import events
from textual.geometry import Size
from textual.message import Message
from textual.widget import Widget

from vllm_sleep_tui.tui.drawing.paint import Line, Shown, Span, left, rule
from vllm_sleep_tui.tui.drawing.timeline import (
    WINDOWS,
    Change,
    Frame,
    Lanes,
    Window,
    around,
    axis,
    bars,
    cells_of_states,
    event_lines,
    glyph,
    joined,
    marked,
    nearest,
    requests_of,
    spread_over,
    state_mark,
    sum_of,
    title,
    tokens_of,
    was_used,
)
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.units import time_of_day

_NAME_WIDTH = 12
_MARK_WIDTH = 2
_RULE_WIDTH = 4
"""What a rule has beside its title at the least."""
_MEASURES = {"requests": requests_of, "tokens": tokens_of}


class Timeline(Shown):
    """A lane a model, requests and tokens under them, and a cursor that walks along."""

    class Pointed(Message):
        """A click put the cursor somewhere."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._lanes = Lanes()
        self._zoom = 0
        self._cursor: float | None = None
        self._rows: dict[str, tuple[object, list[Span], list[Span]]] = {}
        self._cells: dict[str, tuple[object, list[Change | None]]] = {}
        self.shows_served = True
        """Whether a tall timeline has requests and tokens under the lanes."""

    @property
    def window(self) -> Window:
        """How far back it goes."""
        return WINDOWS[self._zoom]

    @property
    def is_looking_back(self) -> bool:
        """Whether the cursor is out."""
        return self._cursor is not None

    def zoom(self, step: int) -> None:
        """Go further back or less far, stopping at the ends; the cursor keeps its moment."""
        self._zoom = min(len(WINDOWS) - 1, max(0, self._zoom + step))
        self.repaint()

    def show(self, view: View) -> None:
        """Take and show this moment."""
        self._lanes.take_history(view.past.spans)
        self._lanes.see(view.snapshot)
        super().show(view)

    # ── the cursor ───────────────────────────────────────────────────────────────────────────────────────

    def walk(self, view: View, step: int) -> None:
        """Move the cursor by cells, stopping at the ends; it comes out at this moment."""
        frame = self._frame(view)
        self._point(frame, frame.cells - 1 if self._cursor is None else frame.cell(self._cursor) + step)

    def jump(self, view: View, step: int) -> None:
        """Move the cursor to where the selected model's state changed, before it or after it."""
        frame = self._frame(view)
        cells = self._states(view.selected or "", frame)
        here = frame.cells if self._cursor is None else frame.cell(self._cursor)
        changed = [cell for cell in range(1, frame.cells) if cells[cell] is not cells[cell - 1]]
        if step < 0:
            self._point(frame, max((cell for cell in changed if cell < here), default=0))
        else:
            self._point(frame, min((cell for cell in changed if cell > here), default=frame.cells - 1))

    def look_at(self, view: View, moment: float) -> None:
        """Put the cursor to a moment (UTC seconds), in the shortest window that reaches back to it."""
        age = view.snapshot.time - moment
        self._zoom = next((at for at, window in enumerate(WINDOWS) if window.seconds > age), len(WINDOWS) - 1)
        frame = self._frame(view)
        self._point(frame, frame.cell(moment))

    def put_away(self) -> bool:
        """Take the cursor off; False if it was not out."""
        was_out, self._cursor = self.is_looking_back, None
        if was_out:
            self.repaint()
        return was_out

    def on_click(self, event: events.Click) -> None:
        """A click puts the cursor there."""
        cell = event.get_content_offset_capture(self).x - _NAME_WIDTH
        if self._view is not None and cell >= 0:
            self._point(self._frame(self._view), cell)
            self.post_message(self.Pointed())

    def _point(self, frame: Frame, cell: int) -> None:
        self._cursor = frame.middle(min(frame.cells - 1, max(0, cell)))
        self.repaint()

    def _frame(self, view: View, width: int = 0) -> Frame:
        # While it is hidden its own size is that of some layout before, which would put the cursor minutes
        # away: its box tells how wide it will be, and before the first layout the screen.
        box = self.parent.content_size.width if isinstance(self.parent, Widget) else 0
        cells = width or box or self.screen.size.width
        count = max(1, cells - _NAME_WIDTH)
        # Whole cells of time: the picture moves one cell at a time, not a little with each look.
        step = self.window.seconds / count
        return Frame((view.snapshot.time // step + 1) * step, self.window.seconds, count)

    # ── the picture ──────────────────────────────────────────────────────────────────────────────────────

    def draw(self, view: View, size: Size) -> list[Line]:
        """The rule, a line for each model, what was served, what is at the cursor; the last two give way."""
        frame = self._frame(view, size.width)
        cell = None if self._cursor is None else frame.cell(self._cursor)
        head, below = (
            self._quiet(view, frame) if cell is None else self._pointed_at(view, frame, cell, size.width)
        )
        names = self._used(view, frame)
        lanes = [self._lane(view, name, frame, cell) for name in names]
        lanes = lanes or [((" " * _NAME_WIDTH, ""), ("nothing has run in this time", "muted"))]
        served = [self._served(view, measure, frame, cell) for measure in _MEASURES]
        if not self.styles.is_auto_height:
            room = max(1, size.height - 2 - len(below))
            served = served[len(served) - max(0, min(len(served), room - len(lanes))) :]
            lanes = _around(lanes, names.index(view.selected) if view.selected in names else 0, room)
        elif not self.shows_served:
            served = []
        times = ((" " * _NAME_WIDTH, ""), (axis(frame), "muted"))
        return [rule(head, size.width), times, *lanes, *served, *below]

    @property
    def lanes(self) -> int:
        """How many models have one now."""
        return 1 if self._view is None else max(1, len(self._used(self._view, self._frame(self._view))))

    def _used(self, view: View, frame: Frame) -> list[str]:
        """The models that ran in the window; while the cursor is out the selected one too."""
        kept = view.selected if self.is_looking_back else None
        names = [model.name for model in view.snapshot.models]
        return [name for name in names if name == kept or was_used(self._states(name, frame))]

    def _quiet(self, view: View, frame: Frame) -> tuple[list[Span], list[Line]]:
        head: list[Span] = [(f"last {self.window.words}", "muted"), ("  + −  ← →", "muted")]
        total = sum_of([entry for entry in view.past.served if entry.time + entry.seconds > frame.start])
        return [*head, (f"  {total.words}", "muted")] if total.words else head, []

    def _pointed_at(self, view: View, frame: Frame, cell: int, width: int) -> tuple[list[Span], list[Line]]:
        """The title and the lines below while the cursor is out, about the selected model."""
        name, now = view.selected or "", view.snapshot.time
        color = view.colors.get(name, "text")
        change = self._states(name, frame)[cell]
        begins_here = change is not None and change.time > frame.start and frame.cell(change.time) == cell
        moment = change.time if change is not None and begins_here else min(now, frame.middle(cell))
        entries = around(view.past.served, frame, cell)
        switch = nearest(view.past.switches, name, frame, cell)
        return (
            title(name, color, change, entries, time_of_day(moment, now), width - _RULE_WIDTH),
            event_lines(switch, name, color, now, width),
        )

    def _lane(self, view: View, name: str, frame: Frame, cell: int | None) -> Line:
        color = view.colors[name]
        cells = self._row(
            f"lane {name}",
            (frame, color, self._lanes.changes(name)),
            lambda: [glyph(change, color) for change in self._states(name, frame)],
            cell,
        )
        mark = ("", "") if cell is None else state_mark(self._states(name, frame)[cell])
        label = left(name, _NAME_WIDTH - _MARK_WIDTH)
        return ((left(mark[0], _MARK_WIDTH), mark[1]), (label, "text"), *cells)

    def _served(self, view: View, measure: str, frame: Frame, cell: int | None) -> Line:
        entries, colors = view.past.served, view.colors
        cells = self._row(
            measure,
            (frame, entries, colors),
            lambda: bars(spread_over(entries, _MEASURES[measure], frame), colors),
            cell,
        )
        return ((left(" " * _MARK_WIDTH + measure, _NAME_WIDTH), "muted"), *cells)

    def _row(self, row: str, key: object, draw: Callable[[], list[Span]], cell: int | None) -> list[Span]:
        """The spans of a row, drawn again only when they could differ."""
        drawn = self._rows.get(row)
        if drawn is None or drawn[0] != key:
            cells = draw()
            self._rows[row] = drawn = (key, cells, joined(cells))
        if cell is None:
            return drawn[2]
        cells = drawn[1]
        return joined([*cells[:cell], marked(cells[cell]), *cells[cell + 1 :]])

    def _states(self, name: str, frame: Frame) -> list[Change | None]:
        """Its cells, reckoned anew only when they could differ: the picture moves once in a cell's time."""
        key = (frame, self._lanes.changes(name))
        known = self._cells.get(name)
        if known is None or known[0] != key:
            self._cells[name] = known = (key, cells_of_states(key[1], frame))
        return known[1]


def _around(lanes: Sequence[Line], index: int, room: int) -> list[Line]:
    """As many lanes as there is room for, the selected one among them."""
    first = max(0, min(index - room // 2, len(lanes) - room))
    return list(lanes[first : first + room])
