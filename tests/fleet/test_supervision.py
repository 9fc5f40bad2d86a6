"""What the leader does unasked: restarts, idleness, hangs; and records that were lost or lie."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from tests.fleet.beside import client_of, core_of, model_of, record_of, record_path
from tests.fleet.conftest import LIMIT, Box, inject, seen, until, until_state
from vllm_sleep_tui.config.types import IdleConfig
from vllm_sleep_tui.engine.client import Gate
from vllm_sleep_tui.errors import OperationError, RefusedError
from vllm_sleep_tui.fleet.attached.backend import prober
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.fleet.supervision.hang import HangWatch
from vllm_sleep_tui.fleet.supervision.idle import Idleness, due
from vllm_sleep_tui.fleet.supervision.leader import LeaderLock
from vllm_sleep_tui.fleet.supervision.supervisor import Leader, Limits
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive

pytestmark = pytest.mark.usefixtures("own_orphans")
MakeBox = Callable[..., Box]
QUICK = Limits(hang=1.0, hang_poll=0.1, hang_probe=0.5, orphans_poll=0.5, restart_pauses=(0.1, 0.1))
CALM = msgspec.structs.replace(QUICK, hang=60.0, hang_probe=10.0)
"""Where no hang is waited for: on a busy machine a server that is well may be silent for a second."""


@asynccontextmanager
async def led(machine: Box, limits: Limits = CALM) -> AsyncIterator[Fleet]:
    """A fleet beside a leader of little patience, which has a core of its own, as another process has."""
    async with machine.open() as fleet:
        core = core_of(fleet)
        leader, probing = Leader(core, limits), prober(core)
        leader.start()
        probing.start()
        try:
            yield fleet
        finally:
            await leader.close()
            await probing.close()


def kill_server(fleet: Fleet, name: str) -> int:
    pid = record_of(fleet, name).server
    assert pid is not None
    os.kill(pid.pid, signal.SIGKILL)
    return pid.pid


async def until_in_flight(fleet: Fleet, name: str) -> None:
    """Wait until its server has a request under way."""
    async with asyncio.timeout(LIMIT):
        while not (await client_of(fleet, name).gate()).in_flight:
            await asyncio.sleep(0.01)


async def until_restarted(fleet: Fleet, name: str, old: int) -> None:
    def is_back() -> bool:
        model = seen(fleet, name)  # one look: two may fall on both sides of the death
        return model.state in (State.AWAKE, State.ASLEEP) and model.pid != old

    await until(is_back)


# ── leader ───────────────────────────────────────────────────────────────────────────────────────────────


def test_one_seat_has_one_holder_and_is_free_when_it_leaves(tmp_path: Path) -> None:
    first, second = LeaderLock(tmp_path / "leader.lock"), LeaderLock(tmp_path / "leader.lock")
    assert first.take()
    assert first.take()
    assert not second.take()
    who = second.who()
    assert who is not None
    assert who.pid == os.getpid()
    first.leave()
    assert second.take()
    second.leave()
    assert not LeaderLock(tmp_path / "none" / "leader.lock").take()


# ── restarts ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_died_is_started_again_until_it_is_a_crash_loop(box: MakeBox) -> None:
    async with led(box({"a": {"model": "sim/1GiB"}})) as fleet:
        await fleet.start(["a"])
        for _ in range(2):
            await until_restarted(fleet, "a", kill_server(fleet, "a"))
        kill_server(fleet, "a")
        await until(lambda: "Restarted 2 times" in (record_of(fleet, "a").reason or ""))
        assert seen(fleet, "a").state is State.FAILED


async def test_a_sleeper_that_died_comes_back_asleep_and_nobody_makes_room_for_it(box: MakeBox) -> None:
    async with led(box()) as fleet:
        await fleet.start(["a", "b"])
        old = kill_server(fleet, "b")  # asleep, while a is awake and fills the GPU
        await until(lambda: record_of(fleet, "b").state is State.FAILED)
        await asyncio.sleep(1.5)  # nothing is to happen: there is no condition to wait for
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.FAILED)
        await fleet.stop(["a"])
        await until_restarted(fleet, "b", old)
        await until_state(fleet, "b", State.ASLEEP)


async def test_a_model_that_is_never_to_be_restarted_stays_failed(box: MakeBox) -> None:
    async with led(
        box({"a": {"model": "sim/1GiB", "restart": "never"}, "b": {"model": "sim/1GiB"}})
    ) as fleet:
        await fleet.start(["a"])
        kill_server(fleet, "a")
        await until(lambda: record_of(fleet, "a").state is State.FAILED)
        await asyncio.sleep(1.5)  # nothing is to happen
        assert seen(fleet, "a").state is State.FAILED


async def test_a_start_that_fails_is_not_tried_again(box: MakeBox) -> None:
    async with led(box({"a": {"model": "sim/1GiB", "env": {"VLLM_SIM_FAULTS": "gated"}}})) as fleet:
        with pytest.raises(OperationError):
            await fleet.start(["a"])
        launch = record_of(fleet, "a").launch
        await asyncio.sleep(1.5)  # nothing is to happen
        assert record_of(fleet, "a").launch == launch


# ── idleness ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_idle_model_sleeps_and_later_stops(box: MakeBox) -> None:
    idle = {"sleep_after": "1s", "stop_after": "6s"}  # the sleep, too, takes its time on a busy machine
    async with led(box({"a": {"model": "sim/1GiB", "idle": idle}})) as fleet:
        await fleet.start(["a"])
        awake = record_of(fleet, "a").since
        asleep = (await until_state(fleet, "a", State.ASLEEP)).since
        stopped = (await until_state(fleet, "a", State.STOPPED)).since
        assert awake + 0.9 <= asleep <= stopped - 1.0
        assert stopped >= awake + 5.9


async def test_a_model_that_is_answering_is_not_idle(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB", "idle": {"sleep_after": "1s"}}})
    async with machine.open() as asking:
        await asking.start(["a"])
        await inject(asking, "a", "hang")
        answer = asking.chat("a", [{"role": "user", "content": "hello"}])
        reading = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
        await until_in_flight(asking, "a")
        async with led(machine, Limits(hang=60)) as fleet:  # it leads only now: the second is not over before
            await asyncio.sleep(2.5)  # nothing is to happen
            assert seen(fleet, "a").state is State.AWAKE
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await answer.aclose()  # type: ignore[attr-defined]
            await until_state(fleet, "a", State.ASLEEP)


def test_idleness_counts_from_the_last_answer_whatever_the_clock_does() -> None:
    idleness = Idleness()
    awake = Record(config="c", name="a", launch="l", state=State.AWAKE, since=1000.0)

    def idle(gate: Gate, wall: float, clock: float, record: Record = awake) -> float:
        return idleness.seconds(record, gate, wall=wall, clock=clock)

    quiet = Gate(closed=False, in_flight=0, last_request=None)
    assert idle(quiet, 1010.0, 50.0) == 10.0
    assert idle(quiet, 99_999.0, 51.0) == 11.0  # the clock was set forward
    assert idle(quiet, 0.0, 52.0) == 12.0  # and back
    assert idle(Gate(closed=False, in_flight=1, last_request=1013.0), 1013.0, 53.0) == 0.0
    answered = Gate(closed=False, in_flight=0, last_request=1015.0)
    assert idle(answered, 1015.5, 55.5) == 0.5
    assert idle(answered, 1025.0, 65.0) == 10.0
    asleep = msgspec.structs.replace(awake, state=State.ASLEEP, since=1030.0)
    assert idle(answered, 1031.0, 71.0, asleep) == 16.0  # falling asleep is no use
    woken = msgspec.structs.replace(awake, since=1035.0)
    assert idle(answered, 1036.0, 76.0, woken) == 1.0
    ahead = msgspec.structs.replace(awake, launch="m", since=5000.0)
    assert idle(quiet, 1000.0, 80.0, ahead) == 0.0  # a record from the future
    assert idle(quiet, 1001.0, 90.0, ahead) == 10.0


def test_what_is_due_depends_on_the_limits_that_are_set() -> None:
    both = IdleConfig(sleep_after="10m", stop_after="2h")
    assert due(both, State.AWAKE, 599) is None
    assert due(both, State.AWAKE, 600) == "sleep"
    assert due(both, State.ASLEEP, 600) is None
    assert due(both, State.ASLEEP, 7200) == "stop"
    assert due(IdleConfig(), State.AWAKE, 1e9) is None


# ── hangs ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_gives_no_token_is_ended_with_the_reason(box: MakeBox) -> None:
    async with led(box({"a": {"model": "sim/1GiB", "restart": "never"}}), QUICK) as fleet:
        await fleet.start(["a"])
        keeper = record_of(fleet, "a").keeper
        await inject(fleet, "a", "hang")
        answer = fleet.chat("a", [{"role": "user", "content": "hello"}])
        reading = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
        await until(lambda: record_of(fleet, "a").state is State.FAILED)
        reason = seen(fleet, "a").reason or ""
        assert "It hung: 1 requests under way and no token for 1 s" in reason
        assert keeper is not None
        await until(lambda: not is_alive(keeper))
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_client_that_sends_its_request_slowly_is_no_hang(box: MakeBox) -> None:
    async with led(box({"a": {"model": "sim/1GiB"}}), QUICK) as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
        _, writer = await asyncio.open_connection("127.0.0.1", record.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{record.port}\r\nContent-Length: 99\r\n\r\n"
        writer.write(head.encode())
        client = client_of(fleet, record.name)
        await asyncio.sleep(2.5)  # nothing is to happen
        assert not (await client.gate()).in_flight  # until its body is there, it is no work of the model's
        assert seen(fleet, "a").pid == (record.server.pid if record.server else None)
        assert seen(fleet, "a").state is State.AWAKE
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_two_silences_with_a_sleep_between_are_not_one_long_one() -> None:
    awake = Record(config="c", name="a", state=State.AWAKE, since=1.0, launch="l")
    watch = HangWatch(limit=0.05, probe=0.5)
    assert not watch.is_deaf(awake)
    await asyncio.sleep(0.1)
    woken = msgspec.structs.replace(awake, since=2.0)
    assert not watch.is_deaf(woken)
    await until(lambda: watch.is_deaf(woken))


def begin(machine: Box, *words: str) -> subprocess.Popen[bytes]:
    """A verb in a process of its own, over the box's state folder."""
    home = machine.folder / "vllm-sleep-tui"
    if not home.is_symlink():
        home.symlink_to(machine.state_dir)
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), *words]
    env = os.environ | {"XDG_STATE_HOME": str(machine.folder)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("how", ["broken", "removed"])
async def test_a_server_whose_record_was_lost_is_taken_back_as_it_is(
    box: MakeBox, level: int, how: str
) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        if level:
            await fleet.sleep("a", level=level)
        before = record_of(fleet, "a")
        path = record_path(fleet, "a")
    path.write_bytes(b"\0" * 4096) if how == "broken" else path.unlink()
    async with machine.open() as fleet:
        await until(lambda: seen(fleet, "a").state in (State.AWAKE, State.ASLEEP))
        after = record_of(fleet, "a")
        assert (after.state, after.level, after.launch) == (before.state, before.level, before.launch)
        assert (after.port, after.socket, after.gpus) == (before.port, before.socket, before.gpus)
        assert (after.log, after.engines) == (before.log, before.engines)
        assert bool(list(path.parent.glob("*.broken-*"))) is (how == "broken")
        await fleet.switch("a")
        assert seen(fleet, "a").state is State.AWAKE


async def test_a_lost_server_that_cannot_be_taken_back_is_ended_and_that_is_said(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}}, speed="10")
    verb = begin(machine, "start", "a")
    async with machine.open() as fleet:
        await until(lambda: record_of(fleet, "a").server is not None)
        verb.kill()
        verb.wait()
        record_path(fleet, "a").unlink()
        await until(lambda: "could not be taken back" in (record_of(fleet, "a").reason or ""))
        assert seen(fleet, "a").state is State.FAILED
        await fleet.start(["a"])
        assert seen(fleet, "a").state is State.AWAKE


