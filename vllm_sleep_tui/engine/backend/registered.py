"""The backend as vLLM's registry wants it (0.25 and newer); imported when a worker first sleeps or wakes."""

from __future__ import annotations

from typing import Any

from vllm.device_allocator.sleep_mode_backend import CuMemBackend, SleepModeBackend

from .sleeper import Sleeper


class PanelBackend(SleepModeBackend):  # type: ignore[misc]  # vLLM is not there where this is checked
    """Sleeps by the mover; vLLM's own backend stands by."""

    def __init__(self) -> None:
        super().__init__()
        self._stock = CuMemBackend()

    def suspend(self, level: int = 1) -> None:
        """Level 1 keeps the weights in RAM, 2 does not."""
        self._sleeper(level).sleep(level)
        self._state = "SUSPENDED"

    def resume(self, tags: list[str] | None = None) -> None:
        """Bring back what `tags` name; all without."""
        self._state = "RESUMING"
        self._sleeper(1).wake(tags)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Give up what `tags` name without a copy (vLLM 0.33)."""
        sleeper = self._sleeper(1)
        if sleeper.uses_own:
            self._stock.discard(tags)
        else:
            sleeper.mover.give_up(tags)
        self._state = "SUSPENDED"

    @classmethod
    def preserves_communicators(cls) -> bool:
        """They live outside of the memory that is moved, as with vLLM's own backend."""
        return True

    def _sleeper(self, level: int) -> Any:
        return Sleeper.here(lambda: self._stock.suspend(level), self._stock.resume)
