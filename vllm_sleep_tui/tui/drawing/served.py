"""What was served over time, in the cells of the timeline: requests and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_sleep_tui.fleet.store.history import Served
from vllm_sleep_tui.tui.drawing.lanes import Frame
from vllm_sleep_tui.tui.drawing.paint import Span

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
        noun = "request" if self.requests == 1 else "requests"
        return f"{self.requests:,} {noun} · {self.tokens:,} tokens"


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
