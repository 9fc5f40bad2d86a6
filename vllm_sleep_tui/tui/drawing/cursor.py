"""What the timeline's cursor tells of its moment: a state, what was served, the switch next to it."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import PastSwitch, Served
from vllm_sleep_tui.tui.drawing.lanes import Change, Frame
from vllm_sleep_tui.tui.drawing.paint import Line, Span, cut_line, line_width
from vllm_sleep_tui.tui.drawing.served import sum_of, whose
from vllm_sleep_tui.tui.words import LOOKS, phases_of, state_words
from vllm_sleep_tui.units import UNKNOWN, time_of_day, time_sum, took

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
    spans.append(("  esc", "faint"))
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
        lines[-1] += [(separator, "faint"), (item, "text")]
        separator = " · "
    return [cut_line(line, width) for line in lines]
