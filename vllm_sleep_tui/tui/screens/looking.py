"""What all screens share that look again and again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar

from textual.screen import Screen
from textual.timer import Timer

from vllm_sleep_tui.tui.drawing.paint import Painted


class LookingScreen(Screen[None]):
    """A screen that looks every so often while it can be seen."""

    look_timer: Timer | None = None
    keeps_readings: ClassVar[bool] = False
    """Whether what it sees is kept for the course of the GPUs' figures."""

    def look_every(self, seconds: float, look: Callable[[], Awaitable[None] | None]) -> None:
        """Call `look` from now on, while this screen is in front or behind a question."""
        self.look_timer = self.set_interval(seconds, look)

    def on_screen_suspend(self) -> None:
        """Rest while another screen is in front, unless it lets this one be seen."""
        if self.look_timer is not None and not self.app.screen.is_modal:
            self.look_timer.pause()
        for rack in self.query(
            "#textual-toastrack"
        ):  # the screen in front shows the same toasts; back, so does this
            rack.display = False

    def on_screen_resume(self) -> None:
        """Go on."""
        if self.look_timer is not None:
            self.look_timer.resume()

    def recolor(self) -> None:
        """Paint everything in the theme's new colours."""
        for widget in self.query(Painted):
            widget.refresh()
