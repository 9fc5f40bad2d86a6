"""The way out of a process that must end on a signal, or when its terminal is gone, whatever its loop does.

A loop that waits for a terminal which reads no more hears no signal that is told to the loop. So signals, and
the end of the terminal, go to a thread. It asks for the orderly end; if that has not come when the limit is
over, it ends the process. What is cut off by that is settled as after a kill, by whoever comes next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

LIMIT_SECONDS = 2.0
"""For the orderly end; with what follows it the process is gone within 3 s."""
LAST_WORDS_SECONDS = 0.5
"""Then the kernel ends it, even if its last words block."""
CUT_OFF = 1
"""The exit code of an end that came by the limit."""


class Leaving:
    """Watches for the end from its making on; to be made in the main thread."""

    def __init__(
        self,
        ask: Callable[[], object],
        signals: Iterable[int],
        *,
        terminal: int | None = None,
        limit: float | None = LIMIT_SECONDS,
        last_words: Callable[[], None] = lambda: None,
    ) -> None:
        """`ask` begins the orderly end and is called in another thread, once.

        `terminal` is watched for its end. With `limit` None the orderly end takes its time, and a second
        signal cuts it off. `last_words` are called before a cut.
        """
        self._ask = ask
        self._limit = limit
        self._last_words = last_words
        self._terminal = terminal
        self._signalled, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        for number in signals:
            signal.signal(number, self._hear)
        threading.Thread(target=self._watch, name="leaving", daemon=True).start()

    def _hear(self, *_: object) -> None:
        """In the main thread, between two steps of whatever it does, or of what it waits for."""
        signal.signal(
            signal.SIGTTOU, signal.SIG_IGN
        )  # in the background, giving the terminal back would stop us
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b".")

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        self._wait(None)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is on its way out
            self._ask()
        # Nobody says that the end has come: this thread ends with the process.
        deadline = None if self._limit is None else time.monotonic() + self._limit
        while self._wait(deadline) and self._limit is not None:
            pass
        signal.setitimer(signal.ITIMER_REAL, LAST_WORDS_SECONDS)
        try:
            self._last_words()
        finally:
            os._exit(CUT_OFF)

    def _wait(self, deadline: float | None) -> bool:
        """Wait for a signal or for the end of the terminal; False if neither came in time."""
        watched = select.poll()
        watched.register(self._signalled, select.POLLIN)
        if self._terminal is not None:
            watched.register(self._terminal, 0)  # what is typed is not ours: only its end is told
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        found = [descriptor for descriptor, _ in watched.poll(left)]
        if self._signalled in found:
            os.read(self._signalled, 1)
        if self._terminal is not None and self._terminal in found:
            forget_terminal(self._terminal)
            self._terminal = None
        return bool(found)


def leave_at_once(code: int = 0) -> NoReturn:
    """End this process without unwinding anything: a start under way is carried on by whoever comes next."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def forget_terminal(terminal: int) -> None:
    """Put the null device in the place of a terminal that is gone, wherever a standard stream leads there.

    What is still written on the way out goes nowhere instead of raising EIO, and fails nothing.
    """
    gone = os.fstat(terminal).st_rdev
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in {terminal, 0, 1, 2}:
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_rdev == gone:
                os.dup2(null, descriptor)
    os.close(null)
