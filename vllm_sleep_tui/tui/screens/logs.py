"""The log of one model, followed while it is looked at."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.geometry import Size
from textual.screen import Screen
from textual.widgets import RichLog

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.server_log import ServerLog
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.screens.looking import LookingScreen
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.theme import Palette, palette_of
from vllm_sleep_tui.tui.widgets.bands import FollowingBand, KeyLine

KEPT_LINES = 1_000
STEP_LINES = 300
"""Of a flood no more are laid out in a step: a line takes a tenth of a millisecond that nobody else gets."""
STEP_SECONDS = 0.2
_LEVEL = re.compile(r"^(\(\w[\w-]* pid=\d+\) )?(WARNING|ERROR|CRITICAL)\b")
_PAINTS = {"WARNING": "warning", "ERROR": "bad", "CRITICAL": "bad bold"}


def painted(lines: Iterable[str], palette: Palette) -> Text:
    """Lines of a log, warnings and errors in their colours, as one text: each that is laid out costs."""
    text = Text(end="")
    for number, line in enumerate(lines):
        level = _LEVEL.match(line)
        style = palette.style(_PAINTS[level[2]]) if level else ""
        text.append(f"\n{line}" if number else line, style)
    return text


class WrappedLog(RichLog):
    """A log whose long lines are broken at the edge, anew for each width; follows only at its end."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(max_lines=4 * KEPT_LINES, wrap=True, min_width=1, id=id)
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._laid_out_for = Size()
        self._is_followed = True

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Who leaves the end reads; who comes back to it follows again."""
        super().watch_scroll_y(old_value, new_value)
        self._is_followed = self.is_vertical_scroll_end

    def write_lines(self, lines: Iterable[str], *, follows: bool = True) -> None:
        """Append; of more than can be kept the last are. Who is at the end stays there if it `follows`."""
        new = list(lines)[-KEPT_LINES:]
        self._kept.extend(new)
        # Rich takes a terminal that it cannot ask, as in a browser, for one of 80 columns.
        width = self.scrollable_content_region.width or None
        self.write(painted(new, palette_of(self)), width=width, scroll_end=follows and self._is_followed)

    def begin(self, before: Sequence[str], after: Sequence[str]) -> None:
        """Begin with two parts, the end of the first in view: that is what is looked for."""
        self.write_lines(before, follows=False)
        seam, height = len(self.lines), self.scrollable_content_region.height
        self.write_lines(after, follows=False)
        top = max(0, seam - height)
        self._is_followed = top + height >= len(self.lines)
        self.scroll_to(y=top, animate=False)

    def on_resize(self, event: Resize) -> None:
        """Break the lines anew for another width, with what was in view; RichLog has a handler besides."""
        size, before, followed = self.scrollable_content_region.size, self._laid_out_for, self._is_followed
        if size.width != before.width and before.width and self._kept:
            kept, bottom = list(self._kept), (self.scroll_y + before.height) / max(1, len(self.lines))
            self._kept.clear()
            self.clear()
            self.write_lines(kept, follows=False)
            self._is_followed = followed  # without a line it was at its end
            if not followed:  # who reads further up stays there, as near as other breaks allow
                self.scroll_to(y=max(0, round(bottom * len(self.lines)) - size.height), animate=False)
        if followed and self._kept:
            self.scroll_end(animate=False)
        self._laid_out_for = size


class LogScreen(LookingScreen):
    """The whole screen for one log."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,l,q", "close", "back", show=False),
        Binding("end,G", "end", "end", show=False),
    ]

    def __init__(self, model: str, log: ServerLog, look: Callable[[], FleetSnapshot]) -> None:
        """The log of a model, below the last words of the server that died before, if one did."""
        super().__init__()
        self._model = model
        self._log = log
        self._look = look
        self._is_empty = True
        self._is_reading = False
        self._words = 0
        """How many of the lines that come next are the last ones of an earlier server."""
        self._read = self._first

    def compose(self) -> ComposeResult:
        """The log and its keys."""
        yield FollowingBand(self._look, id="top")
        log = WrappedLog(id="log")
        log.border_title = f"Log of {self._model}"
        yield log
        yield KeyLine("esc back   end follow   ↑ ↓ pgup pgdn scroll", id="keys")

    def on_mount(self) -> None:
        """Follow."""
        log = self.query_one(WrappedLog)
        log.border_subtitle = "nothing is written yet"
        log.focus()
        self.look_every(STEP_SECONDS, self._step)
        self.call_after_refresh(self._step)

    async def _step(self) -> None:
        if self._is_reading:
            return
        log = self.query_one(WrappedLog)
        self._is_reading, read, self._read = True, self._read, self._log.read_new
        try:
            lines = await asyncio.to_thread(read)
        except OSError as error:
            log.border_subtitle = f"cannot be read: {error.strerror}"
            return
        finally:
            self._is_reading = False
        if lines:
            if self._is_empty:
                self._is_empty = False
                log.border_subtitle = str(self._log.path).replace("[", r"\[")
            elif (left_out := len(lines) - STEP_LINES) > 0:
                lines = [f"… {left_out:,} lines are left out here; the file has them", *lines[left_out:]]
            shown = [clean(line).expandtabs(4) for line in lines[-KEPT_LINES:]]
            words, self._words = self._words, 0
            if words:
                log.begin(shown[:words], shown[words:])
            else:
                log.write_lines(shown)

    def _first(self) -> list[str]:
        """What is there when the screen opens: the end of a long log, not its beginning."""
        words = self._log.last_words(KEPT_LINES // 2)
        self._words = len(words)
        return [*words, *self._log.last(KEPT_LINES - len(words))]

    def action_end(self) -> None:
        """To the end, and follow again."""
        self.query_one(WrappedLog).scroll_end(animate=False)

    def action_close(self) -> None:
        """Back to where it was asked for."""
        self.dismiss()


async def show_log(
    screen: Screen[Any], fleet: PanelFleet, model: str, event: FleetEvent | None = None
) -> None:
    """Open the log of a model over a screen, at an event if one is told.

    Whoever reads the last words of a server that died has seen why.
    """
    try:
        log = fleet.log(model) if event is None else await fleet.log_at(model, event)
    except PanelError as error:  # a record that cannot be read, or a model that the config had once
        screen.notify(f"{error.what}\n{error.cure}", severity="error", timeout=12, markup=False)
        return
    screen.app.push_screen(LogScreen(model, log, fleet.snapshot))
    screen.app.run_worker(log.seen())
