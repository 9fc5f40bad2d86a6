"""A line that says what is looked for."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Input, Static


class FindLine(Horizontal):
    """An input behind the key that leads to it, so that it reads as a search whatever stands in it."""

    def __init__(self, words: Input, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._words = words
        self._mark = Static("/ ")

    def compose(self) -> ComposeResult:
        """The mark and the input."""
        yield self._mark
        yield self._words

    def mark(self, text: str = "/") -> None:
        """Put another word before the input, while it is for something else."""
        self._mark.update(f"{text} ")
