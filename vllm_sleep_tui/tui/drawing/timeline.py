"""What the timeline shows, in cells: states over time, what was served, what its cursor tells of a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_sleep_tui.fleet.past import PastSwitch, Served, StateSpan
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.drawing.paint import Line, Span, cut_line, line_width
from vllm_sleep_tui.tui.words import LOOKS, phases_of, state_words
from vllm_sleep_tui.units import UNKNOWN, counted, time_of_day, time_sum, took


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
        self._recorded: dict[str, list[Change]] = {}
        self._observed: dict[str, list[Change]] = {}
        self._spans: Sequence[StateSpan] = ()

    def take_history(self, spans: Sequence[StateSpan]) -> None:
        """Take the history's answer in place of the last one."""
        if spans is self._spans:
            return
        self._spans, self._recorded = spans, {}
        for span in spans:
            self._recorded.setdefault(span.model, []).append(Change(span.start, span.state, span.level))

    def see(self, snapshot: FleetSnapshot) -> None:
        """Remember what changed; what was before the first look is told by `since`."""
        for model in snapshot.models:
            changes = self._observed.setdefault(model.name, [])
            if not changes or changes[-1].state is not model.state:
                entered = _entered(model, snapshot.time, changes)
                changes.append(Change(entered, model.state, model.level))
            while len(changes) > 1 and changes[1].time < snapshot.time - WINDOWS[-1].seconds:
                del changes[0]

    def changes(self, name: str) -> list[Change]:
        """All that is known of a model, the oldest first; what both tell is the history's."""
        recorded = self._recorded.get(name, [])
        after = recorded[-1].time if recorded else 0.0
        return [*recorded, *(change for change in self._observed.get(name, []) if change.time > after)]


def _entered(model: ModelSnapshot, now: float, before: Sequence[Change]) -> float:
    if model.since is None:
        return now
    # A death is seen before it is written down: its `since` is still that of the state before.
    return now if before and model.since <= before[-1].time else model.since


def cells_of_states(changes: Sequence[Change], frame: Frame) -> list[Change | None]:
    """What shows in each cell; None where nobody looked.

    What is short must not vanish: a cell with a failure in it shows that, one with a wake in it the wake.
    """
    cells: list[Change | None] = [None] * frame.cells
    for change, following in zip(changes, [*changes[1:], None], strict=True):
        stop = frame.end if following is None else following.time
        if stop <= frame.start or change.time >= frame.end:
            continue
        first, last = (int((at - frame.start) / frame.step) for at in (max(change.time, frame.start), stop))
        for cell in range(first, min(last + 1, frame.cells)):
            before = cells[cell]
            if before is None or _gives_way(before.state, change.state):
                cells[cell] = change
    return cells


def was_used(cells: Sequence[Change | None]) -> bool:
    """Whether a model was anything but stopped in these cells."""
    return any(change is not None and change.state is not State.STOPPED for change in cells)


_TICKS = (60, 120, 300, 600, 900, 1800, 3600, 2 * 3600, 3 * 3600, 6 * 3600, 12 * 3600)
_TICK_CELLS = 11
"""Between two times on the axis at the least."""


