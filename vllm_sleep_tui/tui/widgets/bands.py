"""The first and the last line of the screen."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import ClassVar

from textual import events
from textual.geometry import Size

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, Shown, Span, cut_line, line_width, middle, spread
from vllm_sleep_tui.tui.keys import Key, keys_of
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.units import GIB, counted, gib_cell


def hardware(gpus: tuple[GpuSnapshot, ...]) -> str:
    """The GPUs in a few words: `2 × Demo 24 GiB`."""
    if not gpus:
        return "no GPU"
    kinds: dict[str, int] = {}
    for gpu in gpus:
        name = gpu.name.removeprefix("NVIDIA ")
        is_sized = gpu.total_bytes is None or re.search(r"\d ?Gi?B", name)
        size = "" if is_sized else f" {(gpu.total_bytes or 0) / GIB:.0f} GiB"
        kinds[name + size] = kinds.get(name + size, 0) + 1
    return ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in kinds.items())


_LOOK_SECONDS = 1.0
_KEY = re.compile(r"((?:(?:(?:alt\+|\^)?\S|esc|tab|end|space|pgup|pgdn) )*)")
"""The keys at the head of their words: `⏎`, `alt+⏎`, `+ −`, `esc`."""
_NAMED_AWAKE = 3
"""More models awake than these are counted, not named."""
ALARM = "ink-bad on-bad bold"
"""The one paint for what is wrong, used for nothing else."""
LOW_RAM_SHARE = 0.05
"""Less of the RAM than this available: the next sleep, or any program, may get none."""
LOW_VRAM_SHARE = 0.02
"""Less of a GPU's memory than this free: what allocates next there, a graph or a longer batch, may die."""


def alarms(view: View) -> list[str]:
    """What is wrong, most pressing first: visible wherever one is, each with what leads to it."""
    failed = [model.name for model in view.snapshot.models if model.state is State.FAILED]
    died = [model.name for model in view.snapshot.models if model.last_failure and model.name not in failed]
    words = [f"✗ {_who(failed)} failed"] if failed else []
    words += [f"✗ {_who(died)} died, restarted"] if died else []
    host = view.snapshot.host
    total, available = host.ram_total_bytes, host.ram_available_bytes
    if total and available is not None and available < LOW_RAM_SHARE * total:
        words.append(f"RAM {gib_cell(total - available)}/{gib_cell(total)}")
    full = [gpu for gpu in view.snapshot.gpus if _is_full(gpu)]
    if len(full) > 1:
        words.append(f"{len(full)} GPUs full")
    elif full:
        words.append(f"GPU {full[0].index} {gib_cell(full[0].used_bytes)}/{gib_cell(full[0].total_bytes)}")
    if view.waiting:
        words.append(f"{counted(view.waiting, 'request waits', 'requests wait')} (e)")
    return words


def _is_full(gpu: GpuSnapshot) -> bool:
    used, size = gpu.used_bytes, gpu.total_bytes
    return used is not None and size is not None and size - used < LOW_VRAM_SHARE * size


def _who(names: list[str]) -> str:
    return middle(names[0], 16) if len(names) == 1 else str(len(names))


class TopBand(Shown):
    """Product, hardware, what is wrong, who is awake, the time."""

    def draw(self, view: View, size: Size) -> list[Line]:
        """The one line; what is simulated or only looks says so in any width."""
        marks = ["SIMULATED"] * view.is_simulated + ["READ-ONLY"] * view.snapshot.read_only
        badge: list[Span] = [
            span for mark in marks for span in ((f" {mark} ", "ink-warning on-warning bold"), ("  ", ""))
        ]
        product: list[Span] = [*badge, ("vllm-sleep-tui", "accent bold")]
        if view.bench:
            product += [("   ", ""), (view.bench, "warning")]
        long = [*product, ("   ", ""), (hardware(view.snapshot.gpus), "muted")]
        wrong = [span for words in alarms(view) for span in ((f" {words} ", ALARM), ("  ", ""))]
        clock = [("   ", ""), (time.strftime("%H:%M", time.localtime(view.snapshot.time)), "muted")]
        names, count = [*wrong, *self._awake(view)], [*wrong, *self._awake(view, named=0)]
        for start, end in (
            (long, [*names, *clock]),
            (product, [*names, *clock]),
            (badge, [*names, *clock]),
            (badge, [*count, *clock]),
            (badge, count),
            (badge, [*wrong, *clock]),
            (badge, wrong[:-1]),
        ):
            if line_width(start) + line_width(end) < size.width:
                return [spread(start, end, size.width)]
        return [cut_line([*badge, *wrong], size.width)]

    def _awake(self, view: View, named: int = _NAMED_AWAKE) -> list[Span]:
        """Who is awake, up to so many by their names."""
        if not view.awake:
            return [("no model awake", "muted")]
        if len(view.awake) > named:
            count = counted(len(view.awake), "model")
            return [("● ", "good"), (count, "text bold"), (" awake", "good")]
        spans: list[Span] = []
        for model in view.awake:
            spans += [("  ● ", "good"), (model.name, "text bold")]
        return [*spans, (" awake", "good")]


