"""The log of one model, followed while it is looked at."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Log, Static

from vllm_sleep_tui.engine.logs import LogTail
from vllm_sleep_tui.tui.clean import clean

KEPT_LINES = 5_000
STEP_SECONDS = 0.2


class LogScreen(Screen[None]):
    """The whole screen for one log."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,l,q", "close", "back", show=False),
        Binding("end,G", "end", "end", show=False),
    ]

    def __init__(self, model: str, path: Path) -> None:
        super().__init__()
        self._model = model
        self._path = path
        self._tail = LogTail(path)
        self._timer: Timer | None = None
        self._is_empty = True

    def compose(self) -> ComposeResult:
        """The log and its keys."""
        log = Log(max_lines=KEPT_LINES, id="log")
        log.border_title = f"Log of {self._model}"
        yield log
        yield Static("esc back   ↑ ↓ page up page down scroll   end follow", id="log-keys", markup=False)

    def on_mount(self) -> None:
        """Follow."""
        log = self.query_one(Log)
        log.border_subtitle = "nothing is written yet"
        log.focus()
        self._timer = self.set_interval(STEP_SECONDS, self._step)
        self.call_after_refresh(self._step)

    def on_screen_suspend(self) -> None:
        """Rest while nobody looks."""
        if self._timer is not None:
            self._timer.pause()

    def on_screen_resume(self) -> None:
        """Go on."""
        if self._timer is not None:
            self._timer.resume()

    async def _step(self) -> None:
        log = self.query_one(Log)
        try:
            lines = await asyncio.to_thread(self._tail.read_new)
        except OSError as error:
            log.border_subtitle = f"cannot be read: {error.strerror}"
            return
        if lines:
            if self._is_empty:
                self._is_empty = False
                log.border_subtitle = str(self._path).replace("[", r"\[")
            # Of a flood only what can be kept is laid out.
            log.write_lines([clean(line) for line in lines[-KEPT_LINES:]])

    def action_end(self) -> None:
        """To the end, and follow again."""
        self.query_one(Log).scroll_end(animate=False)

    def action_close(self) -> None:
        """Back to the dashboard."""
        self.dismiss()
