"""Where a block of Markdown ends, so that finished ones are laid out once and never again."""

from __future__ import annotations

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Blocks:
    """Takes text as it streams in; gives finished blocks, and the tail that may still change."""

    def __init__(self) -> None:
        self.tail = ""
        self._fence = ""
        self._scanned = 0
        self._blank_at: int | None = None

    def feed(self, text: str) -> list[str]:
        """The blocks that this text finished; the rest is in `tail`."""
        self.tail += text
        finished: list[str] = []
        while (end := self.tail.find("\n", self._scanned)) >= 0:
            line = self.tail[self._scanned : end]
            if self._blank_at is not None and line.strip() and not line[0].isspace():
                finished.append(self.tail[: self._blank_at].rstrip("\n"))
                self.tail = self.tail[self._scanned :]
                end -= self._scanned
                self._blank_at = None
            self._scanned = end + 1
            self._see(line)
        return finished

    def _see(self, line: str) -> None:
        fence = _FENCE.match(line)
        if self._fence:
            if fence and fence[1].startswith(self._fence) and not line.strip(" `~"):
                self._fence = ""
        elif fence:
            self._fence = fence[1]
        if line.strip():
            # An indented line after a blank one still belongs to the list item above it.
            self._blank_at = None
        elif not self._fence and self._blank_at is None and self.tail[: self._scanned].strip():
            self._blank_at = self._scanned
