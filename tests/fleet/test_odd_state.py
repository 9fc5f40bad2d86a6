"""State that is not what it should be is the trouble of one model: every verb goes on for the others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, wait_until, write_config
from tests.fleet.conftest import SIMULATOR
from vllm_sleep_tui.fleet.store.records import RecordStore

SECONDS = 120.0
"""Limit of a verb that must not wait for anybody."""


def model(**env: str) -> dict[str, object]:
    return {
        "model": "sim/1GiB",
        "args": {"max-model-len": 2048},
        "env": {"VLLM_SIM_TIMES": "instant", **env},
    }


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[CommandLine]:
    """A simulated machine with two models on one GPU, driven by its verbs."""
    config = write_config(
        tmp_path / "vllm-sleep-tui.yaml",
        SIMULATOR,
        {"a": model(), "b": model()},
        simulated_gpus=[{"name": "Test", "memory": "24GiB"}],
    )
    commands = CommandLine(config, tmp_path / "state")
    yield commands
    for name in ("a", "b"):
        commands.run("stop", name, "--force")


def store_of(machine: CommandLine) -> RecordStore:
    return RecordStore(machine.state_home / "vllm-sleep-tui", machine.config)


def a_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def a_flood(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: read whole it ends the reader


def a_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def deep_json(path: Path) -> None:
    path.write_bytes(b"[" * 60_000)


@pytest.mark.parametrize(
    ("kind", "odd"),
    [("json", a_pipe), ("json", a_flood), ("json", deep_json), ("keeper", a_pipe), ("keeper", a_link)],
)
def test_it_harms_its_model_alone(machine: CommandLine, kind: str, odd: Callable[[Path], None]) -> None:
    machine("start", "b")
    path = store_of(machine).path("a", kind)
    path.unlink(missing_ok=True)
    odd(path)
    for verb in (("status", "--json"), ("orphans",), ("sleep", "b"), ("switch", "b")):
        done = machine.run(*verb, seconds=SECONDS)
        assert done.returncode == 0, (verb, done.stdout, done.stderr)
    done = machine.run("start", "a", seconds=SECONDS)
    assert done.returncode in (0, 1), done.stderr
    assert "Unexpected" not in done.stderr
    path.unlink(missing_ok=True)


def test_a_keepers_file_that_may_not_be_read_is_told_and_its_server_runs_on(machine: CommandLine) -> None:
    if os.getuid() == 0:
        pytest.skip("root may read every file")
    machine("start", "a")
    machine("start", "b")
    keeper = store_of(machine).path("a", "keeper")
    keeper.chmod(0)
    try:
        told = machine.status()
        assert str(keeper) in told["a"]["reason"]
        machine("sleep", "b")
    finally:
        keeper.chmod(0o600)
    assert machine.status()["a"]["state"] == "asleep"


def test_a_start_that_fails_in_priming_has_failed_and_was_not_stopped(
    tmp_path: Path, machine: CommandLine
) -> None:
    write_config(
        machine.config,
        SIMULATOR,
        {"a": {**model(VLLM_SIM_FAULTS="sleep_500"), "level": 1}, "b": model()},
        simulated_gpus=[{"name": "Test", "memory": "24GiB"}],
    )
    done = machine.run("start", "a")
    assert done.returncode == 1, done.stderr
    assert "vLLM refused to sleep" in done.stderr
    assert "was stopped" not in done.stderr
    told = machine.status()["a"]
    assert told["state"] == "failed"
    assert "vLLM refused to sleep" in told["reason"]


def test_an_engine_that_vanishes_while_it_loads_was_killed(machine: CommandLine) -> None:
    write_config(
        machine.config,
        SIMULATOR,
        {"a": model(VLLM_SIM_FAULTS="killed_while_loading"), "b": model()},
        simulated_gpus=[{"name": "Test", "memory": "24GiB"}],
    )
    done = machine.run("start", "a")
    assert done.returncode == 1
    assert "it was killed, most often by the kernel" in done.stderr
    assert "dmesg" in done.stderr
    assert "without giving a reason" not in done.stderr


def test_a_stop_that_somebody_else_ends_leaves_nothing_told(machine: CommandLine) -> None:
    write_config(
        machine.config,
        SIMULATOR,
        {"a": model(VLLM_SIM_FAULTS="sigterm_ignored,sleep_frees_nothing:2"), "b": model()},
        simulated_gpus=[{"name": "Test", "memory": "24GiB"}],
    )
    machine("start", "a")
    machine("sleep", "a")
    assert "not seen to go" in machine.status()["a"]["reason"]
    stopping = machine.begin("stop", "a")
    wait_until(lambda: machine.look("a").state == "stopping", seconds=SECONDS, what="the stop has begun")
    stopping.send_signal(signal.SIGKILL)
    stopping.communicate()
    machine.run("switch", "b", seconds=SECONDS)
    told = machine.status()["a"]
    assert (told["state"], told["reason"], told["cure"]) == ("stopped", None, None)


def test_a_log_that_a_person_cuts_or_removes_goes_on_without_a_gap(machine: CommandLine) -> None:
    machine("start", "a")
    log = machine.state_home / "vllm-sleep-tui/logs/a.log"
    assert log.stat().st_size > 0
    os.truncate(log, 0)
    machine("sleep", "a")
    wait_until(lambda: log.stat().st_size > 0, seconds=60, what="something is said")
    assert b"\0" not in log.read_bytes()
    log.unlink()
    machine("wake", "a")
    wait_until(lambda: log.exists() and log.stat().st_size > 0, seconds=60, what="a new file begins")


def test_the_end_of_a_long_log_is_shown(machine: CommandLine) -> None:
    machine("start", "a")
    machine("stop", "a")
    log = machine.state_home / "vllm-sleep-tui/logs/a.log"
    with log.open("w") as file:
        file.writelines(
            f"line {number} of a log that is longer than one read of it\n" for number in range(120_000)
        )
    shown = machine("logs", "a", "-n", "2").splitlines()
    assert [line.split()[1] for line in shown] == ["119998", "119999"]
    assert machine("logs", "a", "-n", "0") == ""
    log.unlink()
    a_pipe(log)
    done = machine.run("logs", "a", seconds=SECONDS)
    assert done.returncode == 1
    assert "not a regular file" in done.stderr
    log.unlink()


def test_two_configs_with_a_model_of_one_name_write_two_logs(tmp_path: Path, machine: CommandLine) -> None:
    gpus = [{"name": "Test", "memory": "24GiB"}]
    other = CommandLine(
        write_config(tmp_path / "other.yaml", SIMULATOR, {"a": model()}, simulated_gpus=gpus),
        machine.state_home,
    )
    machine("start", "a")
    machine("stop", "a")
    log = machine.state_home / "vllm-sleep-tui/logs/a.log"
    said = log.read_bytes()
    assert other.run("logs", "a").returncode == 1
    other("start", "a")
    other("stop", "a")
    assert log.read_bytes() == said
    assert "non-default args" in other("logs", "a", "-n", "1000")
    machine("start", "a")
    assert log.read_bytes() != said


def test_locks_of_simulated_gpus_are_gone_with_their_use(machine: CommandLine) -> None:
    machine("start", "--all")
    gpus = store_of(machine).path("simulated", "gpus") / "gpus.json"
    uuid = gpus.read_text().partition('"uuid": "')[2].partition('"')[0]
    machine("switch", "b")
    prefix = uuid.rpartition("-")[0]
    left = [
        path for folder in ("/run/lock", "/tmp") for path in Path(folder).glob(f"vllm-sleep-tui-*{prefix}*")
    ]
    assert left == []
