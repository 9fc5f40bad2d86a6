"""The benchmark's widgets: what to measure, and a run as bars, the medians and each switch as it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size

from vllm_sleep_tui.bench.figures import summary
from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, cut, left, right, rule, wrap
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
_LABEL, _TIME = 26, 9
_WIDE = 64


def bar_line(label: str, seconds: float, most: float, paint: str, width: int, after: str = "") -> Line:
    """One bar on a scale that ends at `most` seconds; where it is narrow, without what comes after it."""
    after = after if width >= _WIDE else ""
    room = max(4, width - _LABEL - _TIME - len(after) - 1)
    filled = max(1, round(seconds / most * room)) if most > 0 else 1
    return (
        (left(label, _LABEL), "muted"),
        ("█" * filled, paint),
        (" " * (room - filled), ""),
        (right(took(seconds), _TIME), "text"),
        (f" {after}" if after else "", "muted"),
    )


def median_lines(run: Run, width: int) -> list[Line]:
    """The median switch of each mode, to each model."""
    rows = [row for row in summary(run).rows if row.switch is not None]
    most = max((row.switch.median for row in rows if row.switch), default=0.0)
    lines: list[Line] = []
    for row in rows:
        if row.switch is not None:
            label = f"{row.mode} → {row.target}"
            spread = f"{took(row.switch.low)} – {took(row.switch.high)}"
            lines.append(
                bar_line(label, row.switch.median, most, _MODE_PAINT[row.mode], width, right(spread, 17))
            )
    refused = [f"{total.mode}: {total.refused}" for total in summary(run).totals if total.refused]
    return [*lines, *(((cut(words, width), "warning"),) for words in refused)]


def step_lines(run: Run, width: int, count: int) -> list[Line]:
    """The last `count` switches, the newest first, each with its first token."""
    steps = [(each.key, step) for each in run.passes for step in each.steps][-count:]
    most: dict[Mode, float] = {}
    for key, step in steps:
        most[key.mode] = max(most.get(key.mode, 0.0), step.switch)
    lines: list[Line] = []
    for key, step in reversed(steps):
        first = "no text" if step.ttft is None else f"TTFT {took(step.ttft)}"
        label = f"{key.mode} {key.repeat}  {step.leaving or '–'} → {step.target}"
        lines.append(
            bar_line(label, step.switch, most[key.mode], _MODE_PAINT[key.mode], width, right(first, 12))
        )
    return lines


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
        lines: list[Line] = []
        if self._now:
            lines += [((cut(self._now, size.width), "warning"),)]
        run = self._run
        if run is None:
            hint = wrap("Choose two models and the modes, then press r.", size.width)
            return lines or [((line, "muted"),) for line in hint]
        medians = median_lines(run, size.width)
        if medians:
            title = f"median switch between {run.plan.a} and {run.plan.b}"
            lines += [rule([(title, "muted")], size.width), *medians]
        room = size.height - len(lines) - 1
        if room > 0 and any(each.steps for each in run.passes):
            lines += [
                rule([("switches, the newest first, each mode on its own scale", "muted")], size.width),
                *step_lines(run, size.width, room),
            ]
        return lines
