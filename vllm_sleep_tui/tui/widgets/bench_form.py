"""What to measure: two models, the modes, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size

from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, left
from vllm_sleep_tui.tui.widgets.detail import rule

MAX_REPEATS = 99


class Entry(NamedTuple):
    """One row that can be chosen."""

    words: str
    model: str | None = None
    mode: Mode | None = None


class BenchForm(Painted, can_focus=True):
    """A cursor over models and modes; space or enter chooses, `+` and `-` change the repeats."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False),
        Binding("down,j", "move(1)", "down", show=False),
        Binding("space,enter", "choose", "choose", show=False),
    ]

    def __init__(self, models: Sequence[str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._models = [Entry(name, model=name) for name in models]
        self._entries = [*self._models, *(Entry(mode.words, mode=mode) for mode in Mode)]
        self._cursor = 0
        self._places: dict[int, int] = {}
        self.pair: list[str] = list(models[:2])
        """A, then B."""
        self.modes: set[Mode] = set(Mode)
        self.repeats = 3

    def action_move(self, step: int) -> None:
        """Move the cursor, stopping at the ends."""
        self._cursor = min(len(self._entries) - 1, max(0, self._cursor + step))
        self.repaint()

    def action_choose(self) -> None:
        """Choose what is under the cursor, or no longer; a third model takes the place of the first."""
        entry = self._entries[self._cursor]
        if entry.mode is not None:
            self.modes ^= {entry.mode}
        elif entry.model in self.pair:
            self.pair.remove(entry.model)
        elif entry.model is not None:
            self.pair = [*self.pair[-1:], entry.model]
        self.repaint()

    def repeat(self, step: int) -> None:
        """More or fewer repeats."""
        self.repeats = min(MAX_REPEATS, max(1, self.repeats + step))
        self.repaint()

    def on_click(self, event: events.Click) -> None:
        """A click chooses."""
        place = self._places.get(event.get_content_offset_capture(self).y)
        if place is not None:
            self._cursor = place
            self.action_choose()

    def on_focus(self) -> None:
        """The cursor shows only with the focus."""
        self.repaint()

    def on_blur(self) -> None:
        """The cursor shows only with the focus."""
        self.repaint()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """The rows, two rules, and the repeats."""
        return len(self._entries) + 3

    def paint(self, size: Size) -> list[Line]:
        """Models, modes, repeats."""
        lines: list[Line] = [rule([("two models", "muted")], size.width)]
        self._places = {}
        for place, entry in enumerate(self._entries):
            if place == len(self._models):
                lines.append(rule([("modes", "muted")], size.width))
            self._places[len(lines)] = place
            lines.append(self._row(place, entry, size.width))
        repeats = f"  {self.repeats} {'repeat' if self.repeats == 1 else 'repeats'} of each  "
        return [*lines, ((repeats, "text"), ("+ −", "accent"))]

    def _row(self, place: int, entry: Entry, width: int) -> Line:
        color = f"m{place}" if entry.model is not None else "text"
        if entry.model is not None:
            sign = "AB"[self.pair.index(entry.model)] if entry.model in self.pair else "·"
        else:
            sign = "✓" if entry.mode in self.modes else "·"
        is_here = place == self._cursor and self.has_focus
        ground = " on-panel" if is_here else ""
        chosen = "accent bold" if sign != "·" else "faint"
        return (
            ("▶ " if is_here else "  ", f"accent{ground}"),
            (f"{sign} ", f"{chosen}{ground}"),
            (left(entry.words, width - 4), f"{color}{ground}"),
        )
