"""What stands before vLLM in `vllm_command`: scripts that do not `exec`, and programs that fork."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.command_line import CommandLine, title, wait_until, write_config
from tests.fleet.conftest import SIMULATOR
from vllm_sleep_tui.fleet.store.records import RecordStore

Make = Callable[[list[str]], CommandLine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A machine whose servers are started by a command."""
    made: list[CommandLine] = []

    def begin(command: list[str]) -> CommandLine:
        model = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": {"VLLM_SIM_TIMES": "instant"}}
        gpus = [{"name": "Test", "memory": "24GiB"}]
        config = write_config(tmp_path / "vllm-sleep-tui.yaml", command, {"a": model}, simulated_gpus=gpus)
        made.append(CommandLine(config, tmp_path / "state"))
        return made[0]

    yield begin
    for machine in made:
        machine.run("stop", "a", "--force")


def script(folder: Path) -> list[str]:
    """A wrapper as people write it, and what it says when it goes on after vLLM."""
    path = folder / "wrapper.sh"
    path.write_text(f'#!/bin/bash\n{shlex.join(SIMULATOR)} "$@"\necho "wrapper: vllm ended with $?"\n')
    path.chmod(0o700)
    return [str(path)]


def log_of(machine: CommandLine) -> str:
    return (machine.state_home / "vllm-sleep-tui/logs/a.log").read_text()


def test_a_server_below_a_script_is_shut_down_and_not_killed(make: Make, tmp_path: Path) -> None:
    machine = make(script(tmp_path))
    machine("start", "a")
    machine("sleep", "a")
    machine("wake", "a")
    machine("stop", "a")
    assert "[shutdown] API server: shutdown triggered" in log_of(machine)
    assert "wrapper: vllm ended with 0" in log_of(machine)
    assert machine.status()["a"]["state"] == "stopped"


def test_a_script_below_a_script_is_found_through(make: Make, tmp_path: Path) -> None:
    inner = script(tmp_path)
    outer = tmp_path / "outer.sh"
    outer.write_text(f'#!/bin/sh\nsh -c \'{shlex.join(inner)} "$@"; true\' inner "$@"\n')
    outer.chmod(0o700)
    machine = make([str(outer)])
    machine("start", "a")
    machine("stop", "a")
    assert "wrapper: vllm ended with 0" in log_of(machine)


def test_a_server_whose_wrapper_is_killed_serves_on(make: Make, tmp_path: Path) -> None:
    machine = make(script(tmp_path))
    machine("start", "a")
    wrapper = psutil.Process(machine.status()["a"]["pid"])
    assert "wrapper.sh" in title(wrapper)
    (server,) = (child for child in wrapper.children() if "simulator" in title(child))
    os.kill(wrapper.pid, signal.SIGKILL)
    store = RecordStore(machine.state_home / "vllm-sleep-tui", machine.config)
    wait_until(
        lambda: f'"server": {{"pid": {server.pid}'.encode() in store.path("a", "keeper").read_bytes(),
        seconds=60,
        what="its keeper has it as its child",
    )
    machine("sleep", "a")
    machine("stop", "a")
    assert "[shutdown] API server: shutdown triggered" in log_of(machine)
    assert not server.is_running()


@pytest.mark.skipif(shutil.which("setsid") is None, reason="there is no setsid here")
def test_setsid_as_first_word_works(make: Make) -> None:
    machine = make(["setsid", *SIMULATOR])
    machine("start", "a")
    assert "simulator" in title(psutil.Process(machine.status()["a"]["pid"]))
    machine("sleep", "a")
    machine("switch", "a")
    machine("stop", "a")
    assert "[shutdown] API server: shutdown triggered" in log_of(machine)
