"""The timeline's axis: round times of day, each at its cell."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from vllm_sleep_tui.tui.drawing.timeline import WINDOWS, Frame, axis

END = 1_764_003_725.0


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.short)
@pytest.mark.parametrize("cells", [40, 53, 150])
def test_each_time_stands_at_its_cell_and_none_touches_another(window: object, cells: int) -> None:
    frame = Frame(END, window.seconds, cells)  # type: ignore[attr-defined]
    line = axis(frame)
    assert len(line) == cells
    ticks = [cell for cell, letter in enumerate(line) if letter == "╷"]
    assert ticks
    assert all(later - sooner >= 11 for sooner, later in pairwise(ticks))
    for cell in ticks:
        moments = range(
            int(frame.start + cell * frame.step) - 60, int(frame.start + (cell + 1) * frame.step) + 61
        )
        assert line[cell + 1 : cell + 6] in {time.strftime("%H:%M", time.localtime(at)) for at in moments}
