"""The keeper, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import MARKER
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet import keeper
from vllm_sleep_tui.fleet.keeper_client import (
    KeeperSpec,
    KeeperStatus,
    ask_to_stop,
    end_members,
    is_kept,
    launch,
    members,
    read_status,
)
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, start_ticks

pytestmark = pytest.mark.usefixtures("own_orphans")
READY = "import signal, sys, time, os, subprocess\nprint('up', flush=True)\n"
SLEEP = "time.sleep(120)\n"


class Kept:
    """A keeper with a small Python program as its server."""

    def __init__(self, folder: Path, program: str, **spec: object) -> None:
        self.launch = uuid.uuid4().hex
        self.log = folder / "server.log"
        self.lock = folder / "m.keeper"
        self.tmp = folder / "tmp"
        self.tmp.mkdir(exist_ok=True)
        env = {**os.environ, "VLLM_SLEEP_TUI_LAUNCH": self.launch}
        self.spec = KeeperSpec(
            argv=(sys.executable, "-c", program),
            env=env,
            cwd=str(folder),
            launch=self.launch,
            log=str(self.log),
            lock=str(self.lock),
            tmp_dir=str(self.tmp),
            **spec,  # type: ignore[arg-type]
        )

    async def start(self) -> KeeperStatus:
        status = await launch(self.spec)
        await until(lambda: self.log.exists() and b"up" in self.log.read_bytes())
        return status

    @property
    def status(self) -> KeeperStatus:
        return read_status(self.lock)

    async def ended(self) -> KeeperStatus:
        await until(lambda: not is_kept(self.lock))
        return self.status


async def until(condition: Callable[[], object], limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def test_it_keeps_a_server_and_tells_its_exit_code(tmp_path: Path) -> None:
    kept = Kept(tmp_path, READY + "time.sleep(0.2); sys.exit(7)")
    status = await kept.start()
    assert status.server is not None
    assert kept.status.launch == kept.launch
    ended = await kept.ended()
    assert ended.exit is not None
    assert (ended.exit.code, ended.exit.asked) == (7, False)
    assert not kept.tmp.exists()


async def test_it_ends_the_whole_group_when_the_server_dies_even_what_left_the_session(
    tmp_path: Path,
) -> None:
    program = READY + (
        "a = subprocess.Popen(['sleep', '300'])\n"
        "b = subprocess.Popen(['sleep', '301'], start_new_session=True)\n"
        "print(a.pid, b.pid, flush=True)\n"
    )
    kept = Kept(tmp_path, program + SLEEP)
    status = await kept.start()
    await until(lambda: len(kept.log.read_text().split()) == 3)
    children = [ProcessId(pid, start_ticks(pid) or 0) for pid in map(int, kept.log.read_text().split()[1:])]
    assert all(is_alive(child) for child in children)
    assert status.server is not None
    os.kill(status.server.pid, signal.SIGKILL)
    ended = await kept.ended()
    assert ended.exit is not None
    assert ended.exit.code == -signal.SIGKILL
    assert not any(is_alive(child) for child in children)


async def test_asked_to_stop_it_asks_the_server_kindly(tmp_path: Path) -> None:
    kind = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(0))\n"
    kept = Kept(tmp_path, kind + READY + SLEEP)
    status = await kept.start()
    assert ask_to_stop(status, at_once=False)
    ended = await kept.ended()
    assert ended.exit is not None
    assert (ended.exit.code, ended.exit.asked) == (0, True)


async def test_a_server_that_swallows_the_first_sigterm_gets_a_second(tmp_path: Path) -> None:
    swallow = "def again(*_): signal.signal(15, signal.SIG_DFL)\nsignal.signal(15, again)\n"
    kept = Kept(tmp_path, swallow.join(["import signal\n", READY]) + "while True: time.sleep(1)", grace=30.0)
    ask_to_stop(await kept.start(), at_once=False)
    ended = await kept.ended()
    assert ended.exit is not None
    assert ended.exit.code == -signal.SIGTERM


async def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + READY + SLEEP, grace=0.5)
    ask_to_stop(await kept.start(), at_once=False)
    ended = await kept.ended()
    assert ended.exit is not None
    assert ended.exit.code == -signal.SIGKILL


async def test_the_server_dies_with_its_keeper_and_what_survives_is_found_by_its_launch(
    tmp_path: Path,
) -> None:
    kept = Kept(tmp_path, READY + "subprocess.Popen(['sleep', '300'])\nprint('child', flush=True)\n" + SLEEP)
    status = await kept.start()
    await until(lambda: "child" in kept.log.read_text())
    assert status.keeper is not None
    assert status.server is not None
    os.kill(status.keeper.pid, signal.SIGKILL)
    await until(lambda: not is_alive(status.server))  # type: ignore[arg-type]
    assert not is_kept(kept.lock)
    assert len(members(kept.launch, status.server)) == 1
    assert await end_members(kept.launch, status.server)
    assert members(kept.launch, status.server) == ()


async def test_a_second_keeper_for_the_same_model_is_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path, READY + SLEEP)
    status = await kept.start()
    with pytest.raises(OperationError, match="keeper"):
        await launch(kept.spec)
    assert read_status(kept.lock).server == status.server
    ask_to_stop(status, at_once=True)
    await kept.ended()


async def test_a_command_that_cannot_run_is_told_with_the_reason(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "")
    spec = KeeperSpec(**{**_fields(kept.spec), "argv": (str(tmp_path / "no-such-vllm"),)})
    with pytest.raises(OperationError, match="No such file"):
        await launch(spec)
    assert not is_kept(kept.lock)


def _fields(spec: KeeperSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in KeeperSpec.__slots__}


async def test_a_flood_cannot_grow_the_log_beyond_its_cap(tmp_path: Path) -> None:
    kept = Kept(tmp_path, READY + "for _ in range(400): print('x' * 4000)", log_bytes=100_000)
    await launch(kept.spec)
    await kept.ended()
    files = sorted(tmp_path.glob("server.log*"))
    assert [file.name for file in files] == ["server.log", "server.log.1", "server.log.2"]
    assert all(file.stat().st_size <= 100_000 for file in files)
    assert kept.log.stat().st_mode & 0o777 == 0o600


async def test_signals_that_the_launcher_ignores_reach_the_server(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        kept = Kept(tmp_path, READY + SLEEP, grace=30.0)
        status = await kept.start()
    finally:
        signal.signal(signal.SIGTERM, previous)
    ask_to_stop(status, at_once=False)
    ended = await kept.ended()
    assert ended.exit is not None
    assert ended.exit.code == -signal.SIGTERM


# ── the launcher, at the worst moment ────────────────────────────────────────────────────────────────────


def begin(kept: Kept, report: int) -> None:
    """Start the keeper as the product does, with `report` as where it answers."""
    command = [sys.executable, "-I", "-S", keeper.__file__]
    env = {"PATH": os.defpath, "VLLM_SLEEP_TUI_LAUNCH": kept.launch, MARKER: os.environ[MARKER]}
    spec = json.dumps(asdict(kept.spec)).encode()
    subprocess.run(command, input=spec, stdout=report, env=env, start_new_session=True, check=True)


async def test_a_launcher_that_died_before_the_answer_does_not_take_the_server_along(tmp_path: Path) -> None:
    kept = Kept(tmp_path, READY + SLEEP)
    reader, writer = os.pipe()
    os.close(reader)
    begin(kept, writer)
    os.close(writer)
    await until(lambda: kept.log.exists() and b"up" in kept.log.read_bytes())
    assert is_kept(kept.lock)
    assert ask_to_stop(kept.status, at_once=False)
    ended = await kept.ended()
    assert ended.exit is not None
    assert ended.exit.asked


async def test_asked_to_stop_before_it_has_answered_its_launcher_it_stops_the_server(tmp_path: Path) -> None:
    kept = Kept(tmp_path, READY + SLEEP)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b" " * 4096)
    os.set_blocking(writer, True)  # full: the keeper's answer waits
    begin(kept, writer)
    os.close(writer)
    await until(lambda: kept.status.server is not None)
    assert ask_to_stop(kept.status, at_once=False)
    with open(reader, "rb") as answers:
        await asyncio.to_thread(answers.read)
    ended = await kept.ended()
    assert ended.exit is not None
    assert ended.exit.asked
