"""A run of the benchmark as bars: each switch as it ends, and the medians by mode."""

from __future__ import annotations

from textual.geometry import Size

from vllm_sleep_tui.bench.figures import summary
from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, cut, left, right, wrap
from vllm_sleep_tui.tui.widgets.detail import rule
from vllm_sleep_tui.units import took

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