class FollowingBand(TopBand):
    """The first line of a screen that has no moment of its own: it looks for itself while it is in front."""

    def __init__(self, look: Callable[[], FleetSnapshot], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._look = look

    def on_mount(self) -> None:
        """Look now, then once a second."""
        self._step()
        self.set_interval(_LOOK_SECONDS, self._step)

    def _step(self) -> None:
        if self.screen.is_current or self._view is None:
            self.show(View(snapshot=self._look()))


def keys_that_fit(words: str, width: int) -> str:
    """A line of keys, two blanks or more between them, without the last ones that do not fit."""
    while len(words) > width and "  " in words:
        words = words.rpartition("  ")[0].rstrip()
    return words


def key_spans(words: str) -> list[Span]:
    """A line of keys as they look everywhere: each key bright, what it does quiet."""
    spans: list[Span] = []
    for part in re.split(r"(  +)", words):
        match = _KEY.match(part)
        caps = match[1] if match else ""
        spans += [(caps, "accent bold"), (part.removeprefix(caps), "muted")]
    return spans


class KeyLine(Painted):
    """A screen's keys in its last line, whole ones, as many as fit."""

    def __init__(self, words: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._words = words

    def say(self, words: str) -> None:
        """Other keys from now on."""
        self._words = words
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """What fits."""
        return [tuple(key_spans(keys_that_fit(self._words, size.width)))]


class BottomBand(Painted):
    """The keys, as many as fit; a click presses one."""

    KEYS_THAT_STAY: ClassVar[tuple[str, ...]] = ("question_mark", "q")

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._typing = ""
        self._read_only = False
        self._places: list[tuple[int, int, Key]] = []

    def show_keys(self, *, read_only: bool) -> None:
        """Which keys there are."""
        if read_only != self._read_only:
            self._read_only = read_only
            self.repaint()

    def show_typing(self, hint: str) -> None:
        """While an input has the focus, letters are text: show its own keys instead."""
        if hint != self._typing:
            self._typing = hint
            self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """The keys, or the hint of the input that has the focus."""
        self._places = []
        if self._typing:
            return [tuple(key_spans(keys_that_fit(self._typing, size.width)))]
        spans: list[Span] = []
        at = 0
        for key in self._keys_that_fit(size.width):
            text = f"{key.cap} {key.short}"
            spans += [(key.cap, "accent bold"), (f" {key.short}  ", "muted")]
            self._places.append((at, at + len(text), key))
            at += len(text) + 2
        return [tuple(spans)]

    def _keys_that_fit(self, width: int) -> list[Key]:
        keys = [key for key in keys_of(read_only=self._read_only) if key.in_footer]
        while sum(len(key.cap) + len(key.short) + 3 for key in keys) - 2 > width:
            droppable = [key for key in keys if key.key not in self.KEYS_THAT_STAY]
            if not droppable:
                break
            keys.remove(droppable[-1])
        return keys

    async def on_click(self, event: events.Click) -> None:
        """Do what the clicked key does."""
        x = event.get_content_offset_capture(self).x
        for start, end, key in self._places:
            if start <= x < end:
                await self.screen.run_action(key.action)
