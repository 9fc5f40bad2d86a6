"""How long nobody has touched the panel: what can wait is done then."""

from __future__ import annotations

import time


class Hands:
    """The person's hands on keyboard and mouse."""

    def __init__(self) -> None:
        self._moved = time.monotonic()

    def move(self) -> None:
        """A key, a click or a paste came."""
        self._moved = time.monotonic()

    @property
    def rest_seconds(self) -> float:
        """Since the last of them, or since the start."""
        return time.monotonic() - self._moved
