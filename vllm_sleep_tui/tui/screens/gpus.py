"""The screen of the GPUs: each card's figures, their course over time, and the processes on them."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.geometry import Size

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot
from vllm_sleep_tui.tui.drawing.bars import stacked
from vllm_sleep_tui.tui.drawing.graphs import MIN_HEIGHT, MIN_WIDTH, buckets, graph
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, Span, cut_line, left, line_width
from vllm_sleep_tui.tui.drawing.timeline import WINDOWS, Window
from vllm_sleep_tui.tui.screens.looking import LookingScreen
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.state.past import Readings, Series
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.widgets.bands import KeyLine, TopBand
from vllm_sleep_tui.tui.widgets.memory import gpu_parts
from vllm_sleep_tui.tui.widgets.processes import ProcessTable
from vllm_sleep_tui.units import UNKNOWN, gib_cell

STEP_SECONDS = 1.0
PROCESS_STEPS = 2
"""Every second step looks at the processes, which reads all of /proc."""
_KEYS = "esc back   + − time   o order   ↑ ↓ scroll"
_CARD_SHARE = 0.6
"""Of the screen's height that the cards have for their graphs, and more where the processes leave it."""
_MOST_SHARE = 0.65
"""The same for cards that must be scrolled."""
_BANDS = 4
"""Lines of the screen that belong to neither: the first, the last and the frame of the processes."""
_AXIS_WIDTH = 6
_ALWAYS, _SNUG = 3, 28
"""The pieces of a card's figures that are never left out: how busy it is, and its memory; and the cells below
which they stand closer, in all cards alike."""
_WIDE, _CARD_HEIGHT = 120, 4
"""So wide a screen has two cards side by side if there are more; the lines of a card without graphs."""


def figures(gpu: GpuSnapshot) -> list[Span]:
    """What the card reads, in one line; what it does not tell is left out."""
    spans: list[Span] = [(f"{_number(gpu.utilization)} %", "text bold"), (" busy", "muted")]
    memory = f"   {gib_cell(gpu.used_bytes)} / {gib_cell(gpu.total_bytes)} GiB"
    spans.append((memory, "text"))
    if gpu.temperature is not None:
        spans.append((f"   {gpu.temperature:.0f} °C", "text"))
    if gpu.power_watts is not None:
        cap = "" if gpu.power_limit_watts is None else f" of {gpu.power_limit_watts:.0f}"
        spans.append((f"   {gpu.power_watts:.0f}{cap} W", "text"))
    if gpu.throttle:
        spans.append((f"   slowed by {', '.join(gpu.throttle)}", "warning bold"))
    if gpu.sm_clock_mhz is not None:
        spans.append((f"   {gpu.sm_clock_mhz} MHz", "text"))
    if gpu.throttle is not None and not gpu.throttle:
        spans.append(("   full speed allowed", "muted"))
    return spans


def _whole(spans: list[Span], width: int) -> Line:
    """As many of the figures as fit, none of them cut; in a narrow card the first stand closer."""
    while len(spans) > _ALWAYS and line_width(spans) > width:
        spans = spans[:-1]
    if width < _SNUG:
        spans = [(words.replace("   ", "  ").replace(" / ", "/"), paint) for words, paint in spans]
    return cut_line(spans, width)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"


