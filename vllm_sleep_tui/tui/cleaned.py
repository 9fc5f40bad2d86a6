"""The last gate before the terminal, behind every widget."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from vllm_sleep_tui.text import OBEYED, clean


class Cleaned(LineFilter):
    """Takes from each line what a terminal would obey.

    Text from outside is cleaned where it comes in, or its escapes would leave their letters behind; this is
    for what was forgotten. What it takes is no cell wide, so nothing moves.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The segments, as they are if there is nothing to take."""
        if not any(OBEYED.search(segment.text) for segment in segments):
            return segments
        return [
            segment if segment.control else Segment(clean(segment.text), segment.style)
            for segment in segments
        ]


CLEANED = Cleaned()