def axis(frame: Frame) -> str:
    """Times of day, each beginning at the cell of its moment; round ones, in local time."""
    step = next((step for step in _TICKS if step >= _TICK_CELLS * frame.step), _TICKS[-1])
    local = time.localtime(frame.start)
    offset = local.tm_gmtoff
    line = [" "] * frame.cells
    moment = ((frame.start + offset) // step + 1) * step - offset
    while moment < frame.end:
        cell, text = frame.cell(moment), time.strftime("╷%H:%M", time.localtime(moment))
        if cell + len(text) <= frame.cells:
            line[cell : cell + len(text)] = text
        moment += step
    return "".join(line)


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


_BARS = "▁▂▃▄▅▆▇█"
_NONE: Span = ("·", "faint")
Measure = Callable[[Served], int]


def requests_of(entry: Served) -> int:
    """How many ended."""
    return entry.requests


def tokens_of(entry: Served) -> int:
    """Read and written."""
    return entry.prompt_tokens + entry.generated_tokens


class Sum(NamedTuple):
    """What several entries come to."""

    requests: int
    tokens: int
    seconds: float
    """From the first beginning to the last end; 0 without an entry."""

    @property
    def words(self) -> str:
        """`3 requests · 412 tokens`; empty if there was nothing."""
        if not self.requests and not self.tokens:
            return ""
        return f"{counted(self.requests, 'request')} · {counted(self.tokens, 'token')}"


def sum_of(entries: Sequence[Served]) -> Sum:
    """All of it."""
    begins, ends = [each.time for each in entries], [each.time + each.seconds for each in entries]
    seconds = max(ends) - min(begins) if entries else 0.0
    return Sum(sum(map(requests_of, entries)), sum(map(tokens_of, entries)), seconds)


def around(entries: Sequence[Served], frame: Frame, cell: int) -> list[Served]:
    """The entries that share a moment with a cell."""
    start = frame.start + cell * frame.step
    end = start + frame.step
    return [entry for entry in entries if entry.time < end and entry.time + entry.seconds > start]


def whose(entries: Sequence[Served], name: str) -> str:
    """Before the words on these entries: by whom they are, unless it is `name` alone."""
    models = {entry.model for entry in entries}
    if models == {name}:
        return ""
    return "all: " if len(models) > 1 else f"{models.pop()}: "


def spread_over(entries: Sequence[Served], measure: Measure, frame: Frame) -> list[dict[str, float]]:
    """How much of each model falls into each cell; an entry is taken to be even over its time."""
    cells: list[dict[str, float]] = [{} for _ in range(frame.cells)]
    for entry in entries:
        amount, begin, end = measure(entry), entry.time, entry.time + entry.seconds
        if amount == 0 or end <= frame.start or begin >= frame.end:
            continue
        for cell in range(frame.cell(begin), frame.cell(end) + 1):
            start = frame.start + cell * frame.step
            shared = min(end, start + frame.step) - max(begin, start)
            if shared > 0:
                part = amount * shared / entry.seconds
                cells[cell][entry.model] = cells[cell].get(entry.model, 0.0) + part
    return cells


def bars(cells: Sequence[Mapping[str, float]], colors: Mapping[str, str]) -> list[Span]:
    """A bar a cell, the highest one full, in the colour of the model that did most of it."""
    totals = [sum(cell.values()) for cell in cells]
    top = max(totals, default=0.0)
    spans: list[Span] = []
    for cell, total in zip(cells, totals, strict=True):
        if total <= 0:
            spans.append(_NONE)
            continue
        most = max(cell, key=lambda name: cell[name])
        # The least there is must be seen.
        height = min(len(_BARS) - 1, int(total / top * len(_BARS)))
        spans.append((_BARS[height], colors.get(most, "others")))
    return spans


_INDENT = "  "
EVENT_LINES = 2
"""Always as many, so that the lanes stay where they are while the cursor walks."""


def state_mark(change: Change | None) -> Span:
    """One cell: the state's sign."""
    if change is None:
        return (UNKNOWN, "faint")
    look = LOOKS[change.state]
    return (look.glyph, look.paint)


def title(
    name: str, color: str, change: Change | None, entries: Sequence[Served], when: str, width: int
) -> list[Span]:
    """The selected model at that moment, and what was served then; what does not fit is left off whole."""
    spans: list[Span] = [(when, "text bold"), (f"  {name}", f"{color} bold")]
    if change is None:
        spans.append(("  not known", "muted"))
    else:
        look = LOOKS[change.state]
        spans.append((f"  {look.glyph} {state_words(change.state, change.level)}", look.paint))
    total = sum_of(entries)
    if total.words:
        spans += [(f"  {whose(entries, name)}{total.words}", "text")]
        spans += [(f" in {time_sum(total.seconds)}", "muted")]
    spans.append(("  esc ends", "muted"))
    while line_width(spans) > width and len(spans) > 1:
        spans.pop()
    return spans


def nearest(switches: Sequence[PastSwitch], name: str, frame: Frame, cell: int) -> PastSwitch | None:
    """The switch to a model that lies in a cell or is the nearest to it; of several, the last."""
    start = frame.start + cell * frame.step
    own = [past for past in switches if past.model == name]

    def distance(past: PastSwitch) -> float:
        return max(0.0, past.time - past.times.total - start - frame.step, start - past.time)

    return min(reversed(own), key=distance, default=None)


def event_lines(past: PastSwitch | None, name: str, color: str, now: float, width: int) -> list[Line]:
    """The switch or the start, and its phases; the shortest of them give way."""
    if past is None:
        words: list[Span] = [(f"{_INDENT}no switch to ", "muted"), (name, color), (" in this time", "muted")]
        return [cut_line(words, width), ()]
    verb = "switch to" if past.from_state is State.ASLEEP else "start of"
    head: list[Span] = [
        (f"{_INDENT}{verb} ", "muted"),
        (past.model, f"{color} bold"),
        (f"  {time_of_day(past.time - past.times.total, now)}  ", "muted"),
        (took(past.times.total), "text bold"),
    ]
    phases = phases_of(past.times)
    left_out = ""
    while True:
        items = [*(f"{phase} {took(seconds)}" for phase, seconds in phases), *filter(None, [left_out])]
        lines = _flowed(head, items, width)
        if len(lines) <= EVENT_LINES or not phases:
            return [*lines, ()][:EVENT_LINES]
        phases.remove(min(phases, key=lambda phase: phase[1]))
        left_out = "…"


def _flowed(head: Sequence[Span], items: Sequence[str], width: int) -> list[Line]:
    """The items after the head, in as many lines as it takes; none is broken."""
    lines: list[list[Span]] = [list(head)]
    separator = "   "
    for item in items:
        if line_width(lines[-1]) + len(separator) + len(item) > width:
            lines.append([])
            separator = _INDENT
        lines[-1] += [(separator, "muted"), (item, "text")]
        separator = " · "
    return [cut_line(line, width) for line in lines]
