"""The gateway in the panel, in a real terminal."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.gateway.conftest import Gated, MakeGated
from tests.tui.pty_terminal import Terminal


@pytest.fixture
def here(gated: MakeGated) -> Gated:
    return gated({"a": {"model": "sim/1GiB"}}, begins=False)


@pytest.fixture
def panel(here: Gated) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(here.config)]
    program = Terminal(command, {**here.env, "TERM": "xterm-256color"}, 110, 30)
    yield program
    program.close()


def test_a_key_shows_it_with_its_requests_and_another_closes_and_opens_it(
    here: Gated, panel: Terminal
) -> None:
    panel.wait_for("SIMULATED", "stopped")
    panel.wait_until(here.answers)
    panel.press("e")
    panel.wait_for(f"127.0.0.1:{here.port}/v1", "open", "0 being answered, 0 waiting")
    with httpx.Client(timeout=60) as client:
        body = {"model": "a", "prompt": "x", "max_tokens": 3}
        assert client.post(f"{here.url}/completions", json=body).status_code == 200
    panel.wait_for("anybody", "/v1/completions", "0 being answered, 0 waiting, 1 switch caused")
    panel.press("o")
    panel.wait_for("closed", "not opened here")
    panel.wait_until(lambda: not here.answers())
    panel.press("o")
    panel.wait_until(here.answers)
    panel.press("\x1b")
    panel.wait_for("awake")
    panel.press_until("q", "Leave them running")  # the first may be one with the escape, or close its screen
    panel.wait_for("The gateway closes with the panel.")
    panel.press("l")
    assert panel.end() == 0


def test_a_port_that_was_taken_is_told_in_full_and_the_key_tries_again(here: Gated) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", here.port))
        squatter.listen()
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(here.config)]
        panel = Terminal(command, {**here.env, "TERM": "xterm-256color"}, 80, 24)
        try:
            panel.wait_for("SIMULATED", "stopped")
            panel.press("e")
            panel.wait_for("not to be had", "choose another with", "{port:")
            panel.press("o")
            panel.wait_for("Trying again", "not to be had")
            squatter.close()
            panel.press("o")
            panel.wait_for("open", "0 being answered")
        finally:
            panel.close()
