"""Whoever is ended is proven to be ours; a number that a dead server had proves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.command_line import CommandLine, wait_until, write_config
from tests.fleet.conftest import SIMULATOR
from tests.orphans import ending
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record, RecordStore, encode
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, start_ticks


@contextmanager
def left_in_a_session() -> Iterator[tuple[ProcessId, int]]:
    """A process whose session's leader has ended, and the session's number: a tool left in the background."""
    program = "import os, subprocess; print(subprocess.Popen(['sleep', '300']).pid, flush=True)"
    leader = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdout is not None
    with leader.stdout as said:
        pid = int(said.readline())
    leader.wait()
    assert start_ticks(leader.pid) is None
    process = ProcessId(pid, start_ticks(pid) or 0)
    assert os.getsid(pid) == leader.pid
    try:
        yield process, leader.pid
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[CommandLine]:
    """A simulated machine with one model, driven by its verbs."""
    config = write_config(
        tmp_path / "vllm-sleep-tui.yaml",
        SIMULATOR,
        {"a": {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": {"VLLM_SIM_TIMES": "instant"}}},
        simulated_gpus=[{"name": "Test", "memory": "24GiB"}],
    )
    commands = CommandLine(config, tmp_path / "state")
    yield commands
    commands.run("stop", "a", "--force")


def store_of(machine: CommandLine) -> RecordStore:
    return RecordStore(machine.state_home / "vllm-sleep-tui", machine.config)


def every_ending_verb(machine: CommandLine, forge: Callable[[], None], innocent: ProcessId) -> None:
    """Forge before each verb that may end something; the innocent outlives them all."""
    for verb in (("orphans", "--end", "--yes"), ("stop", "a"), ("start", "a"), ("restart", "a")):
        machine.run("stop", "a", "--force")
        forge()
        with ending() if verb[0] == "orphans" else nullcontext():
            done = machine.run(*verb)
        assert is_alive(innocent), (verb, done.stdout, done.stderr)


def test_a_dead_servers_session_number_makes_nobody_ours(machine: CommandLine) -> None:
    with left_in_a_session() as (innocent, number):
        store = store_of(machine)
        launch = uuid.uuid4().hex
        gone = ProcessId(number, innocent.start - 1)

        def forge() -> None:
            record = Record(
                config=store.config,
                name="a",
                state=State.AWAKE,
                since=1.0,
                launch=launch,
                server=gone,
                port=9,
            )
            store.path("a").write_bytes(encode(record))
            word = f'{{"launch": "{launch}", "server": {{"pid": {number}, "start": {gone.start}}}}}'
            store.path("a", "keeper").write_text(word)

        every_ending_verb(machine, forge, innocent)


def test_what_was_recorded_before_the_machine_was_started_again_makes_nobody_ours(
    machine: CommandLine,
) -> None:
    with left_in_a_session() as (innocent, _):
        store = store_of(machine)
        launch = uuid.uuid4().hex
        before = f'{{"pid": {innocent.pid}, "start": {innocent.start}, "boot": "00000000"}}'

        def forge() -> None:
            record = encode(
                Record(config=store.config, name="a", state=State.AWAKE, since=1.0, launch=launch)
            )
            store.path("a").write_bytes(record)
            word = (
                f'{{"launch": "{launch}", "keeper": {before}, "server": {before}, "engines": [{before}], '
                '"asked": true}'
            )
            store.path("a", "keeper").write_text(word)

        every_ending_verb(machine, forge, innocent)


def test_an_engine_that_hides_its_launch_is_ended_though_its_keeper_is_gone(machine: CommandLine) -> None:
    machine.environment["VLLM_SIM_HIDES_LAUNCH"] = "1"
    machine("start", "a")
    store = store_of(machine)
    record = store.read("a")
    assert record.keeper is not None
    assert record.engines
    engine = record.engines[0]
    assert b"SLEEP_TUI_LAUNCH" not in Path(f"/proc/{engine.pid}/environ").read_bytes()
    wait_until(
        lambda: str(engine.pid).encode() in store.path("a", "keeper").read_bytes(),
        seconds=60,
        what="the keeper writes its engine down",
    )
    with ending():
        os.kill(record.keeper.pid, signal.SIGKILL)
        store.path("a").unlink()
        assert is_alive(engine)
        machine("orphans", "--end", "--yes")
        assert not is_alive(engine)


def test_a_record_of_the_version_before_keeps_its_running_server(machine: CommandLine) -> None:
    machine("start", "a")
    store = store_of(machine)
    record = store.read("a")
    old = json.loads(store.path("a").read_bytes().split(b"\n")[0])

    def without_boot(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: without_boot(held) for key, held in value.items() if key not in ("boot", "last_failure")
            }
        return [without_boot(held) for held in value] if isinstance(value, list) else value

    line = json.dumps(without_boot(old)).encode()
    page = b"%s\n%08x\n" % (line, zlib.crc32(line))
    store.path("a").write_bytes(page.ljust(4096))
    assert machine.status()["a"]["state"] == "awake"
    machine("sleep", "a")
    assert record.server is not None
    assert machine.status()["a"]["pid"] == record.server.pid