class GpuCard(Painted):
    """One GPU: its figures, who holds its memory, and two graphs side by side."""

    def __init__(self, readings: Readings, gpu: GpuSnapshot) -> None:
        super().__init__()
        self._readings = readings
        self._gpu = gpu
        self._view: View | None = None
        self._window = WINDOWS[0]
        self._graph_height = 0
        self._drawn: dict[str, tuple[object, list[Line]]] = {}

    def show(self, view: View, gpu: GpuSnapshot, window: Window, graph_height: int) -> None:
        """Show this moment; a graph that is too low for its axes is left out."""
        self._view, self._gpu, self._window = view, gpu, window
        self._graph_height = graph_height if graph_height >= MIN_HEIGHT else 0
        self.border_title = f"GPU {gpu.index}  {gpu.name}".replace("[", r"\[")
        self.repaint()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Figures, the bar, and the graphs with their titles."""
        return 2 + (1 + self._graph_height if self._graph_height else 0)

    def paint(self, size: Size) -> list[Line]:
        """All lines of the card."""
        view, gpu = self._view, self._gpu
        if view is None:
            return []
        lines = [_whole(figures(gpu), size.width)]
        if gpu.total_bytes:
            lines.append(
                stacked(gpu_parts(gpu, view.snapshot.models, view.colors), gpu.total_bytes, size.width)
            )
        else:
            lines.append((("memory unknown", "muted"),))
        return lines + self._graphs(size.width, view.snapshot.time) if self._graph_height else lines

    def _graphs(self, width: int, now: float) -> list[Line]:
        half = (width - 2) // 2
        both = half >= MIN_WIDTH
        room = half if both else width
        busy = self._graph("busy", self._readings.utilization(self._gpu), room, now, "accent")
        if not both:
            return busy
        memory = self._graph("memory", self._readings.memory(self._gpu), room, now, "good")
        gap: Span = ("  ", "")
        return [(*one, gap, *other) for one, other in zip(busy, memory, strict=True)]

    def _graph(self, title: str, series: Series, width: int, now: float, color: str) -> list[Line]:
        """One graph under its title, drawn again only when its readings moved by a dot."""
        seconds, columns = self._window.seconds, 2 * (width - _AXIS_WIDTH)
        step = seconds / columns
        end = (now // step + 1) * step
        values = buckets(series.since(end - seconds), end, seconds, columns)
        size = (width, self._graph_height)
        key = (values, size, self._window)
        if title not in self._drawn or self._drawn[title][0] != key:
            lines = graph(values, seconds, self._window.short, size, color)
            lines += [((" " * width, ""),)] * (self._graph_height - len(lines))
            self._drawn[title] = (key, [((left(title, width), "muted"),), *lines])
        return self._drawn[title][1]


class GpuScreen(LookingScreen):
    """Everything about the GPUs; it looks only while it is in front."""

    keeps_readings = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,g,q", "dismiss", "back", show=False),
        Binding("plus,equals_sign", "zoom(1)", "further back", show=False),
        Binding("minus", "zoom(-1)", "less far", show=False),
        Binding("o", "turn", "order", show=False),
    ]

    def __init__(self, fleet: PanelFleet, readings: Readings) -> None:
        super().__init__()
        self._fleet = fleet
        self._readings = readings
        self._zoom_step = 0
        self._steps = 0
        self._cards: dict[str, GpuCard] = {}

    def compose(self) -> ComposeResult:
        """The cards above, the processes below."""
        yield TopBand(id="top")
        yield KeyLine(_KEYS, id="keys")
        yield VerticalScroll(id="cards", can_focus=False)
        with Vertical(id="processes"), VerticalScroll(id="process-scroll"):
            yield ProcessTable(id="process-table")

    async def on_mount(self) -> None:
        """Show the first moment, then once a second."""
        self.query_one("#process-scroll").focus()
        self.look_every(STEP_SECONDS, self._step)
        await self._step()

    async def on_resize(self) -> None:
        """Fit the graphs."""
        if self.look_timer is not None:
            self._show_cards(self._fleet.snapshot())

    async def _step(self) -> None:
        snapshot = self._fleet.snapshot()
        self._readings.see(snapshot)
        self.query_one(TopBand).show(View(snapshot=snapshot))
        new = [gpu for gpu in snapshot.gpus if gpu.uuid not in self._cards]
        for gpu in new:
            self._cards[gpu.uuid] = GpuCard(self._readings, gpu)
        if new:
            await self.query_one("#cards").mount_all(self._cards[gpu.uuid] for gpu in new)
        self._show_cards(snapshot)
        if self._steps % PROCESS_STEPS == 0:
            await self._show_processes(snapshot)
        self._steps += 1

    def _show_cards(self, snapshot: FleetSnapshot) -> None:
        """The graphs share the height that the cards may take."""
        view, window, count = View(snapshot=snapshot), WINDOWS[self._zoom_step], len(snapshot.gpus)
        others = _BANDS + (self.query_one(ProcessTable).height or self.size.height)
        height = max(int(self.size.height * _CARD_SHARE), self.size.height - others)
        self.query_one("#cards").styles.max_height = max(height, int(self.size.height * _MOST_SHARE))
        side_by_side = count > 2 and (self.size.width >= _WIDE or count * _CARD_HEIGHT > height)
        self.query_one("#cards").set_class(side_by_side, "-two")
        room = height // max(1, (count + 1) // 2 if side_by_side else count)
        for gpu in snapshot.gpus:
            if gpu.uuid in self._cards:
                self._cards[gpu.uuid].show(view, gpu, window, min(14, room - _CARD_HEIGHT - 1))

    async def _show_processes(self, snapshot: FleetSnapshot) -> None:
        processes = await self._fleet.processes()
        if self.is_attached:
            self.query_one(ProcessTable).show(processes, View(snapshot=snapshot).colors)
            self._title()

    def _title(self) -> None:
        self.query_one("#processes").border_title = self.query_one(ProcessTable).title

    def action_zoom(self, step: int) -> None:
        """Show a longer or a shorter time."""
        self._zoom_step = min(len(WINDOWS) - 1, max(0, self._zoom_step + step))
        self._show_cards(self._fleet.snapshot())

    def action_turn(self) -> None:
        """Sort the processes by the next column."""
        self.query_one(ProcessTable).turn()
        self._title()
