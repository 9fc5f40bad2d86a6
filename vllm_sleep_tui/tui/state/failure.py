"""What went wrong, on its way from a screen to a toast."""

from __future__ import annotations

import time
from collections.abc import Callable

from textual.message import Message
from textual.notifications import Notification

TOLD_SECONDS = 12.0
READ_SECONDS = 4.0
"""So long a toast stays at least: it may be over before anybody has read what it was."""


class Failure(Message):
    """Tell it; once `is_over` says so it is no longer told, as nothing is left to be done about it."""

    def __init__(self, title: str, text: str, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.title, self.text = title, text
        self.is_over = is_over


class ToldFailures:
    """The toasts of failures that may still be seen."""

    def __init__(self) -> None:
        self._told: list[tuple[Notification, Callable[[], bool]]] = []

    def add(self, toast: Notification, is_over: Callable[[], bool]) -> None:
        """Keep it until it is over, or its own time is."""
        self._told.append((toast, is_over))

    def over(self) -> list[Notification]:
        """Those that have to go now; each is told of once."""
        gone = [
            toast
            for toast, is_over in self._told
            if time.time() >= toast.raised_at + READ_SECONDS and (toast.has_expired or is_over())
        ]
        self._told = [(toast, is_over) for toast, is_over in self._told if toast not in gone]
        return gone
