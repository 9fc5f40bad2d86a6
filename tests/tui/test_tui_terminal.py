"""The whole program in a real terminal (a pty)."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pty_terminal import PANEL, Terminal

from vllm_sleep_tui.cli.demo import write_demo

_ECHO = """
import threading

from textual.app import App
from textual.widgets import Label

from vllm_sleep_tui.tui.terminal import PanelDriver


class Echo(App):
    def compose(self):
        yield Label()

    def on_key(self, event):
        reader = next(thread for thread in threading.enumerate() if thread.name == "textual-input")
        self.query_one(Label).update(f"{event.key} by {reader.native_id}")


Echo(driver_class=PanelDriver).run()
"""


@contextmanager
def opened(*words: str, **variables: str) -> Iterator[Terminal]:
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        **variables,
    }
    program = Terminal([*PANEL, *words], environment, 80, 24)
    try:
        yield program
    finally:
        program.close()


def test_the_demo_wakes_its_first_model_takes_keys_and_gives_the_terminal_back() -> None:
    with opened("demo", "--speed", "40") as terminal:
        terminal.wait_for("SIMULATED", "qwen", "phi", "GPU 1", "The demo starts qwen.")
        terminal.wait_for("● qwen")
        terminal.press("?")
        terminal.wait_for("Put all models to sleep")
        terminal.press("\x1b")
        terminal.wait_for("Qwen/Qwen3-0.6B")
        terminal.press_until("q", "Quit the panel?")  # the help may hear the first one
        terminal.press("s")
        assert terminal.end() == 0
        assert b"\x1b[?1049l" in terminal.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_panel_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    config = write_demo(tmp_path / "demo", 40)
    with opened("--config", str(config)) as terminal:
        terminal.wait_for("SIMULATED", "qwen")
        terminal.written = b""
        terminal.process.send_signal(number)
        assert terminal.end() == 0
        assert b"\x1b[?1049l" in terminal.written


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "xterm", "COLORTERM": ""}])
def test_without_colours_and_with_16_the_state_is_told_by_glyph_and_word(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    config = write_demo(tmp_path / "demo", 40)
    with opened("--config", str(config), **variables) as terminal:
        terminal.wait_for("▶ ▌ qwen", "○ stopped", "0.0 / 24.0 GiB")
        colors = set(re.findall(rb"\x1b\[[0-9;]*?[34]8;2;(\d+);(\d+);(\d+)m", terminal.written))
        grey = all(len(set(color)) == 1 for color in colors)
        assert grey if "NO_COLOR" in variables else not colors


def test_who_reads_keys_wakes_for_keys_alone_and_takes_a_lone_escape_for_one() -> None:
    environment = {**os.environ, "TERM": "xterm-256color", "ESCDELAY": "2000"}
    terminal = Terminal([sys.executable, "-c", _ECHO], environment, 80, 24)
    try:
        terminal.press_until("é", "é by ")
        terminal.wait_until(lambda: re.search(r"by \d+ ", terminal.text))
        thread = re.findall(r"by (\d+) ", terminal.text)[-1]
        before = waits(terminal.process.pid, thread)
        terminal.press("\x1b")
        terminal.wait_for("escape")  # after two seconds in which it could be the begin of something
        assert waits(terminal.process.pid, thread) - before < 10
    finally:
        terminal.close()


def waits(pid: int, thread: str) -> int:
    """How often a thread has gone to sleep so far."""
    status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
