"""A terminal (a pty) with a program in it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence

from vllm_sleep_tui.text import clean

DEADLINE = 60.0
_PATIENT = """
from vllm_sleep_tui import leaving

leaving.Leaving.__init__.__kwdefaults__["limit"] = 30.0
from vllm_sleep_tui.cli import main

main()
"""
PANEL = [sys.executable, "-c", _PATIENT]
"""The program with all the time that its orderly end takes on a busy machine: its own limit is 2 s."""


class Terminal:
    """A program on a pty, and all it wrote; with `controlling` it is its session's."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        width: int,
        height: int,
        *,
        controlling: bool = False,
    ) -> None:
        self._main, side = pty.openpty()
        self._name = os.ttyname(side)
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

        def own() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            # Its size is that of the pty: xdist's workers have these set to one of their own.
            env={name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")},
            start_new_session=True,
            preexec_fn=own if controlling else None,
        )
        os.close(side)
        self.written = b""

    @property
    def text(self) -> str:
        """What was written since the last key, without escapes."""
        return clean(self.written.decode(errors="replace"))

    def read(self) -> None:
        """Take what there is, waiting for it a little."""
        ready, _, _ = select.select([self._main], [], [], 0.05)
        if ready:
            try:
                self.written += os.read(self._main, 65536)
            except OSError:  # the other side is closed: the program has ended
                time.sleep(0.02)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Read until a condition holds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, self.text[-4000:]
            self.read()

    def wait_for(self, *texts: str) -> None:
        """Wait until these texts were written since the last key."""
        self.wait_until(lambda: all(text in self.text for text in texts))

    def wait_until_full(self) -> None:
        """Read nothing until the terminal takes no more, and not only for a moment."""
        side = os.open(self._name, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            deadline = time.monotonic() + DEADLINE
            full = 0
            while full < 10:
                assert time.monotonic() < deadline, "the terminal did not fill up"
                _, writable, _ = select.select([], [side], [], 0)
                full = 0 if writable else full + 1
                time.sleep(0.02)
        finally:
            os.close(side)

    def press(self, keys: str) -> None:
        """Type, as fast as the terminal takes it."""
        self.written = b""
        self._type(keys)

    def press_until(self, keys: str, text: str) -> None:
        """Type again every second until a text was written since the first time.

        For a key that may be lost with the screen that goes, or be one with the escape before it.
        """
        self.written = b""
        deadline = time.monotonic() + DEADLINE
        while text not in self.text:
            assert time.monotonic() < deadline, self.text[-4000:]
            self._type(keys)
            again = time.monotonic() + 1.0
            while text not in self.text and time.monotonic() < again:
                self.read()

    def _type(self, keys: str) -> None:
        rest = keys.encode()
        while rest:
            rest = rest[os.write(self._main, rest) :]

    def end(self, limit: float = DEADLINE) -> int:
        """The exit code, once the program has ended by itself."""
        deadline = time.monotonic() + limit
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the panel did not end"
            self.read()
        self.read()
        return self.process.returncode

    def vanish(self) -> None:
        """Close the terminal under the program."""
        os.close(self._main)
        self._main = -1

    def close(self) -> None:
        """End the program if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._main >= 0:
            self.vanish()
