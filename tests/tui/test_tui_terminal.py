"""The whole program in a real terminal (a pty)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from pty_terminal import Terminal


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
