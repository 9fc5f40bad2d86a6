"""A short history: the last readings with their times."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """One reading."""

    time: float
    """UTC seconds."""
    value: float | None
    """None: not known at that time."""


class Ring:
    """Keeps the last `length` readings and forgets the older ones."""

    def __init__(self, length: int) -> None:
        self._points: deque[Point] = deque(maxlen=length)

    def __len__(self) -> int:
        return len(self._points)

    def append(self, time: float, value: float | None) -> None:
        """Add a reading taken at `time` (UTC seconds)."""
        self._points.append(Point(time, value))

    @property
    def latest(self) -> Point | None:
        """The newest reading; None before the first."""
        return self._points[-1] if self._points else None

    def since(self, time: float) -> tuple[Point, ...]:
        """The readings taken at `time` (UTC seconds) or later, oldest first."""
        return tuple(point for point in self._points if point.time >= time)
