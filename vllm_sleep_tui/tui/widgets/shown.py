"""What all widgets of the dashboard share that are painted from its moment."""

from __future__ import annotations

from textual.geometry import Size

from vllm_sleep_tui.tui.drawing.paint import Line, Painted
from vllm_sleep_tui.tui.state.view import View


class Shown(Painted):
    """Paints the moment that it was last shown, and nothing before the first."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._view: View | None = None

    def show(self, view: View) -> None:
        """Show this moment."""
        self._view = view
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """The moment's lines."""
        return [] if self._view is None else self.draw(self._view, size)

    def draw(self, view: View, size: Size) -> list[Line]:
        """The lines of this moment for a content area of this size."""
        raise NotImplementedError
