"""Why a server died is told after it was started again, until a person has seen it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import CommandLine, wait_until, write_config
from tests.fleet.conftest import SIMULATOR

SECONDS = 120.0


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[CommandLine]:
    """A simulated machine with one model that is started again when it dies."""
    model = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": {"VLLM_SIM_TIMES": "instant"}}
    config = write_config(
        tmp_path / "vllm-sleep-tui.yaml",
        SIMULATOR,
        {"a": {**model, "restart": "on-failure"}},
        simulated_gpus=[{"name": "Test", "memory": "24GiB"}],
    )
    commands = CommandLine(config, tmp_path / "state")
    yield commands
    commands.run("stop", "a", "--force")


@contextmanager
def serving(machine: CommandLine, said: Path) -> Iterator[subprocess.Popen[str]]:
    """A headless leader."""
    process = machine.begin("serve", to=said)
    try:
        wait_until(lambda: "serve: leads" in said.read_text(), seconds=SECONDS, what="it leads")
        yield process
    finally:
        process.terminate()
        process.wait(SECONDS)


def die_and_come_back(machine: CommandLine, said: Path) -> None:
    """The engine is killed; the leader starts the model again."""
    with serving(machine, said):
        before = machine.look("a").pid
        os.kill(machine.engine("a").pid, signal.SIGKILL)
        wait_until(
            lambda: machine.look("a").state == "awake" and machine.look("a").pid != before,
            seconds=SECONDS,
            what="it is awake again",
        )


def test_it_is_told_until_its_log_is_looked_at(machine: CommandLine, tmp_path: Path) -> None:
    machine("start", "a")
    assert "last_failure" not in machine.status()["a"]
    die_and_come_back(machine, tmp_path / "serve.txt")
    told = machine.status()["a"]
    assert (told["state"], told["reason"]) == ("awake", None)
    assert set(told["last_failure"]) == {"reason", "cure", "at", "log"}
    assert "engine" in told["last_failure"]["reason"]
    assert "EngineDeadError" in Path(told["last_failure"]["log"]).read_text()
    people = machine("status")
    assert told["last_failure"]["reason"] in people
    assert "logs a" in people
    shown = machine("logs", "a", "-n", "500")
    assert shown.index("EngineDeadError") < shown.index("was started again") < shown.rindex("Started server")
    assert "last_failure" not in machine.status()["a"]
    assert "EngineDeadError" not in machine("logs", "a", "-n", "500")


def test_it_is_told_until_the_model_is_stopped(machine: CommandLine, tmp_path: Path) -> None:
    machine("start", "a")
    die_and_come_back(machine, tmp_path / "serve.txt")
    machine("sleep", "a")
    machine("wake", "a")
    assert "last_failure" in machine.status()["a"]
    machine("stop", "a")
    assert "last_failure" not in machine.status()["a"]
