"""The panel's way into a server lies in /tmp, which is cleaned: it is kept, and its loss ends nobody."""

from __future__ import annotations

import fcntl
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, write_config
from tests.fleet.conftest import SIMULATOR
from vllm_sleep_tui.fleet.store.records import Record, RecordStore


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[CommandLine]:
    """A simulated machine with two models that share a GPU, driven by its verbs."""
    model = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": {"VLLM_SIM_TIMES": "instant"}}
    gpus = [{"name": "Test", "memory": "24GiB"}]
    config = write_config(
        tmp_path / "vllm-sleep-tui.yaml", SIMULATOR, {"a": model, "b": model}, simulated_gpus=gpus
    )
    commands = CommandLine(config, tmp_path / "state")
    yield commands
    commands.close()


def record_of(machine: CommandLine, name: str) -> Record:
    return RecordStore(machine.state_home / "vllm-sleep-tui", machine.config).read(name)


def test_a_server_whose_way_in_was_removed_is_kept_by_whoever_settles_what_was_left(
    machine: CommandLine,
) -> None:
    machine("start", "a")
    record = record_of(machine, "a")
    assert record.socket is not None
    Path(record.socket).unlink()
    for verb in (("sleep", "a"), ("switch", "b"), ("switch", "b")):  # each finds what the one before left
        done = machine.run(*verb)
        assert done.returncode == 1
        assert f"{record.socket}, was removed" in done.stderr
        assert "Stop" in done.stderr or "stop the model with --force" in done.stderr
    told = machine.status()["a"]
    assert record.server is not None
    assert (told["state"], told["pid"]) == ("awake", record.server.pid)
    assert "was removed" in told["reason"]
    with urllib.request.urlopen(f"http://127.0.0.1:{record.port}/v1/models", timeout=60) as answer:
        assert answer.status == 200
    machine("stop", "a", "--force")
    machine("switch", "b")


def test_a_sleeper_whose_way_in_was_removed_is_kept_and_not_woken(machine: CommandLine) -> None:
    machine("start", "a")
    machine("sleep", "a")
    record = record_of(machine, "a")
    assert record.socket is not None
    Path(record.socket).unlink()
    for verb in (("wake", "a"), ("switch", "a")):
        done = machine.run(*verb)
        assert done.returncode == 1
        assert f"{record.socket}, was removed" in done.stderr
    told = machine.status()["a"]
    assert record.server is not None
    assert (told["state"], told["pid"]) == ("asleep", record.server.pid)
    machine("stop", "a", "--force")


def test_the_folder_of_a_server_is_locked_against_cleaners_while_it_lives(machine: CommandLine) -> None:
    machine("start", "a")
    folder = record_of(machine, "a").tmp_dir
    assert folder is not None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(BlockingIOError):  # as systemd-tmpfiles asks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        machine("stop", "a")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    assert not os.path.exists(folder)
