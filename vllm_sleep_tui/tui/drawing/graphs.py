"""Graphs over time, drawn by plotext and coloured by us."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vllm_sleep_tui.tui.drawing.paint import Line
from vllm_sleep_tui.tui.state.past import Point

MIN_WIDTH, MIN_HEIGHT = 20, 4
_ROOM_FOR_THREE = 5
"""Lines of a graph that has one for each of three marks."""
_FIRST_DOT, _LAST_DOT = "\u2800", "\u28ff"


def buckets(
    points: Sequence[Point], end: float, seconds: float, count: int
) -> tuple[tuple[float, float], ...]:
    """(seconds before `end`, mean) of each of `count` stretches of time that have a reading."""
    step = seconds / count
    sums: dict[int, list[float]] = {}
    for point in points:
        if point.value is not None and end - seconds <= point.time < end:
            sums.setdefault(int((point.time - end + seconds) / step), []).append(point.value)
    return tuple(((place + 0.5) * step - seconds, sum(of) / len(of)) for place, of in sorted(sums.items()))


def graph(
    values: Sequence[tuple[float, float]], seconds: float, words: str, size: tuple[int, int], color: str
) -> list[Line]:
    """Per cents over the last `seconds`, on axes; `words` name the left end of the time axis."""
    import plotext  # 0.1 s that only whoever looks at graphs pays

    width, height = size
    plotext.terminal.limit(
        False, False
    )  # it would draw no wider than a terminal, or 80 cells where there is none
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    figure.axes(False, axis="x", side="upper")
    figure.axes(False, axis="y", side="right")
    figure.ruler("x").lim(-seconds, 0)
    figure.ruler("x").ticks([-seconds, 0], [f"−{words}", "now"])
    figure.ruler("y").lim(0, 100)
    middle = {} if height < _ROOM_FOR_THREE else {50: "50"}  # else it would stand where 0 is
    marks = {0: "0", **middle, 100: "100 %"}
    figure.ruler("y").ticks(list(marks), list(marks.values()))
    if values:
        signal = figure.signal([at for at, _ in values], [value for _, value in values], marker="braille")
        figure.draw(signal.lines() if len(values) > 1 else signal)
    text = plotext.uncolorize(str(figure.build()))
    return [_painted(line[:width].ljust(width), color) for line in text.splitlines()[:height]]


def _painted(line: str, color: str) -> Line:
    """The curve in its colour, axes and numbers quiet."""
    parts = groupby(line, key=lambda sign: _FIRST_DOT <= sign <= _LAST_DOT)
    return tuple(("".join(signs), color if is_curve else "muted") for is_curve, signs in parts)
