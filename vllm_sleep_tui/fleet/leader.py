"""One leader for each config: of all panels and `serve`s over it, the one that acts unasked.

The seat is a flock, which the kernel frees however its holder dies; who comes next tries twice a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from vllm_sleep_tui.fleet.locks import Holder, has_name, holder, open_shared, read_holder, write_word


class Seat:
    """The leader's place; one process at a time has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this process leads."""
        return self._held is not None

    def take(self) -> bool:
        """Take the seat if it is free; whether it is ours. A folder that refuses files has no leader."""
        if self._held is not None:
            if has_name(self._held, self._path):
                return True
            self.leave()  # its file was removed: whoever locks the new one leads
        with contextlib.suppress(OSError):
            descriptor = open_shared(self._path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # taken
                os.close(descriptor)
                return False
            write_word(descriptor, msgspec.json.encode(holder("leading", "")).ljust(1024))
            self._held = descriptor
        return self.is_mine

    def leave(self) -> None:
        """Let somebody else lead."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def who(self) -> Holder | None:
        """Who leads, as they say themselves; None if nobody does."""
        return read_holder(self._path)
