"""Stretches of bars on their way from where they were drawn to where they belong."""

from __future__ import annotations

import time
from collections.abc import Mapping

SECONDS = 0.3
LEAST = 0.04
"""Of the whole bar; less is drawn at once, since it would be a cell or two."""
Key = tuple[int, str]
"""The GPU's index and whose stretch it is."""


class Slide:
    """Shares of bars, from 0 to 1; what is told of it is always where it belongs, only the drawing lags."""

    def __init__(self) -> None:
        self._before: dict[Key, float] = {}
        self._goal: dict[Key, float] = {}
        self._began = 0.0

    def go(self, goal: Mapping[Key, float], *, at_once: bool) -> bool:
        """Whether there is a way to go from what is drawn now to `goal`; with `at_once` there never is."""
        is_first, drawn = not self._goal, {key: self.share(key) for key in goal}
        far = any(abs(drawn[key] - share) >= LEAST for key, share in goal.items())
        if far and not is_first and not at_once:
            if dict(goal) != self._goal:
                self._before, self._began = drawn, time.monotonic()
        elif at_once or not self.is_under_way:
            self._before = dict(goal)
        self._goal = dict(goal)
        return self.is_under_way and not at_once

    @property
    def is_under_way(self) -> bool:
        """Whether another drawing would differ."""
        return time.monotonic() < self._began + SECONDS

    def share(self, key: Key) -> float:
        """What to draw now."""
        goal = self._goal.get(key, 0.0)
        left = max(0.0, 1 - (time.monotonic() - self._began) / SECONDS)
        # Fast at first, so that the eye is led to where it ends.
        return goal + (self._before.get(key, 0.0) - goal) * left * left
