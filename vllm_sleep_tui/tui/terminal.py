"""Textual's driver, made to outlast a terminal that reads no more or is gone, and a stop of the process."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from rich.segment import Segment
from textual._ansi_sequences import ANSI_SEQUENCES_KEYS
from textual._xterm_parser import XTermParser
from textual.color import Color
from textual.constants import ESCAPE_DELAY
from textual.drivers.linux_driver import LinuxDriver
from textual.filter import LineFilter
from textual.keys import Keys
from textual.message import Message

from vllm_sleep_tui.text import OBEYED, clean

if TYPE_CHECKING:
    from textual.app import App

# Terminals without the Kitty protocol send alt+enter as escape and return, which Textual takes for return
# alone: the question would be sent. ctrl+j begins a line, as it does.
cast(dict[str, Any], ANSI_SEQUENCES_KEYS)["\x1b\r"] = (Keys.ControlJ,)
MAX_BEHIND = 2**20
"""Bytes that wait for a terminal; what comes on top is left out, and painted anew when it reads again."""
MOST_AT_ONCE = 4096
"""Bytes of one write, which nothing takes back: little enough that the end soon has its turn."""
STOP_SECONDS = 0.5
"""How long the end waits for a terminal to take the last bytes."""
IN_PLACE_SECONDS = 0.2
RESTORED = (
    b"\x1b[?2004l\x1b[?7h\x1b[?2048l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l\x1b[<u"
    b"\x1b[?1049l\x1b[?25h\x1b[?1004l"
)
"""What LinuxDriver writes when it ends, for an end without it."""


class Writer(threading.Thread):
    """Writes to the terminal, and never keeps anybody waiting: `write` only adds to what is to be written."""

    def __init__(self, descriptor: int, caught_up: Callable[[], object]) -> None:
        """`caught_up` is called in this thread once a terminal that was left behind has read everything."""
        super().__init__(name="terminal", daemon=True)
        self._descriptor = descriptor
        self._caught_up = caught_up
        self._waiting = bytearray()
        self._behind = False
        self._ending = False
        self._changed = threading.Condition()  # its lock may be taken again: a signal's handler writes too

    def write(self, data: bytes) -> None:
        """Have it written, unless the terminal is too far behind."""
        with self._changed:
            self._behind = self._behind or len(self._waiting) + len(data) > MAX_BEHIND
            if self._behind:
                return
            self._waiting += data
            self._changed.notify()

    def drop(self) -> None:
        """Leave out what was not written yet: what comes now matters more."""
        with self._changed:
            self._waiting.clear()
            self._behind = False

    def stop(self) -> bool:
        """Write the rest; False if the terminal does not take it within STOP_SECONDS."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self.join(STOP_SECONDS)
        return not self.is_alive()

    def run(self) -> None:
        """Write until it is stopped; a terminal that is gone takes everything."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._behind or self._ending)
                data = bytes(self._waiting[:MOST_AT_ONCE])
                del self._waiting[:MOST_AT_ONCE]
                was_behind, self._behind = self._behind and not data, self._behind and bool(data)
                if not data and self._ending:
                    return
            if was_behind:
                self._caught_up()
            with contextlib.suppress(OSError):
                write_all(self._descriptor, data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, however long that takes; raises OSError."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # somebody else who has this terminal made it so
            select.select([], [descriptor], [])


def write_in_place(descriptor: int, data: bytes) -> None:
    """Write to a terminal instead of all that it has not read yet, which may fill it; raises OSError.

    `descriptor` does not block. Another thread may be waiting in a write: it is let go on, and should have no
    more to write than it had. Given up after IN_PLACE_SECONDS.
    """
    deadline = time.monotonic() + IN_PLACE_SECONDS
    while time.monotonic() < deadline:
        termios.tcflush(descriptor, termios.TCOFLUSH)
        termios.tcflow(descriptor, termios.TCOOFF)
        termios.tcflow(descriptor, termios.TCOON)  # a flush wakes no writer, this does
        with contextlib.suppress(BlockingIOError):
            if os.write(descriptor, data) == len(data):
                return
        time.sleep(0.01)


class PanelDriver(LinuxDriver):
    """Textual's, which would wait for the terminal in the event loop and take any SIGCONT for a resume.

    Its own writer is idle here: its queue is short, and who finds it full waits. Its reader would wake ten
    times a second, a tenth of what a panel at rest takes.
    """

    def __init__(
        self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        assert sys.__stderr__ is not None
        self._encoding = sys.__stderr__.encoding
        self._output = sys.__stderr__.fileno()
        self._writer: Writer | None = None
        self._attrs_inside: list[Any] | None = None
        """Of the terminal while it is ours; None while it is not."""
        self._input_ends = os.eventfd(0, os.EFD_CLOEXEC)

    def write(self, data: str) -> None:
        """Have it written; never waits."""
        assert self._writer is not None, "Driver must be in application mode"
        self._writer.write(data.encode(self._encoding, "backslashreplace"))

    def start_application_mode(self) -> None:
        """Take the terminal."""
        self._writer = Writer(self._output, lambda: self._loop.call_soon_threadsafe(self._repaint))
        self._writer.start()
        super().start_application_mode()  # type: ignore[no-untyped-call]
        with contextlib.suppress(termios.error):
            self._attrs_inside = termios.tcgetattr(self.fileno)

    def stop_application_mode(self) -> None:
        """Give the terminal back, however much of the screen it has not read."""
        self._attrs_inside = None
        if self._writer is not None:
            self._writer.drop()
            super().stop_application_mode()

    def run_input_thread(self) -> None:
        """Pass on what is typed. All that it wakes for besides is an escape that nothing follows: a key."""
        parser, decoder = XTermParser(self._debug), codecs.getincrementaldecoder("utf-8")()
        waiting = select.poll()
        for descriptor in (self.fileno, self._input_ends):
            waiting.register(descriptor, select.POLLIN)
        patience: float | None = None
        messages: Iterable[Message]
        while self._input_ends not in (ready := dict(waiting.poll(patience))):
            if not ready:
                patience, messages = None, parser.tick()
            else:
                data = os.read(self.fileno, MOST_AT_ONCE)
                if not data:  # no terminal, and at its end
                    return
                text = decoder.decode(data)  # nothing if the rest of a letter is still to come
                patience, messages = 1000 * ESCAPE_DELAY, parser.feed(text) if text else ()
            for message in messages:
                self.process_message(message)

    def disable_input(self) -> None:
        """End the reader."""
        os.eventfd_write(self._input_ends, 1)
        super().disable_input()
        os.eventfd_read(self._input_ends)

    def abandon(self, words: str) -> None:
        """In another thread, for want of another end: give the terminal back, if it reads, and speak."""
        with contextlib.suppress(OSError, termios.error):
            descriptor = self._opened_anew()
            if self._attrs_inside is not None:
                if self.attrs_before is not None:
                    termios.tcsetattr(descriptor, termios.TCSANOW, self.attrs_before)
                if self._writer is not None:
                    self._writer.drop()
                write_in_place(descriptor, RESTORED)
            os.write(descriptor, f"{words}\r\n".encode())

    def close(self) -> None:
        """End the threads; a terminal that reads no more finds itself given back when it reads again."""
        if self._writer is not None and not self._writer.stop():
            self._writer.drop()
            with contextlib.suppress(OSError, termios.error):
                write_in_place(self._opened_anew(), RESTORED)
        super().close()

    def _opened_anew(self) -> int:
        """The terminal, not to block; raises OSError. Ours must go on to block: the shell shares it."""
        return os.open(os.ttyname(self.fileno), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)

    def _sigcont_application(self, *_: object) -> None:
        """Resume if we suspended; a SIGSTOP, which nobody can announce, has left everything as it was."""
        if self._must_signal_resume:
            super()._sigcont_application()
        elif self._auto_restart:
            self._loop.call_soon_threadsafe(self._take_back)

    def _take_back(self) -> None:
        """A shell may have had the terminal meanwhile: its modes and the screen as they were."""
        try:
            in_front = os.tcgetpgrp(self.fileno) == os.getpgrp()
        except OSError:
            return  # not a terminal of ours, so no shell had it
        if in_front and self._attrs_inside is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self.fileno, termios.TCSANOW, self._attrs_inside)
            self.write("\x1b[?1049h\x1b[?25l\x1b[?1004h")
            self._enable_mouse_support()
            self._enable_bracketed_paste()
            self._disable_line_wrap()
            self._repaint()

    def _repaint(self) -> None:
        self._app.refresh(layout=True)


class Cleaned(LineFilter):
    """Takes from each line what a terminal would obey.

    Text from outside is cleaned where it comes in, or its escapes would leave their letters behind; this is
    for what was forgotten. What it takes is no cell wide, so nothing moves.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The segments, as they are if there is nothing to take."""
        if not any(OBEYED.search(segment.text) for segment in segments):
            return segments
        return [
            segment if segment.control else Segment(clean(segment.text), segment.style)
            for segment in segments
        ]


CLEANED = Cleaned()
