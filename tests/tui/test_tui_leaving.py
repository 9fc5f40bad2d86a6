"""The panel in a terminal that vanishes, stops reading, or is stopped: it ends or it works."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pty_terminal import DEADLINE, PANEL, Terminal
from talker import talker

from vllm_sleep_tui.fleet.store.locks import shared_folder

LIMIT = 60.0
"""For an end that is promised within 3 s, on a machine that has other work."""


class Desk:
    """A fleet with a model that talks without end, and panels over it."""

    def __init__(self, folder: Path, url: str, speed: float | None) -> None:
        self.config = folder / "vllm-sleep-tui.yaml"
        pace = {"VLLM_SIM_TIMES": "instant"} if speed is None else {"VLLM_SIM_SPEED": str(speed)}
        model = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": pace}
        content = {
            "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
            "simulated_gpus": [{"name": "Test", "memory": "24GiB"}],
            "models": {"talker": {"url": url}, "phi": model},
        }
        self.config.write_text(json.dumps(content))
        self.environment = os.environ | {
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "XDG_STATE_HOME": str(folder),
        }
        self.program = PANEL
        self.words = ["--config", str(self.config)]
        self.panels: list[Terminal] = []

    def open(self, *, controlling: bool = True) -> Terminal:
        """A panel that shows its models."""
        panel = Terminal([*self.program, *self.words], self.environment, 120, 40, controlling=controlling)
        self.panels.append(panel)
        panel.wait_for("SIMULATED", "talker", "phi")
        return panel

    def talking(self, *, controlling: bool = True) -> Terminal:
        """A panel in which an answer is streaming."""
        panel = self.open(controlling=controlling)
        panel.wait_for("● awake")
        panel.press("c")
        panel.press_until("vvv", "vvv")  # no key of the panel's: lost until the input has the focus
        panel.press("\r")
        panel.wait_for("word1")
        return panel

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        return subprocess.run(
            [sys.executable, "-m", "vllm_sleep_tui", *self.words, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )

    def look(self, name: str) -> dict[str, Any]:
        """What `status` says of a model."""
        models = json.loads(self.verb("status", "--json").stdout)["models"]
        return next(model for model in models if model["name"] == name)

    def leader(self) -> int | None:
        """The pid in the leader's seat; None if it is free."""
        path = next((self.config.parent / "vllm-sleep-tui").glob("leader-*.lock"), None)
        held = path and f":{path.stat().st_ino} 0 EOF"
        lines = [
            line for line in Path("/proc/locks").read_text().splitlines() if held and line.endswith(held)
        ]
        return int(lines[0].split()[4]) if lines else None

    def close(self) -> None:
        for panel in self.panels:
            panel.close()
        self.verb("stop", "--force", "phi")


@pytest.fixture
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    with talker() as url:
        made = Desk(tmp_path, url, getattr(request, "param", None))
        yield made
        made.close()


