"""Locks between processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fleet.conftest import until
from vllm_sleep_tui.fleet.leader import Seat
from vllm_sleep_tui.fleet.locks import Holder, LockBusyError, hold, holder, open_shared, read_holder


async def test_only_one_holds_it_and_the_holder_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    assert read_holder(path) is None
    async with hold([path], holder("switch", "qwen", 20.0)):
        who = read_holder(path)
        assert who is not None
        assert (who.operation, who.model, who.pid) == ("switch", "qwen", os.getpid())
        with pytest.raises(LockBusyError) as caught:
            async with hold([path], holder("sleep", "phi"), limit=0.0):
                pass
        assert caught.value.holder == who
    assert read_holder(path) is None


async def test_who_waits_is_told_for_whom_and_gets_it_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    told: list[Holder | None] = []
    order: list[str] = []

    async def second() -> None:
        async with hold([path], holder("sleep", "phi"), waiting=told.append):
            order.append("second")

    async with hold([path], holder("switch", "qwen")):
        waiter = asyncio.create_task(second())
        while not told:
            await asyncio.sleep(0.005)
        order.append("first")
    await waiter
    assert order == ["first", "second"]
    assert told[0] is not None
    assert told[0].model == "qwen"


async def test_the_kernel_frees_it_when_the_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    program = (
        "import asyncio, sys, pathlib\n"
        "from vllm_sleep_tui.fleet.locks import hold, holder\n"
        "async def main():\n"
        "    async with hold([pathlib.Path(sys.argv[1])], holder('start', 'qwen')):\n"
        "        print('held', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        who = read_holder(path)
        assert who is not None
        assert who.pid == other.pid
        other.kill()
        other.wait()
    async with hold([path], holder("start", "qwen"), limit=0.0):
        pass


async def test_a_lock_file_can_be_used_by_every_user_and_is_never_a_link(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    os.close(open_shared(path))
    assert path.stat().st_mode & 0o777 == 0o666
    link = tmp_path / "link.lock"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Too many levels"):
        open_shared(link)


# ── a lock's file is removed while it is held ────────────────────────────────────────────────────────────


async def is_free(path: Path) -> bool:
    """Whether somebody who comes now gets the lock."""
    try:
        async with hold([path], holder("sleep", "phi"), limit=0.0):
            return True
    except LockBusyError:
        return False


async def test_a_removed_lock_is_locked_again_by_its_holder_for_every_user(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    async with hold([path], holder("switch", "qwen")):
        path.unlink()
        await until(path.exists)
        assert not await is_free(path)
        assert path.stat().st_mode & 0o777 == 0o666
        who = read_holder(path)
        assert who is not None
        assert who.model == "qwen"
        path.unlink()
        await until(path.exists)
        assert not await is_free(path)
    assert await is_free(path)


async def test_who_waited_for_a_removed_lock_waits_for_who_has_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    told: list[Holder | None] = []
    inside: list[str] = []

    async def third() -> None:
        async with hold([path], holder("sleep", "phi"), waiting=told.append):
            inside.append("third")

    async with hold([path], holder("switch", "qwen")):
        waiter = asyncio.create_task(third())
        await until(lambda: told)
        path.unlink()
        second = hold([path], holder("wake", "coder"))
        await second.__aenter__()
    await until(lambda: len(told) == 2)
    assert told[1] is not None
    assert (told[1].model, inside) == ("coder", [])
    await second.__aexit__(None, None, None)
    await waiter
    assert inside == ["third"]


async def test_a_lock_that_is_held_does_not_look_old(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    async with hold([path], holder("start", "qwen")):
        os.utime(path, (0, 0))
        await until(lambda: path.stat().st_mtime > time.time() - 60)


def test_a_leader_whose_seat_was_removed_gives_way_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "leader.lock"
    first, second = Seat(path), Seat(path)
    assert first.take()
    path.unlink()
    assert second.take()
    assert not first.take()
    second.leave()
    assert first.take()
    first.leave()
