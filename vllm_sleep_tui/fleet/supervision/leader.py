"""One leader for each config: of all panels and `serve`s over it, the one that acts unasked.

The seat is a flock, which the kernel frees however its holder dies; who comes next tries twice a second. To
lead is to work: the leader's loop marks the seat at each turn, and one whose marks stop (its process was
stopped, or its loop hangs) is put out of the seat by whoever waits for it. It finds that out when it goes on,
before it acts.

The marks are only compared with each other, and silence is counted in the looks of who waits, by a clock that
halts with the machine: after a suspend, or a pause of all together, everybody goes on where they were.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path

import msgspec

from vllm_sleep_tui.fleet.store.locks import (
    Holder,
    describe,
    has_name,
    holder,
    make_unnamed,
    open_shared,
    read_holder,
    who_holds,
    write_word,
)

SILENT_SECONDS = 10.0
"""Without a mark for so long, a leader is put out of the seat."""
LOOK_COUNTS = 1.0
"""What a look at the seat adds to the silence at most: who was away itself has not heard it."""
log = logging.getLogger(__name__)


class LeaderLock:
    """The leader's place; one process at a time has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None
        self._mark: tuple[int, int] | None = None
        """The last one seen: of which file, when."""
        self._silence = 0.0
        self._looked = time.monotonic()

    @property
    def is_mine(self) -> bool:
        """Whether this process leads, and nobody has put it out meanwhile."""
        return self._held is not None and has_name(self._held, self._path)

    def take(self) -> bool:
        """Take the seat if it is free, or its holder silent; mark it if it is ours. Whether it is ours.

        A folder that refuses files has no leader.
        """
        if self._held is not None and not self.is_mine:
            self.leave()  # its file was removed or replaced: whoever locks the new one leads
        with contextlib.suppress(OSError):
            if self._held is None:
                self._held = self._sit_down()
            if self._held is not None:
                os.utime(self._held)  # the mark; of all that can be written a full disk allows this
        return self.is_mine

    def leave(self) -> None:
        """Let somebody else lead."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def who(self) -> Holder | None:
        """Who leads, as they say themselves; None if nobody does."""
        return read_holder(self._path)

    def _sit_down(self) -> int | None:
        """The seat's file, locked for us; None while somebody works in it. Raises OSError."""
        descriptor = open_shared(self._path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken
            try:
                if not self._is_silent(os.fstat(descriptor)):
                    return None
                who = who_holds(descriptor)
            finally:
                os.close(descriptor)
            log.warning("%s has not worked for %.0f s: this process leads now", describe(who), SILENT_SECONDS)
            descriptor = self._put_out()
        write_word(descriptor, msgspec.json.encode(holder("leading", "")).ljust(1024))
        return descriptor

    def _is_silent(self, seat: os.stat_result) -> bool:
        """Whether the seat has had no mark for SILENT_SECONDS, as far as this process has looked."""
        now, mark = time.monotonic(), (seat.st_ino, seat.st_mtime_ns)
        since, self._looked = now - self._looked, now
        self._silence = self._silence + min(since, LOOK_COUNTS) if mark == self._mark else 0.0
        self._mark = mark
        return self._silence >= SILENT_SECONDS

    def _put_out(self) -> int:
        """Put a new file, locked, in the place of the one that its holder does not let go.

        Of two who do this at once the later one leads: the other finds its file without the name.
        """
        descriptor, unnamed = make_unnamed(self._path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(unnamed, self._path)
        except OSError:
            os.close(descriptor)
            unnamed.unlink(missing_ok=True)
            raise
        return descriptor