STOPS = 5
MOST_MORE = 2 * STOPS
"""A second pair of Textual's threads came with each continue; those that do work off the loop come and go."""


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.parametrize("controlling", [True, False], ids=["of its session", "of another session"])
def test_a_terminal_that_vanishes_during_an_answer_takes_the_panel_with_it(
    desk: Desk, controlling: bool
) -> None:
    for _ in range(3):
        panel = desk.talking(controlling=controlling)
        assert desk.leader() == panel.process.pid
        panel.vanish()
        assert panel.process.wait(LIMIT) == 0  # the orderly end; the cut says 1
        assert desk.leader() is None
    assert not list((desk.config.parent / "vllm-sleep-tui").glob("crashes/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_panel_whose_terminal_reads_no_more(desk: Desk, number: signal.Signals) -> None:
    desk.program = [sys.executable, "-m", "vllm_sleep_tui"]  # with its own limit
    panel = desk.talking()
    panel.wait_until_full()
    panel.process.send_signal(number)
    panel.process.wait(LIMIT)
    assert desk.leader() is None
    panel.wait_until(lambda: b"\x1b[?1049l" in panel.written and b"\x1b[?1003l" in panel.written)


def test_a_terminal_that_reads_no_more_does_not_keep_the_leader_from_its_work(desk: Desk) -> None:
    panel = desk.talking()
    assert desk.verb("start", "phi").returncode == 0
    panel.wait_until_full()
    pid = desk.look("phi")["pid"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE
    while (seen := desk.look("phi"))["pid"] in (None, pid):
        assert time.monotonic() < deadline, seen
    panel.wait_until(lambda: panel.text.count("phi") > 1)  # it is painted anew when it is read again
    panel.press_until("\x1b", "Stopped the answer")  # leaves the input, then stops
    panel.press_until("q", "Quit the panel?")


def test_stops_and_continues_start_no_threads_and_stop_no_panel(desk: Desk) -> None:
    panel = desk.talking()
    before = threads_of(panel.process.pid)
    for _ in range(STOPS):
        panel.process.send_signal(signal.SIGSTOP)
        panel.read()
        panel.process.send_signal(signal.SIGCONT)
        panel.written = b""
        panel.wait_for("word")
    assert threads_of(panel.process.pid) < before + MOST_MORE
    panel.process.send_signal(signal.SIGTERM)
    assert panel.end(LIMIT) == 0
    assert b"\x1b[?1049l" in panel.written


def test_a_hangup_with_its_sigcont_ends_the_panel(desk: Desk) -> None:
    panel = desk.talking()
    panel.process.send_signal(signal.SIGCONT)
    panel.process.send_signal(signal.SIGHUP)
    panel.process.send_signal(signal.SIGCONT)
    assert panel.end(LIMIT) == 0
    assert b"\x1b[?1049l" in panel.written


def test_suspended_by_sigtstp_it_gives_the_terminal_back_and_takes_it_again(desk: Desk) -> None:
    panel = desk.talking()
    before = threads_of(panel.process.pid)
    stat = Path(f"/proc/{panel.process.pid}/stat")
    for _ in range(STOPS):
        panel.written = b""
        panel.process.send_signal(signal.SIGTSTP)
        panel.wait_until(lambda: b"\x1b[?1049l" in panel.written)
        panel.wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        panel.written = b""
        panel.process.send_signal(signal.SIGCONT)
        panel.wait_until(lambda: b"\x1b[?1049h" in panel.written and "word" in panel.text)
    assert threads_of(panel.process.pid) < before + MOST_MORE


def signalled(number: signal.Signals) -> Callable[[Terminal], None]:
    """An end by a signal, whose terminal is given back and told what goes on."""

    def end(panel: Terminal) -> None:
        panel.process.send_signal(number)
        assert panel.end(LIMIT) == 0
        assert b"\x1b[?1049l" in panel.written
        panel.wait_for("Left while starting phi: whoever comes next carries it on.")

    return end


def vanished(panel: Terminal) -> None:
    """An end by the window's end."""
    panel.vanish()
    assert panel.process.wait(LIMIT) == 0


@pytest.mark.parametrize("desk", [2.0], indirect=True)
@pytest.mark.parametrize(
    "end",
    [signalled(signal.SIGTERM), signalled(signal.SIGHUP), vanished],
    ids=["SIGTERM", "SIGHUP", "a closed window"],
)
def test_a_start_under_way_does_not_hold_the_panel_and_goes_on_without_it(
    desk: Desk, end: Callable[[Terminal], None]
) -> None:
    panel = desk.open()
    panel.press("\x1b[B")
    panel.press("u")
    looks: list[int | None] = []

    def is_there() -> bool:  # the look that saw it is taken: another one takes seconds of the start
        looks.append(desk.look("phi")["pid"])
        return looks[-1] is not None

    panel.wait_until(is_there)
    pid = looks[-1]
    panel.written = b""
    end(panel)
    seen = desk.look("phi")
    assert (seen["state"], seen["pid"]) in (("starting", pid), ("awake", pid))
    desk.open()
    deadline = time.monotonic() + DEADLINE
    while (seen := desk.look("phi"))["state"] != "awake":
        assert time.monotonic() < deadline, seen
        assert seen["state"] == "starting"
    assert seen["pid"] == pid


def test_a_start_that_still_waits_for_its_turn_is_dropped_and_that_is_said(desk: Desk) -> None:
    (gpu,) = json.loads(desk.verb("status", "--json").stdout)["gpus"]
    lock = shared_folder() / f"vllm-sleep-tui-{gpu['uuid']}.lock"
    panel = desk.open()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        panel.press("\x1b[B")
        panel.press("u")
        panel.wait_for("waits for")
        panel.written = b""
        panel.process.send_signal(signal.SIGTERM)
        assert panel.end(LIMIT) == 0
    lock.unlink(missing_ok=True)
    panel.wait_for("Dropped, as it still waited for its turn: phi.")
    assert desk.look("phi")["state"] == "stopped"
