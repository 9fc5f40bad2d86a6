"""The whole program in a real terminal (a pty)."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from vllm_sleep_tui.text import clean

DEADLINE = 20.0


class Terminal:
    """A program on a pty, and all it wrote."""

    def __init__(self, command: list[str], environment: dict[str, str], width: int, height: int) -> None:
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True
        )
        os.close(side)
        self.written = b""

    def read(self) -> None:
        ready, _, _ = select.select([self._main], [], [], 0.05)
        if ready:
            try:
                self.written += os.read(self._main, 65536)
            except OSError:  # the other side is closed: the program has ended
                time.sleep(0.02)

    def wait_for(self, *texts: str) -> None:
        """Wait until these texts were written since the last wait."""
        deadline = time.monotonic() + DEADLINE
        while not all(text in clean(self.written.decode(errors="replace")) for text in texts):
            assert time.monotonic() < deadline, clean(self.written.decode(errors="replace"))[-4000:]
            self.read()

    def press(self, keys: str) -> None:
        self.written = b""
        os.write(self._main, keys.encode())

    def end(self) -> int:
        """The exit code, once the program has ended by itself."""
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the panel did not end"
            self.read()
        self.read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._main)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }
    program = Terminal([sys.executable, "-m", "vllm_sleep_tui", "demo", "--speed", "40"], environment, 80, 24)
    yield program
    program.close()


def test_the_demo_opens_in_a_terminal_takes_keys_and_gives_the_terminal_back(terminal: Terminal) -> None:
    terminal.wait_for("SIMULATED", "qwen", "phi", "GPU 1")
    terminal.press("?")
    terminal.wait_for("Follow its log")
    terminal.press("\x1b")
    terminal.wait_for("stopped")
    terminal.press("q")
    assert terminal.end() == 0
    assert b"\x1b[?1049l" in terminal.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_panel_cleanly(terminal: Terminal, number: signal.Signals) -> None:
    terminal.wait_for("SIMULATED", "qwen")
    terminal.written = b""
    terminal.process.send_signal(number)
    assert terminal.end() == 0
    assert b"\x1b[?1049l" in terminal.written


def test_escape_asks_before_it_ends_a_benchmark(terminal: Terminal) -> None:
    terminal.wait_for("SIMULATED", "qwen", "phi", "GPU 1")
    terminal.press("b")
    terminal.wait_for("What to measure")
    terminal.press("r")
    terminal.wait_for("Run the benchmark?")
    terminal.press("y")
    terminal.wait_for("bench")
    terminal.press("\x1b")
    terminal.wait_for("Stop the benchmark?")
    terminal.press("y")
    terminal.wait_for("The benchmark was stopped")
