"""Words of others on the whole panel's way to a real terminal: none is an order to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pty_terminal import PANEL, Terminal

from tests.hostile_text import OSC, PAYLOAD, HostileServer

ORDERS = [
    OSC[:-1].encode(),
    b"\x1b[31mevil",
    *(char.encode() for char in "\x7f\x80\x9b\x9d\u061c\u200e\u200f\u2028\u202a\u202e\u2066\u2069"),
]
"""The panel has escapes of its own, but none of these."""


@pytest.fixture
def server() -> Iterator[HostileServer]:
    hostile = HostileServer()
    yield hostile
    hostile.close()


@pytest.fixture
def config(tmp_path: Path, server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a log, and a server that is attached; both folders bear a name of others' making."""
    folder = tmp_path / PAYLOAD.replace("/", "")
    logs = folder / "state/vllm-sleep-tui/logs"
    logs.mkdir(parents=True, mode=0o700)
    logs.parent.chmod(0o700)
    (logs / "ours.log").write_text(f"one {PAYLOAD}\nWARNING {PAYLOAD}\n\x1b]0;never closed\nthe last line\n")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    path = folder / "c.yaml"
    path.write_text(
        "vllm_command: [/nowhere/vllm]\nmodels:\n"
        f"  ours: {{model: x/y, gpus: []}}\n  far: {{url: '{server.url}'}}\n"
    )
    return path


def test_no_order_of_others_reaches_the_terminal(config: Path) -> None:
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    panel = Terminal([*PANEL, "--config", str(config)], environment, 120, 40)
    written = b""

    def step(keys: str, *shown: str) -> None:
        nonlocal written
        written += panel.written
        panel.press(keys)
        panel.wait_for(*shown)

    try:
        panel.wait_for("ours", "far")
        step("l", "the last line", "mtxt.")
        step("\x1b", "Models", "far")  # the dashboard again: an escape read with the next key is another
        step("\x1b[B", "Ask far")
        step("c", "leave the input")
        step("hi", "hi")
        step("\r", "done", "TTFT")  # which is told at the end of the answer
        step("err", "err")
        step("\r", "no: ")
        step("\x1b", "far")
        step("u", "far")
        panel.process.terminate()
        assert panel.end() == 0
        written += panel.written
    finally:
        panel.close()
    assert [order for order in ORDERS if order in written] == []
