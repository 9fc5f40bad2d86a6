"""Orphans: what nobody looks after is found, named and ended; what somebody looks after is not."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fleet.beside import record_of
from tests.fleet.conftest import Box, seen, until
from vllm_sleep_tui.fleet.keeper_client import LAUNCH_VARIABLE
from vllm_sleep_tui.fleet.observe.discovery import find_foreign_servers
from vllm_sleep_tui.fleet.observe.orphans import Orphan, end_orphans, find_orphans, summary
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record, encode
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, start_ticks

pytestmark = pytest.mark.usefixtures("own_orphans")
MakeBox = Callable[..., Box]


@contextmanager
def process(title: str, environment: dict[str, str]) -> Iterator[ProcessId]:
    """A real process with this command line."""
    running = subprocess.Popen(
        ["bash", "-c", f'exec -a "{title}" sleep 300'], env=os.environ | environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")[0] != title.encode():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield ProcessId(running.pid, start_ticks(running.pid) or 0)
    finally:
        running.kill()
        running.wait()


def orphans_of(launch: str | None, state_dir: Path) -> list[Orphan]:
    return [orphan for orphan in find_orphans(state_dir) if orphan.launch == launch]


def test_a_process_of_a_launch_without_a_keeper_is_an_orphan_and_can_be_ended(tmp_path: Path) -> None:
    launch = uuid.uuid4().hex
    with process("VLLM::EngineCore", {LAUNCH_VARIABLE: launch}) as left:
        found = orphans_of(launch, tmp_path)
        assert [orphan.process for orphan in found] == [left]
        assert found[0].ram_bytes > 0
        assert "1 process is left" in summary(found)[0]
        end_orphans(found)
        assert not is_alive(left)
        assert orphans_of(launch, tmp_path) == []


def test_a_process_of_a_launch_with_a_keeper_is_no_orphan(tmp_path: Path) -> None:
    launch = uuid.uuid4().hex
    env = {LAUNCH_VARIABLE: launch}
    with process("python /x/vllm_sleep_tui/fleet/keeper.py", env), process("VLLM::EngineCore", env):
        assert orphans_of(launch, tmp_path) == []


def test_an_engine_whose_environment_is_gone_is_found_by_its_record(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    with process("VLLM::EngineCore", {}) as engine:
        dead = ProcessId(engine.pid, engine.start + 1)
        launch = uuid.uuid4().hex
        record = Record(
            config="c", name="qwen", state=State.AWAKE, launch=launch, server=dead, engines=(engine,)
        )
        (tmp_path / "records/qwen-1.json").write_bytes(encode(record))
        (tmp_path / "records/phi-1.json").write_bytes(b"broken")
        assert [orphan.process for orphan in orphans_of(launch, tmp_path)] == [engine]


def test_an_engine_is_found_by_its_dead_keepers_word_when_its_record_is_gone(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    launch = uuid.uuid4().hex
    with process("VLLM::EngineCore", {}) as engine:  # leads its session, as a server does
        word = f'{{"launch": "{launch}", "server": {{"pid": {engine.pid}, "start": {engine.start}}}}}'
        (tmp_path / "records/qwen-1.keeper").write_text(word)
        assert [orphan.process for orphan in orphans_of(launch, tmp_path)] == [engine]


def test_the_process_that_now_has_a_dead_servers_pid_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    with process("somebody else", {}) as stranger:
        gone = ProcessId(stranger.pid, stranger.start - 1)
        record = Record(
            config="c", name="qwen", state=State.AWAKE, launch="reused", server=gone, engines=(gone,)
        )
        (tmp_path / "records/qwen-1.json").write_bytes(encode(record))
        assert orphans_of("reused", tmp_path) == []


async def test_a_server_that_somebody_looks_after_is_no_orphan(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
        assert orphans_of(record.launch, machine.state_dir) == []
        strangers = {server.process for server in find_foreign_servers(())}
        assert strangers.isdisjoint({*record.engines, record.server})


async def test_a_sleeper_whose_config_names_it_no_longer_is_an_orphan_with_its_ram(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        record = record_of(fleet, "a")
    machine.write({"b": {"model": "sim/4GiB"}}, ["24GiB"])
    found = orphans_of(record.launch, machine.state_dir)
    assert record.keeper in [orphan.process for orphan in found if orphan.is_keeper]
    assert set(record.engines) <= {orphan.process for orphan in found}
    assert all("no longer names a" in orphan.why for orphan in found)
    await asyncio.to_thread(end_orphans, found)
    assert not any(is_alive(orphan.process) for orphan in found)
    async with machine.open() as fleet:
        await until(lambda: [gpu.used_bytes for gpu in fleet.snapshot().gpus] == [0])


def as_somebody_else(tmp_path: Path, code: str) -> str:
    """What `code` prints for a user who may not enter `closed`, a folder with a config in it."""
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "c.yaml").write_text("models: {a: {model: x/y}}")
    tmp_path.chmod(0o755)
    closed.chmod(0)
    change = "import os; os.getuid() == 0 and os.setuid(54321); path = "
    imports, _, rest = code.partition("\n")
    program = f"{imports}\n{change}{str(closed / 'c.yaml')!r}\n{rest}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    closed.chmod(0o700)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_config_that_may_not_be_looked_for_may_still_name_its_model(tmp_path: Path) -> None:
    code = (
        "from vllm_sleep_tui.fleet.observe.orphans import Record, fault_of_config\n"
        "print(fault_of_config(Record(config=path, name='a')))"
    )
    assert as_somebody_else(tmp_path, code) == "None"


def test_a_model_in_a_folder_that_may_not_be_entered_is_not_there(tmp_path: Path) -> None:
    code = (
        "from vllm_sleep_tui.sizing.checkpoint import find_checkpoint; from pathlib import Path\n"
        "print(find_checkpoint(path, Path('/'), {}))"
    )
    assert as_somebody_else(tmp_path, code) == "None"


async def test_a_keeper_whose_state_folder_was_removed_is_an_orphan(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
    shutil.rmtree(machine.state_dir / "records")
    found = orphans_of(record.launch, machine.folder / "elsewhere")
    assert {orphan.why for orphan in found} == {"its state folder was removed"}
    assert record.keeper in [orphan.process for orphan in found]
    await asyncio.to_thread(end_orphans, found)
    assert not any(is_alive(orphan.process) for orphan in found)


async def test_the_command_names_orphans_and_ends_them_only_with_a_yes(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
    machine.config.unlink()

    def orphans(*words: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vllm_sleep_tui", "orphans", *words]
        return subprocess.run(command, input=answer, capture_output=True, text=True, timeout=60)

    assert record.server is not None
    listed = await asyncio.to_thread(orphans)
    assert f"pid {record.server.pid} " in listed.stdout
    assert "is gone" in listed.stdout
    refused = await asyncio.to_thread(orphans, "--end")
    assert refused.returncode == 1
    assert "--yes" in refused.stderr
    assert is_alive(record.server)
    await until(lambda: record.keeper is not None and is_alive(record.keeper))
    await asyncio.to_thread(end_orphans, orphans_of(record.launch, machine.state_dir))
    machine.write({"a": {"model": "sim/1GiB"}}, ["24GiB"])


async def test_a_killed_keepers_server_leaves_nothing_behind(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
        assert record.keeper is not None
        assert record.tmp_dir is not None
        assert Path(record.tmp_dir).is_dir()
        os.kill(record.keeper.pid, signal.SIGKILL)
        await until(lambda: record_of(fleet, "a").state is State.FAILED)
        assert seen(fleet, "a").state is State.FAILED
        assert not Path(record.tmp_dir).exists()
        assert orphans_of(record.launch, machine.state_dir) == []
