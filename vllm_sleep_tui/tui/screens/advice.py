"""The screen of advice: a card for each model and GPU, and writing it to the config."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.screen import Screen

from vllm_sleep_tui.config.edit import difference
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.advice import AFTERWARDS, proposed_text
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, rule, wrap
from vllm_sleep_tui.tui.screens.dialogs import Choice, Question
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.widgets.bands import KeyLine, TopBand
from vllm_sleep_tui.units import gib

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.advice import Advice, GpuAdvice, ModelAdvice

_KEYS = "esc back   ⏎ or A write it to the config (asks)   ↑ ↓ scroll"
_DIFF_LINES = 24
"""So many lines of what changes fit into a question."""
_VERDICT_PAINT = {
    "level 1": "good",
    "level 2": "accent",
    "does not fit": "bad",
    "broken files": "bad",
    "start it once": "warning",
}


def model_card(advice: ModelAdvice, color: str, configured: str, width: int) -> list[Line]:
    """The verdict on one model, its reason, and what would change."""
    paint = _VERDICT_PAINT.get(advice.verdict, "text")
    title = [(advice.name, f"{color} bold"), ("  ", ""), (str(advice.verdict), f"{paint} bold")]
    if advice.is_estimate:
        title.append(("  estimated", "muted"))
    lines = [rule(title, width), *_text(advice.why, width, "text")]
    if advice.level_0 is not None:
        lines += _text(advice.level_0.sentence, width, "muted")
    if advice.level is not None and advice.level != configured:
        lines += _text(f"The config says level {configured}; the advice is {advice.level}.", width, "accent")
    if advice.utilization is not None:
        lines += _text(f"gpu-memory-utilization {advice.utilization:g}", width, "accent")
    return [*lines, ((" ", ""),)]


def gpu_card(advice: GpuAdvice, width: int) -> list[Line]:
    """What fits on one GPU."""
    lines = [rule([(f"GPU {advice.index}", "text bold")], width), *_text(advice.sentence, width, "text")]
    if advice.sharing is not None:
        lines += _text("Two could stay awake with smaller KV caches (estimate):", width, "muted")
        for name in advice.sharing.models:
            cache = gib(advice.sharing.kv_cache_memory_bytes[name])
            share = advice.sharing.utilization[name]
            lines += _text(f"  {name}: {cache}, gpu-memory-utilization {share:g}", width, "muted")
    return [*lines, ((" ", ""),)]


def _text(text: str, width: int, paint: str) -> list[Line]:
    return [(("  ", ""), (line, paint)) for line in wrap(text, width - 2)]


class AdviceCards(Painted):
    """All cards, one below the other."""

    def __init__(self, configured: dict[str, str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._configured = configured
        self._advice: Advice | None = None
        self._colors: dict[str, str] = {}

    def show(self, advice: Advice, configured: dict[str, str], colors: dict[str, str]) -> None:
        """Show this advice."""
        self._advice, self._configured, self._colors = advice, configured, colors
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """A card for each model, then one for each GPU."""
        if self._advice is None:
            return [(("Reckoning with what was measured here …", "muted"),)]
        lines: list[Line] = []
        for model in self._advice.models:
            color = self._colors.get(model.name, "text")
            lines += model_card(model, color, self._configured.get(model.name, ""), size.width)
        for gpu in self._advice.gpus:
            lines += gpu_card(gpu, size.width)
        return lines


class AdviceScreen(Screen[None]):
    """The advice of this moment."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,a,q", "dismiss", "back", show=False),
        Binding("enter,A", "apply", "write", show=False),
    ]

    def __init__(self, fleet: PanelFleet) -> None:
        super().__init__()
        self._fleet = fleet
        self._advice: Advice | None = None

    def compose(self) -> ComposeResult:
        """The cards and the keys."""
        yield TopBand(id="top")
        with VerticalScroll(id="advice") as box:
            box.border_title = "Advice for this machine"
            yield AdviceCards(self._configured(), id="cards-of-advice")
        yield KeyLine(_KEYS, id="keys")

    def on_mount(self) -> None:
        """Reckon."""
        self.query_one("#advice").focus()
        self.query_one(TopBand).show(View(snapshot=self._fleet.snapshot()))
        self._reckon()

    def _configured(self) -> dict[str, str]:
        return {name: str(model.level) for name, model in self._fleet.loaded.config.models.items()}

    @work(exclusive=True, group="reckon")
    async def _reckon(self) -> None:
        try:
            self._advice = await self._fleet.advice()
        except PanelError as error:
            self._complain("The advice could not be reckoned", error)
            return
        colors = View(snapshot=self._fleet.snapshot()).colors
        self.query_one(AdviceCards).show(self._advice, self._configured(), colors)

    @work(exclusive=True, group="apply")
    async def action_apply(self) -> None:
        """Write the advice to the config, after showing what changes."""
        if self._advice is None:
            return
        loaded = self._fleet.loaded
        try:
            text = await asyncio.to_thread(proposed_text, loaded, self._advice)
            if text is None:
                self.notify("The config says so already.", markup=False)
                return
            question = Question(
                f"Write to {loaded.path.name}?",
                _shortened(difference(loaded.path, text)),
                [Choice("y", "Write it", "write")],
            )
            if await self.app.push_screen_wait(question):
                await self._fleet.apply(text)
                self.notify(f"Written. {AFTERWARDS}", markup=False, timeout=10)
                self._reckon()
        except PanelError as error:
            self._complain("Nothing was written", error)

    def _complain(self, title: str, error: PanelError) -> None:
        text = f"{error.what}\n{error.cure}".strip()
        self.notify(text, title=title, severity="error", timeout=12, markup=False)


def _shortened(changes: str) -> str:
    lines = [line for line in changes.splitlines() if not line.startswith(("---", "+++", "@@"))]
    more = len(lines) - _DIFF_LINES
    return "\n".join([*lines[:_DIFF_LINES], *([f"… and {more} lines more"] if more > 0 else [])])
