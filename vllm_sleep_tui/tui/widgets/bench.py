"""The benchmark's widgets: what to measure, and a run as bars, the medians and each switch as it ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar, NamedTuple

from rich.cells import cell_len
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size

from vllm_sleep_tui.bench.figures import summary
from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, cut, left, middle, right, rule, wrap
from vllm_sleep_tui.units import took

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


_MODE_PAINT = {Mode.LEVEL1: "good", Mode.LEVEL2: "accent", Mode.COLD: "bad"}
_TIME, _MIN_BAR, _GAP = 9, 6, 3
_WIDE = 64


class Bar(NamedTuple):
    """One time as a bar, beside what it is the time of."""

    label: str
    seconds: float
    paint: str
    after: str = ""


def bar_lines(bars: Sequence[Bar], label: int, width: int) -> list[Line]:
    """Bars on one scale, behind labels of `label` cells; a narrow screen has not what comes after."""
    most = max((bar.seconds for bar in bars), default=0.0)
    after = max((len(bar.after) for bar in bars), default=0) + _GAP if width >= _WIDE else 0
    room = max(1, width - label - _TIME - after)
    lines: list[Line] = []
    for bar in bars:
        filled = max(1, round(bar.seconds / most * room)) if most > 0 else 1
        lines.append(
            (
                (left(middle(bar.label, label - 1), label), "muted"),
                ("█" * filled, bar.paint),
                (" " * (room - filled), ""),
                (right(took(bar.seconds), _TIME), "text"),
                (right(bar.after, after) if after else "", "muted"),
            )
        )
    return lines


def medians(run: Run) -> list[Bar]:
    """The median switch of each mode, to each model."""
    return [
        Bar(
            f"{row.mode.words} → {row.target}",
            row.switch.median,
            _MODE_PAINT[row.mode],
            f"{took(row.switch.low)} – {took(row.switch.high)}",
        )
        for row in summary(run).rows
        if row.switch is not None
    ]


def switches(run: Run) -> list[tuple[Mode, list[Bar]]]:
    """All switches by mode, the newest first, each with its repeat and its first token."""
    steps = [(each.key, step) for each in reversed(run.passes) for step in reversed(each.steps)]
    found: list[tuple[Mode, list[Bar]]] = []
    for mode, group in groupby(steps, key=lambda step: step[0].mode):
        bars = [
            Bar(
                f"{key.repeat}  {step.leaving or '–'} → {step.target}",
                step.switch,
                _MODE_PAINT[mode],
                "no text" if step.ttft is None else f"TTFT {took(step.ttft)}",
            )
            for key, step in group
        ]
        found.append((mode, bars))
    return found


class BenchBars(Painted):
    """One run, under way or past."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._run: Run | None = None
        self._now = ""

    def show(self, run: Run | None, now: str) -> None:
        """Show a run, and what happens now if it is under way."""
        self._run, self._now = run, now
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """Now, the medians, and as many switches as fit."""
        width = size.width
        lines: list[Line] = [((line, "warning"),) for line in wrap(self._now, width)] if self._now else []
        run = self._run
        if run is None:
            hint = wrap("Choose two models and the modes, then press r.", width)
            return lines or [((line, "muted"),) for line in hint]
        usual, by_mode = medians(run), switches(run)
        labels = [bar.label for bars in (usual, *(bars for _, bars in by_mode)) for bar in bars]
        label = min(max(map(cell_len, labels), default=0) + 2, max(4, width - _TIME - _MIN_BAR))
        if usual:
            title = f"median switch between {run.plan.a} and {run.plan.b}"
            lines += [rule([(title, "muted")], width), *bar_lines(usual, label, width)]
        for total in summary(run).totals:
            if total.refused:
                lines.append(((cut(f"{total.mode.words}: {total.refused}", width), "warning"),))
        for mode, bars in by_mode:
            lines += [rule([(f"{mode.words}, the newest first", "muted")], width)]
            lines += bar_lines(bars, label, width)
        return lines[: size.height]
