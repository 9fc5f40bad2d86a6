"""Locks between processes."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.fleet.conftest import until
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.store.locks import (
    Holder,
    LockBusyError,
    describe,
    hold,
    holder,
    open_shared,
    read_holder,
)
from vllm_sleep_tui.fleet.supervision.leader import LeaderLock


async def test_only_one_holds_it_and_the_holder_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    assert read_holder(path) is None
    async with hold([path], holder("switch", "qwen", 20.0)):
        who = read_holder(path)
        assert who is not None
        assert (who.operation, who.model, who.pid) == ("switch", "qwen", os.getpid())
        with pytest.raises(LockBusyError) as caught:
            async with hold([path], holder("sleep", "phi"), limit=0.01):
                pass
        assert caught.value.holder == who
        with pytest.raises(LockBusyError):  # at once, by whom it does not say
            async with hold([path], holder("sleep", "phi"), limit=0.0):
                pass
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
    assert describe(told[0]) == "the switch of qwen", "one's own is nobody's"
    assert describe(msgspec.structs.replace(told[0], user="ada", pid=1)) == "ada's switch of qwen"


async def test_the_kernel_frees_it_when_the_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    program = (
        "import asyncio, sys, pathlib\n"
        "from vllm_sleep_tui.fleet.store.locks import hold, holder\n"
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
    first, second = LeaderLock(path), LeaderLock(path)
    assert first.take()
    path.unlink()
    assert second.take()
    assert not first.take()
    second.leave()
    assert first.take()
    first.leave()


# ── a lock's file appears ────────────────────────────────────────────────────────────────────────────────


def test_a_lock_file_never_has_its_name_before_every_user_may_open_it(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    program = (
        "import os, pathlib, sys\n"
        "from vllm_sleep_tui.fleet.store.locks import open_shared\n"
        "path = sys.argv[1]\n"
        "def look(event, *_):\n"
        "    if event == 'os.chmod' and os.path.exists(path):\n"
        "        print('others can see it as the umask left it')\n"
        "sys.addaudithook(look)\n"
        "os.umask(0o077)\n"
        "os.close(open_shared(pathlib.Path(path)))\n"
        "os.close(open_shared(pathlib.Path(path)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert path.stat().st_mode & 0o777 == 0o666
    assert os.listdir(tmp_path) == ["gpu.lock"]


def test_many_who_make_a_lock_file_at_once_open_the_same_one(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in range(50):
            opened = list(pool.map(open_shared, [path] * 8))
            assert len({os.fstat(descriptor).st_ino for descriptor in opened}) == 1
            assert os.listdir(tmp_path) == ["gpu.lock"]
            for descriptor in opened:
                os.close(descriptor)
            path.unlink()


def test_a_full_disk_does_not_keep_the_leaders_seat_empty(tmp_path: Path) -> None:
    seat = LeaderLock(tmp_path / "leader.lock")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write to a file fails
    try:
        assert seat.take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not LeaderLock(tmp_path / "leader.lock").take()
    seat.leave()


@pytest.mark.parametrize("there", [False, True], ids=["new", "there already"])
async def test_a_lock_without_room_for_who_holds_it_is_refused_with_a_cure(
    tmp_path: Path, there: bool
) -> None:
    path = tmp_path / "gpu.lock"
    if there:
        path.touch(0o666)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write to a file fails
    try:
        with pytest.raises(OperationError, match="no space left for who holds it") as caught:
            async with hold([path], holder("start", "a")):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"Make room in {tmp_path}" in caught.value.cure
    async with hold([path], holder("start", "a")):  # nobody was left holding it
        pass
