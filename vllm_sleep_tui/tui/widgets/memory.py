"""The memory box: one stacked bar for each GPU, one for the RAM."""

from __future__ import annotations

from itertools import zip_longest

from textual.geometry import Size
from textual.timer import Timer

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.bars import (
    FREE,
    HATCHED,
    MARK,
    MARK_PAINT,
    SOLID,
    WOVEN,
    Part,
    cells_of,
    is_labelled,
    legend,
    stacked,
)
from vllm_sleep_tui.tui.drawing.paint import Line, Shown, Span, cut, left, line_width, right, spread
from vllm_sleep_tui.tui.drawing.slide import Slide
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.words import short_command
from vllm_sleep_tui.units import GIB, UNKNOWN, gib_cell, gib_number

_NAME_WIDTH = 7
_TOTAL_WIDTH = 17
_NARROW, _NARROW_TOTAL = 50, 10
"""A bar of fewer cells gives fewer of them to its figures."""
_NAMED, _NAMED_WIDTH = 3, 22
"""How many strangers on a GPU are named, and in how many cells."""
_ONE_A_LINE = 4
"""So many GPUs have a line each where lines are few; more stand side by side."""
STEP_SECONDS = 0.05
SHOWN = GIB // 20
"""What rounds to 0.0 GiB is nobody's stretch of a bar."""


def gpu_parts(gpu: GpuSnapshot, models: tuple[ModelSnapshot, ...], colors: dict[str, str]) -> list[Part]:
    """Who holds the GPU's memory: the models in the order of the file, the KV pool, then everybody else."""
    parts: list[Part] = []
    ours = 0
    for model in models:
        size = (model.vram_by_gpu or {}).get(str(gpu.index), 0)
        if size <= 0:
            continue
        ours += size
        fill = HATCHED if model.state is State.ASLEEP else SOLID
        parts.append(Part(f"{model.name} {gib_number(size)}", size, colors[model.name], fill))
    pool = gpu.pool_bytes or 0
    if pool > SHOWN:
        parts.append(Part(f"KV pool {gib_number(pool)}", pool, "accent", WOVEN))
    others = (gpu.used_bytes or 0) - ours - pool
    for process in sorted(gpu.others, key=lambda other: -(other.bytes or 0))[:_NAMED]:
        size = min(process.bytes or 0, others)
        if size > SHOWN:
            who = cut(f"{process.user}: {short_command(clean(process.command))}", _NAMED_WIDTH)
            parts.append(Part(f"{who} {gib_number(size)}", size, "others", SOLID))
            others -= size
    if others > SHOWN:
        parts.append(Part(f"others {gib_number(others)}", others, "others", SOLID))
    return parts


def ram_parts(snapshot: FleetSnapshot, colors: dict[str, str]) -> list[Part]:
    """Who holds the RAM: pinned pools by model, our servers' private memory, everybody else."""
    total, available = snapshot.host.ram_total_bytes, snapshot.host.ram_available_bytes
    parts: list[Part] = []
    private = 0
    for model in snapshot.models:
        pinned = model.pinned_bytes or 0
        pinned = pinned if pinned > SHOWN else 0
        private += max(0, (model.ram_bytes or 0) - pinned)
        if pinned:
            parts.append(Part(f"{model.name} {gib_number(pinned)}", pinned, colors[model.name], HATCHED))
    if private > 0:
        parts.append(Part(f"servers {gib_number(private)}", private, "muted", SOLID))
    if total is not None and available is not None:
        others = total - available - private - sum(part.size for part in parts if part.fill == HATCHED)
        if others > SHOWN:
            parts.append(Part(f"others {gib_number(int(others))}", others, "others", SOLID))
    return parts


def _totals(used: int | None, total: int | None) -> str:
    return f"{gib_cell(used)} / {gib_cell(total)} GiB"


def _readings(gpu: GpuSnapshot) -> list[Span]:
    parts = [gpu.name]
    if gpu.utilization is not None:
        parts.append(f"{gpu.utilization:.0f} %")
    if gpu.power_watts is not None:
        parts.append(f"{gpu.power_watts:.0f} W")
    if gpu.temperature is not None:
        parts.append(f"{gpu.temperature:.0f} °C")
    return [("  ".join(parts), "muted")]


def _free_words(used: int | None, total: int | None) -> list[Part]:
    if used is None or total is None:
        return []
    return [Part(f"free {gib_number(total - used)}", total - used, "faint", FREE)]


def gpu_lines(
    view: View, gpu: GpuSnapshot, width: int, *, compact: bool, slide: Slide | None = None
) -> list[Line]:
    """The bar of a GPU, and below it who is who and what the card reads."""
    name = left(f"GPU {gpu.index}", _NAME_WIDTH)
    if gpu.used_bytes is None or gpu.total_bytes is None:
        return [((name, "text bold"), (f"{gpu.name}: memory unknown ({UNKNOWN})", "muted"))]
    parts = gpu_parts(gpu, view.snapshot.models, view.colors)
    prediction = view.prediction
    moves = prediction is not None and prediction.action in {"wake", "switch", "start"}
    after = prediction.used_after.get(str(gpu.index)) if prediction is not None and moves else None
    is_narrow = width < _NARROW
    totals = _totals(gpu.used_bytes, gpu.total_bytes)
    totals = totals.removesuffix(" GiB").replace(" ", "") if is_narrow else totals
    total_width = _NARROW_TOTAL if is_narrow else _TOTAL_WIDTH
    room = width - _NAME_WIDTH - total_width
    drawn = parts
    if slide is not None and slide.is_under_way:
        total = gpu.total_bytes
        drawn = [part._replace(size=total * slide.share((gpu.index, _whose(part)))) for part in parts]
    bar = stacked(drawn, gpu.total_bytes, room, mark=after)
    first: Line = (
        (name, "text bold"),
        *bar,
        (right(totals, total_width), "text"),
    )
    if compact:
        return [first]
    return [first, _below(_unlabelled(parts, gpu.total_bytes, room), gpu, after, width)]


