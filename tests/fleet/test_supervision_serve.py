"""`serve` as a process: signals, autostart, takeover, reload."""

from __future__ import annotations

import contextlib
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

from tests.fleet.conftest import Box
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.fleet.survey import read_once

MakeBox = Callable[..., Box]


class Served:
    """A box, and `serve` processes over it that write what they say into files."""

    def __init__(self, machine: Box) -> None:
        self.machine = machine
        self.processes: list[subprocess.Popen[bytes]] = []
        self.verbs: list[subprocess.Popen[bytes]] = []
        # The box's state folder is where the verbs look: XDG_STATE_HOME/vllm-sleep-tui.
        self.env = os.environ | {"XDG_STATE_HOME": str(machine.folder)}
        machine.state_dir.rmdir()
        machine.state_dir = machine.folder / "vllm-sleep-tui"

    def serve(self, *words: str) -> int:
        """Begin a serve; its number."""
        number = len(self.processes)
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.machine.config)]
        with self.log(number).open("wb") as file:
            process = subprocess.Popen(
                [*command, "serve", *words], env=self.env, stdout=file, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return number

    def verb(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a verb; what it says is not looked at."""
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.machine.config), *words]
        process = subprocess.Popen(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.verbs.append(process)
        return process

    def log(self, number: int) -> Path:
        return self.machine.folder / f"serve{number}.log"

    def until_said(self, number: int, text: str, limit: float = 60.0, after: int = 0) -> None:
        """Wait until the log holds a text, behind so many characters."""
        began = time.monotonic()
        while text not in self.log(number).read_text()[after:]:
            assert time.monotonic() - began < limit, self.log(number).read_text()
            assert self.processes[number].poll() is None or text in self.log(number).read_text()[after:]
            time.sleep(0.02)

    def end(self, number: int, signum: int = signal.SIGTERM) -> int:
        self.processes[number].send_signal(signum)
        return self.processes[number].wait(60)

    def look(self, name: str) -> ModelSnapshot:
        return read_once(load(self.machine.config), self.machine.state_dir).model(name)


@pytest.fixture
def served(box: MakeBox) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(models: dict[str, dict[str, Any]], **more: Any) -> Served:
        made.append(Served(box(models, **more)))
        return made[-1]

    yield make
    for each in made:
        for process in [*each.processes, *each.verbs]:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


AUTO = {"a": {"model": "sim/1GiB", "autostart": True}, "b": {"model": "sim/4GiB"}}


def test_serve_starts_what_it_should_and_leaves_it_running_on_sigterm(
    served: Callable[..., Served],
) -> None:
    here = served(AUTO)
    number = here.serve()
    here.until_said(number, "serve: leads")
    here.until_said(number, "a: awake")
    assert here.end(number) == 0
    assert here.look("a").state is State.AWAKE
    assert here.look("b").state is State.STOPPED


def test_serve_stops_its_models_on_exit_if_it_was_told_to(served: Callable[..., Served]) -> None:
    here = served(AUTO)
    number = here.serve("--stop-on-exit")
    here.until_said(number, "a: awake")
    assert here.end(number) == 0
    assert here.look("a").state is State.STOPPED


def test_serve_stops_what_it_can_on_exit_where_a_record_cannot_be_read(served: Callable[..., Served]) -> None:
    here = served(AUTO)
    number = here.serve("--stop-on-exit")
    here.until_said(number, "a: awake")
    here.until_said(number, "b: stopped")
    path = RecordStore(here.machine.state_dir, here.machine.config).path("b")
    path.unlink(missing_ok=True)
    path.symlink_to(path)
    code = here.end(number)
    path.unlink()
    assert code == 0
    assert here.look("a").state is State.STOPPED


def test_a_start_under_way_at_sigterm_is_carried_on_by_the_next_serve(
    served: Callable[..., Served],
) -> None:
    here = served({"a": {"model": "sim/1GiB", "autostart": True}}, speed="3")
    first = here.serve()
    here.until_said(first, "a: starting")
    while here.look("a").pid is None:
        time.sleep(0.01)
    pid = here.look("a").pid
    assert here.end(first) == 0
    assert here.look("a").state is State.STARTING
    second = here.serve()
    here.until_said(second, "a: awake")
    assert here.look("a").pid == pid


def test_another_serve_takes_over_and_restarts_what_died(
    served: Callable[..., Served],
) -> None:
    here = served(AUTO)
    first = here.serve()
    here.until_said(first, "a: awake")
    second = here.serve()
    here.until_said(second, "another panel or serve leads")
    here.end(first, signal.SIGKILL)
    here.until_said(second, "serve: leads")
    pid = here.look("a").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    here.until_said(second, "restart 1 of 3")
    deadline = time.monotonic() + 60
    while here.look("a").state is not State.AWAKE or here.look("a").pid == pid:
        assert time.monotonic() < deadline, here.log(second).read_text()
        time.sleep(0.05)


def test_a_leader_that_is_stopped_loses_the_seat_and_sees_it_when_it_goes_on(
    served: Callable[..., Served],
) -> None:
    here = served(AUTO)
    first = here.serve()
    here.until_said(first, "a: awake")
    second = here.serve()
    here.until_said(second, "another panel or serve leads")
    here.processes[first].send_signal(signal.SIGSTOP)
    here.until_said(second, "serve: leads", 120)
    assert f"process {here.processes[first].pid}, which is stopped" in here.log(second).read_text()
    pid = here.look("a").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    here.until_said(second, "restart 1 of 3", 60)
    here.processes[first].send_signal(signal.SIGCONT)
    here.until_said(first, "another panel or serve leads, waiting", 60)
    assert "restart 1 of 3" not in here.log(first).read_text()


def test_serve_that_stops_its_models_drops_what_it_was_to_start_and_leaves_others_alone(
    served: Callable[..., Served],
) -> None:
    models = {"a": {"model": "sim/1GiB", "autostart": True}, "b": {"model": "sim/4GiB"}}
    here = served(models, speed="1.5")
    theirs = here.verb("start", "b")
    while here.look("b").pid is None:
        assert theirs.poll() is None
        time.sleep(0.05)
    number = here.serve("--stop-on-exit")
    here.until_said(number, "autostart: a")
    assert here.end(number) == 0
    assert f"b is being started by process {theirs.pid}" in here.log(number).read_text()
    assert here.look("a").state is State.STOPPED
    assert here.look("b").state is State.STARTING
    assert theirs.wait(180) == 0
    assert here.look("b").state is State.AWAKE


def test_a_reload_leaves_what_runs_alone_and_says_what_it_means(served: Callable[..., Served]) -> None:
    here = served(AUTO)
    number = here.serve()
    here.until_said(number, "a: awake")
    pid = here.look("a").pid
    written = json.loads(here.machine.config.read_text())

    written["models"]["c"] = written["models"]["b"]
    here.machine.config.write_text(json.dumps(written))
    here.processes[number].send_signal(signal.SIGHUP)
    here.until_said(number, "reload: done, 3 models")
    here.until_said(number, "c: stopped")
    assert "needs a restart" not in here.log(number).read_text()

    changed = json.loads(json.dumps(written))
    changed["models"]["a"]["args"]["max-model-len"] = 1024
    here.machine.config.write_text(json.dumps(changed))
    here.processes[number].send_signal(signal.SIGHUP)
    here.until_said(number, "a changed and needs a restart")

    for part, key, value in (
        (changed, "vllm_command", ["/usr/bin/env", *written["vllm_command"]]),
        (changed["models"]["a"], "sleep_backend", "stock"),
    ):
        said = here.log(number).read_text()
        part[key] = value
        here.machine.config.write_text(json.dumps(changed))
        here.processes[number].send_signal(signal.SIGHUP)
        here.until_said(number, "a changed and needs a restart", after=len(said))

    here.machine.config.write_text("models: [")
    here.processes[number].send_signal(signal.SIGHUP)
    here.until_said(number, "The old config holds")

    here.machine.config.write_text(json.dumps(written | {"models": {"b": written["models"]["b"]}}))
    here.processes[number].send_signal(signal.SIGHUP)
    here.until_said(number, f"a is no longer in the config; its server (pid {pid}) is left running")
    here.machine.config.write_text(json.dumps(written))
    assert here.look("a").pid == pid
    assert here.look("a").state is State.AWAKE