async def test_a_switch_killed_while_others_made_room_leaves_nothing_behind(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", "sleep_slow")
        verb = begin(machine, "switch", "b")
        await until_state(fleet, "a", State.FALLING_ASLEEP)
        assert record_of(fleet, "b").intent is not None
        verb.kill()
        verb.wait()
        # As far as it had come: `/sleep` was sent or it was not.
        await until(lambda: seen(fleet, "a").state in (State.ASLEEP, State.AWAKE))
        await until(lambda: record_of(fleet, "b").intent is None)


async def test_two_configs_with_a_model_of_one_name_do_not_touch_each_other(box: MakeBox) -> None:
    first, second = box({"a": {"model": "sim/1GiB"}}), box({"a": {"model": "sim/2GiB"}})
    second.state_dir = first.state_dir
    async with first.open() as one, second.open() as other:
        await one.start(["a"])
        assert seen(other, "a").state is State.STOPPED
        await other.start(["a"])
        assert seen(one, "a").pid != seen(other, "a").pid
        assert one.log("a").path != other.log("a").path
        await one.stop(["a"])
        assert (seen(one, "a").state, seen(other, "a").state) == (State.STOPPED, State.AWAKE)


async def test_a_stranger_on_the_port_with_our_models_name_is_named_and_left_alone(box: MakeBox) -> None:
    theirs, ours = box({"a": {"model": "sim/1GiB"}}), box({"a": {"model": "sim/1GiB"}})
    async with theirs.open() as fleet:
        await fleet.start(["a"])
        stranger = seen(fleet, "a")
    ours.write({"a": {"model": "sim/1GiB", "port": stranger.port}}, ["24GiB"])
    async with ours.open() as fleet:
        with pytest.raises(RefusedError) as refused:
            await fleet.start(["a"])
        assert f"Port {stranger.port} of a is taken by pid {stranger.pid}" in refused.value.what
        assert seen(fleet, "a").state is State.STOPPED
    async with theirs.open() as fleet:
        assert (seen(fleet, "a").state, seen(fleet, "a").pid) == (State.AWAKE, stranger.pid)


async def test_a_reused_pid_is_not_taken_for_the_server(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        model = model_of(fleet, "a")
        record = model.read()
        assert record.keeper is not None
        os.kill(record.keeper.pid, signal.SIGKILL)
        await until(lambda: not any(map(is_alive, record.engines)))
        mine = ProcessId(os.getpid(), 1)  # this process, as if its pid had been the server's
        model.write(keeper=mine, server=mine, engines=(mine,))
        await until(lambda: record_of(fleet, "a").state is State.FAILED)


async def test_a_record_from_the_future_is_driven_as_any_other(box: MakeBox) -> None:
    async with led(box({"a": {"model": "sim/1GiB"}})) as fleet:
        await fleet.start(["a"])
        model_of(fleet, "a").write(since=time.time() + 1e6, restarts=(time.time() + 1e6,) * 2)
        await until_restarted(fleet, "a", kill_server(fleet, "a"))


def run(machine: Box, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A verb in a shell of its own, after `before`."""
    script = f'{before} exec "$@"'
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), *words]
    env = os.environ | {"XDG_STATE_HOME": str(machine.folder / "home")}
    return subprocess.run(
        ["bash", "-c", script, "verb", *command], env=env, capture_output=True, text=True, timeout=60
    )


def test_a_full_disk_is_one_clear_error_and_nothing_is_started(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    assert run(machine, "status").returncode == 0  # makes the folders
    full = run(machine, "start", "a", before="ulimit -f 0;")
    assert full.returncode == 1
    assert "no space left" in full.stderr  # the first file that it would write is a lock
    assert "Traceback" not in full.stderr + full.stdout
    assert '"stopped"' in run(machine, "status", "--json").stdout


@pytest.mark.parametrize("verb", [["status"], ["start", "a"]])
def test_a_state_folder_that_refuses_is_one_clear_error(box: MakeBox, verb: list[str]) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    folder = machine.folder / "home/vllm-sleep-tui"
    folder.mkdir(mode=0o700, parents=True)
    (folder / "records").write_text("in the way")
    refused = run(machine, *verb)
    assert refused.returncode == 1
    assert str(folder / "records") in refused.stderr
    assert len(refused.stderr.splitlines()) == 2


async def test_a_server_whose_way_in_was_removed_is_not_taken_for_a_hung_one(
    box: MakeBox, caplog: pytest.LogCaptureFixture
) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
        assert record.socket is not None
        Path(record.socket).unlink()
    async with led(machine, QUICK) as fleet:
        await until(lambda: "was removed" in caplog.text)
        await asyncio.sleep(3 * QUICK.hang)  # a hang would have ended it by then
        assert caplog.text.count("was removed") == 1
        now = record_of(fleet, "a")
        assert (now.state, now.server) == (State.AWAKE, record.server)
        assert now.server is not None
        assert is_alive(now.server)
        with pytest.raises(OperationError, match="was removed"):
            await fleet.sleep("a")
        await fleet.stop(["a"], force=True)
        assert seen(fleet, "a").state is State.STOPPED
