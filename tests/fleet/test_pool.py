"""The KV pool as the panel uses it: simulated engines, real holder processes, memory as descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.beside import core_of, record_of
from tests.fleet.conftest import GIB, Box, inject, seen, until
from tests.fleet.test_fast_sleep import fast, verb
from tests.orphans import ending
from vllm_sleep_tui.fleet import pool_holder
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.pool import Pool, why_no_pool
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import hold, holder
from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, signal_process

MakeBox = Callable[..., Box]
PAIR = {"a": fast("sim/1GiB"), "b": fast("sim/4GiB")}


def pool_of(fleet: Fleet, gpu: int = 0) -> Pool:
    return core_of(fleet).pools([gpu])[gpu]


def holder_of(fleet: Fleet, gpu: int = 0) -> ProcessId:
    holder = pool_of(fleet, gpu).holder()
    assert holder is not None
    return holder


def lent(fleet: Fleet) -> int:
    """Bytes that the driver lists for nobody and that an engine has mapped."""
    return sum(pool_of(fleet).lent().values())


def give(fleet: Fleet, gibs: int) -> None:
    """Put memory into the pool, as an engine does."""
    folder = core_of(fleet).simulated
    assert folder is not None
    made = [devices.create_chunk(folder, 0, GIB) for _ in range(gibs)]
    devices.disown_chunks(folder, [chunk for _, chunk in made])
    path = f"{os.environ['VLLM_SLEEP_TUI_POOL']}/{pool_of(fleet).uuid}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        request = json.dumps({"op": "give", "sizes": [GIB] * gibs}).encode()
        socket.send_fds(connection, [request], [descriptor for descriptor, _ in made])
        assert json.loads(connection.recv(4096)) == {"kept": gibs}
    for descriptor, _ in made:
        os.close(descriptor)


async def well(fleet: Fleet, awake: str, asleep: str) -> None:
    """What must hold after a switch, whatever happened to the pool."""
    now = await fleet.measured()
    up, down = now.model(awake), now.model(asleep)
    assert (up.state, up.proof, down.state) == (State.AWAKE, "proven", State.ASLEEP)
    assert (up.vram_bytes or 0) > 18 * GIB
    assert (down.vram_bytes or 0) < 2 * GIB
    assert now.gpus[0].used_bytes == (up.vram_bytes or 0) + (down.vram_bytes or 0)
    assert not now.gpus[0].pool_bytes


async def test_the_cache_of_a_sleeper_goes_to_whoever_wakes_and_the_rows_stay_true(box: MakeBox) -> None:
    machine = box(PAIR)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        for awake, asleep in (("b", "a"), ("a", "b"), ("b", "a")):
            await fleet.switch(awake)
            await well(fleet, awake, asleep)
        assert lent(fleet) > 10 * GIB
        footprint = core_of(fleet).model("b").footprint
        assert footprint.awake["0"] > 18 * GIB
        assert footprint.asleep["0"] < 2 * GIB
        assert json.loads(verb(machine, "status", "--json").stdout)["gpus"][0]["pool_bytes"] == 0
        checks = json.loads(verb(machine, "doctor", "--json").stdout)["checks"]
        held = [check["what"] for check in checks if check["name"] == "kv pool"]
        assert f"pid {holder_of(fleet).pid} keeps" in held[0]
        assert held[0].endswith("2 engines")


async def test_after_a_plain_sleep_the_memory_is_everybodys(box: MakeBox) -> None:
    async with box(PAIR).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        await fleet.sleep("b")
        now = await fleet.measured()
        assert (now.gpus[0].used_bytes or 0) < 3 * GIB
        assert now.gpus[0].pool_bytes == 0
        await fleet.wake("b")
        await well(fleet, "b", "a")


async def said_while(machine: Box, give_again: Callable[[], None], pool: Pool) -> str:
    """What `status` says, with memory in the pool again each time that nobody came for it within 10 s.

    On a busy machine the verb takes that long.
    """
    asking = asyncio.create_task(asyncio.to_thread(verb, machine, "status"))
    while not asking.done():
        if (state := pool.state()) is not None and not state.free_bytes:
            give_again()
        await asyncio.sleep(0.05)
    return (await asking).stdout


async def test_what_lies_in_the_pool_is_shown_counts_as_free_and_makes_room_for_a_start(box: MakeBox) -> None:
    machine = box(PAIR)
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        # With the lock, as in a switch: else the watcher gives up what it finds in the pool.
        async with hold(core_of(fleet).gpu_locks({0}), holder("looking", "a")):
            give(fleet, 21)
            now = await fleet.measured()
            assert (now.gpus[0].pool_bytes, now.gpus[0].others) == (21 * GIB, ())
            assert "21.0 GiB  KV pool" in await said_while(machine, lambda: give(fleet, 21), pool_of(fleet))
        assert fleet.predict("b").action == "start"
        await fleet.start(["b"])
        assert seen(fleet, "b").state is State.AWAKE


async def test_what_lies_in_the_pool_makes_room_for_weights(box: MakeBox) -> None:
    async with box({"a": fast("sim/12GiB")}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        give(fleet, 21)
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")
        assert lent(fleet) > 0


async def test_a_holder_that_dies_costs_speed_and_nothing_else(box: MakeBox) -> None:
    machine = box(PAIR)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        first = holder_of(fleet)
        signal_process(first, signal.SIGKILL)
        await until(lambda: not is_alive(first))
        await well(fleet, "b", "a")
        await until(lambda: pool_of(fleet).state() is not None)
        assert holder_of(fleet) != first
        await well(fleet, "b", "a")
        await fleet.switch("a")
        await fleet.switch("b")
        await well(fleet, "b", "a")
        assert lent(fleet) > 10 * GIB


@pytest.mark.parametrize("phase", ["drain", "sleep", "settle", "wake", "prove"])
async def test_a_holder_that_dies_in_the_middle_of_a_switch(box: MakeBox, phase: str) -> None:
    async with box(PAIR).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")

        def kill(progress: Progress) -> None:
            holder = pool_of(fleet).holder()
            if progress.phase == phase and holder is not None:
                signal_process(holder, signal.SIGKILL)

        await fleet.switch("a", report=kill)
        await well(fleet, "a", "b")
        await fleet.switch("b")
        await well(fleet, "b", "a")


async def test_a_holder_that_is_stopped_holds_nobody_up(box: MakeBox) -> None:
    async with box(PAIR).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        holder = holder_of(fleet)
        signal_process(holder, signal.SIGSTOP)
        try:
            await fleet.switch("a")
            now = await fleet.measured()
            assert (now.model("a").state, now.model("a").proof) == (State.AWAKE, "proven")
        finally:
            signal_process(holder, signal.SIGCONT)
        await fleet.switch("b")
        await well(fleet, "b", "a")


async def test_memory_that_cannot_be_mapped_is_made_anew(box: MakeBox) -> None:
    async with box(PAIR).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        await inject(fleet, "a", "stale_chunk:1")
        await fleet.switch("a")
        await well(fleet, "a", "b")


async def test_a_switch_that_is_killed_between_sleep_and_wake_leaves_no_memory_in_the_pool(
    box: MakeBox,
) -> None:
    machine = box(PAIR, speed="2")
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        switching = asyncio.ensure_future(fleet.switch("a"))
        await until(lambda: (state := pool_of(fleet).state()) is not None and state.free_bytes > 0)
        switching.cancel()
        await asyncio.gather(switching, return_exceptions=True)
        await until(lambda: (state := pool_of(fleet).state()) is not None and state.free_bytes == 0)
        await fleet.switch("a")
        await well(fleet, "a", "b")


async def test_an_engine_that_dies_takes_what_it_was_lent_along(box: MakeBox) -> None:
    async with box(PAIR).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        os.kill(record_of(fleet, "b").engines[0].pid, signal.SIGKILL)
        await until(lambda: seen(fleet, "b").state is State.FAILED)
        await until(lambda: lent(fleet) == 0)
        now = await fleet.measured()
        assert (now.gpus[0].used_bytes or 0) < 2 * GIB
        await fleet.switch("a")
        assert seen(fleet, "a").proof == "proven"


async def test_with_two_gpus_each_has_its_pool(box: MakeBox) -> None:
    wide = {"args": {"tensor-parallel-size": 2}, "gpus": [0, 1]}
    models = {"a": fast("sim/2GiB", **wide), "b": fast("sim/4GiB", **wide)}
    async with box(models, gpus=["24GiB", "24GiB"]).open() as fleet:
        await fleet.start(["a", "b"])
        assert holder_of(fleet, 0) != holder_of(fleet, 1)
        for name in ("b", "a", "b"):
            await fleet.switch(name)
        now = await fleet.measured()
        assert now.model("b").proof == "proven"
        held = now.model("b").vram_by_gpu or {}
        assert all(held[gpu] > 18 * GIB for gpu in ("0", "1"))


async def test_the_last_server_of_a_gpu_ends_the_holder_and_the_first_to_stop_does_not(box: MakeBox) -> None:
    async with box(PAIR).open() as fleet:
        await fleet.start(["a", "b"])
        holder = holder_of(fleet)
        await fleet.stop(["a"])
        assert is_alive(holder)
        await fleet.stop(["b"])
        # By the stop; by the holder itself where its own look at the users was just in the way.
        await until(lambda: not is_alive(holder))


async def test_a_server_of_another_config_keeps_the_holder(box: MakeBox) -> None:
    machine = box(PAIR)
    async with machine.open() as fleet:
        await fleet.start(["a"])
        holder = holder_of(fleet)
        descriptor = pool_of(fleet).join()  # as the keeper of a server of another config has it
        await fleet.stop(["a"])
        assert is_alive(holder)
        os.close(descriptor)
        await until(lambda: not is_alive(holder))


async def test_a_holder_that_nobody_uses_any_more_is_an_orphan_and_ended_on_request(box: MakeBox) -> None:
    machine = box(PAIR)
    async with machine.open() as fleet:
        await fleet.start(["a"])
        holder, record = holder_of(fleet), record_of(fleet, "a")
        assert record.keeper is not None
        with ending():
            signal_process(holder, signal.SIGSTOP)
            signal_process(record.keeper, signal.SIGKILL)
            await until(lambda: not pool_of(fleet).is_used())
            found = json.loads(verb(machine, "orphans", "--json").stdout)["orphans"]
            assert holder.pid in [orphan["pid"] for orphan in found]
            assert verb(machine, "orphans", "--end", "--yes").returncode == 0
            assert not is_alive(holder)


async def test_without_a_folder_of_its_own_a_model_switches_without_a_pool(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("not a folder")
    monkeypatch.setenv("VLLM_SLEEP_TUI_POOL", str(taken))
    machine = box(PAIR)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        assert pool_of(fleet).state() is None
        now = await fleet.measured()
        assert (now.model("b").proof, now.gpus[0].pool_bytes) == ("proven", None)
        checks = json.loads(verb(machine, "doctor", "--json").stdout)["checks"]
        check = next(check for check in checks if check["name"] == "kv pool")
        assert (check["verdict"], "is not a folder" in check["what"]) == ("warn", True)


def test_a_folder_whose_name_is_too_long_for_a_socket_is_named_and_no_holder_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / ("x" * 80)
    monkeypatch.setenv("VLLM_SLEEP_TUI_POOL", str(place))
    assert "too long" in (why_no_pool() or "")
    pool = Pool("GPU-01234567-89ab-cdef-0123-456789abcdef")
    descriptor = pool.join()
    pool.start_holder()
    assert [path.suffix for path in place.iterdir()] == [".users"]
    os.close(descriptor)


async def test_whoever_comes_next_finds_the_holder(box: MakeBox) -> None:
    machine = box(PAIR)
    assert verb(machine, "start", "--all").returncode == 0
    async with machine.open() as fleet:
        holder = holder_of(fleet)
        await fleet.switch("b")
        await well(fleet, "b", "a")
        assert holder_of(fleet) == holder
    assert verb(machine, "stop", "--all").returncode == 0
    await until(lambda: not is_alive(holder))


@pytest.mark.skipif(os.getuid() != 0, reason="acts as another user, which only root can")
async def test_another_user_gets_no_word_out_of_a_holder(box: MakeBox) -> None:
    ask = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        's.connect(sys.argv[1]); s.send(b\'{"op": "end"}\'); print(len(s.recv(4096)))'
    )
    async with box(PAIR).open() as fleet:
        await fleet.start(["a"])
        folder = Path(os.environ["VLLM_SLEEP_TUI_POOL"])
        assert folder.stat().st_mode & 0o777 == 0o700
        there = folder / f"{pool_of(fleet).uuid}.sock"
        for path, mode in ((folder.parent, 0o711), (folder, 0o711), (there, 0o666)):
            path.chmod(mode)  # as if all that keeps others out were gone
        done = subprocess.run(
            [sys.executable, "-c", ask, str(there)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert "0" in done.stdout or "Error" in done.stderr, done
        assert is_alive(holder_of(fleet))


@pytest.mark.skipif(os.getuid() != 0, reason="leaves files of another user, which only root can")
@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_another_user_left_in_the_place_of_a_pool_ends_no_process_and_lends_nothing(
    tmp_path: Path, whose: str
) -> None:
    place = tmp_path / "pool"
    place.mkdir(mode=0o755)
    with subprocess.Popen(["sleep", "100"]) as innocent:
        try:
            named = pool_holder.identity(innocent.pid)
            (place / "GPU-1.holder").write_text(json.dumps({"holder": named}))
            (place / f"GPU-1.lent-{innocent.pid}").write_text(json.dumps({**named, "bytes": 40 * GIB}))
            pool = Pool("GPU-1", place)
            assert pool.holder() is not None  # were it ours
            for path in place.iterdir() if whose == "file" else [place]:
                os.chown(path, 65534, 65534)
            pool.give_up()
            pool.end_unless_used()
            assert innocent.poll() is None
            assert (pool.holder(), pool.lent(), pool.is_used()) == (None, {}, False)
        finally:
            innocent.kill()