def _whose(part: Part) -> str:
    """Whose stretch it is: its label without the figure."""
    return part.label.rpartition(" ")[0]


def _unlabelled(parts: list[Part], total: int, width: int) -> list[Part]:
    """The parts whose names did not fit into the bar."""
    cells = cells_of([part.size for part in parts], total, width)
    return [part for part, count in zip(parts, cells, strict=True) if not is_labelled(part, count)]


def _below(parts: list[Part], gpu: GpuSnapshot, after: int | None, width: int) -> Line:
    readings = _readings(gpu)
    mark: list[Span] = []
    if after is not None:
        mark = [(f"{MARK} ", MARK_PAINT), (f"{gib_number(after)} after enter   ", "text")]
    room = width - _NAME_WIDTH - line_width(readings) - line_width(mark) - 1
    names = legend([*parts, *_free_words(gpu.used_bytes, gpu.total_bytes)], room)
    return spread([(" " * _NAME_WIDTH, ""), *names, *mark], readings, width)


def ram_lines(view: View, width: int, *, compact: bool) -> list[Line]:
    """The bar of the RAM, and below it who holds it."""
    host = view.snapshot.host
    total, available = host.ram_total_bytes, host.ram_available_bytes
    name = left("RAM", _NAME_WIDTH)
    if total is None or available is None:
        return [((name, "text bold"), (f"unknown ({UNKNOWN})", "muted"))]
    parts, room = ram_parts(view.snapshot, view.colors), width - _NAME_WIDTH - _TOTAL_WIDTH
    limit = host.pinning_limit_bytes if _may_pin(view.snapshot) else None
    first: Line = (
        (name, "text bold"),
        *stacked(parts, total, room, mark=limit),
        (right(_totals(total - available, total), _TOTAL_WIDTH), "text"),
    )
    if compact:
        return [first]
    pinned = sum(part.size for part in parts if part.fill == HATCHED)
    named = _unlabelled(parts, total, room)
    if pinned:
        named.insert(0, Part(f"pinned {gib_number(int(pinned))}", pinned, "muted", HATCHED))
    words: list[Span] = []
    if limit is not None:
        words = [(f"{MARK} ", MARK_PAINT), (f"level 1 up to {gib_number(limit)}", "muted")]
    names = legend(
        [*named, *_free_words(total - available, total)], width - _NAME_WIDTH - line_width(words) - 1
    )
    return [first, spread([(" " * _NAME_WIDTH, ""), *names], words, width)]


def _may_pin(snapshot: FleetSnapshot) -> bool:
    """Whether any model could be put to sleep at level 1: only that is refused for want of RAM."""
    return any(
        model.frees_memory and not model.is_external and model.configured_level in {"auto", "1"}
        for model in snapshot.models
    )


class MemoryPanel(Shown):
    """All bars; compact (one line each) when the screen is low."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.border_title = "Memory"
        self._slide = Slide()
        self._timer: Timer | None = None

    def show(self, view: View) -> None:
        """Show this moment; bars that changed much slide there, unless TEXTUAL_ANIMATIONS is none."""
        goal = {
            (gpu.index, _whose(part)): part.size / gpu.total_bytes
            for gpu in view.snapshot.gpus
            if gpu.total_bytes
            for part in gpu_parts(gpu, view.snapshot.models, view.colors)
        }
        slides = self._slide.go(goal, at_once=self.app.animation_level == "none")
        super().show(view)
        if self.content_size.width and self.content_size.height != len(self._lines):
            self.refresh(layout=True)  # at 120×40 the first moment's height, one line, can stay (tmux, seen)
        if slides and self._timer is None:
            self._timer = self.set_interval(STEP_SECONDS, self._step)

    def _step(self) -> None:
        self.repaint()
        if not self._slide.is_under_way and self._timer is not None:
            self._timer.stop()
            self._timer = None

    def draw(self, view: View, size: Size) -> list[Line]:
        """The bars and the notes on what cannot be known."""
        height = self.app.size.height
        compact = height < 30 or 2 * len(view.snapshot.gpus) + 2 > height // 4
        lines: list[Line] = []
        width = size.width
        if compact and len(view.snapshot.gpus) > _ONE_A_LINE:
            # Half as wide and half as many lines, so that models have room below.
            half = (width - 2) // 2
            bars = [line for gpu in view.snapshot.gpus for line in self._bar(view, gpu, half, compact=True)]
            for first, second in zip_longest(bars[::2], bars[1::2], fillvalue=()):
                lines.append((*first, ("  ", ""), *second))
        else:
            for gpu in view.snapshot.gpus:
                lines += self._bar(view, gpu, width, compact=compact)
        lines += ram_lines(view, size.width, compact=compact)
        lines += [((cut(note, size.width), "warning"),) for note in view.snapshot.notes]
        return lines

    def _bar(self, view: View, gpu: GpuSnapshot, width: int, *, compact: bool) -> list[Line]:
        return gpu_lines(view, gpu, width, compact=compact, slide=self._slide)
