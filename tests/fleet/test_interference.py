"""What others write, hold, freeze or take away meanwhile does not mislead the fleet."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fleet.beside import client_of, core_of, model_of, record_of, record_path
from tests.fleet.conftest import Box, inject, seen, until, until_state
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.client import Gate
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.errors import CancelledByUser, OperationError, RefusedError
from vllm_sleep_tui.fleet.core import Core, OperationLimits
from vllm_sleep_tui.fleet.fleet import Fleet, to_safe_point
from vllm_sleep_tui.fleet.keeper_client import KeeperSpec, is_kept, launch, members, read_status
from vllm_sleep_tui.fleet.operations.acquire import acquire
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.server import Server
from vllm_sleep_tui.fleet.operations.supervised import Supervised
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import History
from vllm_sleep_tui.fleet.store.locks import decode_holder, hold, holder, read_holder, shared_folder
from vllm_sleep_tui.fleet.store.records import Intent, Record
from vllm_sleep_tui.fleet.supervision.hang import end_hung
from vllm_sleep_tui.fleet.supervision.idle import Idleness
from vllm_sleep_tui.telemetry.processes import ProcessId

pytestmark = pytest.mark.usefixtures("own_orphans")
MakeBox = Callable[..., Box]
ONE = {"a": {"model": "sim/1GiB"}}


def server_of(fleet: Fleet, name: str) -> ProcessId:
    found = record_of(fleet, name).server
    assert found is not None
    return found


@contextmanager
def frozen(process: ProcessId) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)


async def gate_of(fleet: Fleet, name: str) -> Gate:
    return await client_of(fleet, name).gate()


async def begin_verb(machine: Box, *arguments: str) -> subprocess.Popen[bytes]:
    """A verb in a process of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), *arguments],
        env={**os.environ, "XDG_STATE_HOME": str(machine.folder / "xdg")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


# ── what others write ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("garbage", [b'{"launch":"\xff\xfe"}', b"\0" * 2048, b"[]", b'{"launch":"x'])
def test_a_keepers_file_of_garbage_is_no_status(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "a.keeper"
    path.write_bytes(garbage)
    assert read_status(path).launch is None


def test_a_lock_that_another_user_filled_with_garbage_has_an_unknown_holder() -> None:
    assert decode_holder(b'{"user":"\xff","pid":1,"operation":"x","model":"y","since":0}') is None


async def test_a_record_that_cannot_be_read_at_all_does_not_end_the_watch_over_the_others(
    box: MakeBox,
) -> None:
    async with box({**ONE, "b": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        wrong = record_path(fleet, "b")
        wrong.unlink(missing_ok=True)
        wrong.mkdir()
        await asyncio.sleep(1.2)  # the watcher looks twice a second: it has met it by now
        wrong.rmdir()
        os.kill(server_of(fleet, "a").pid, signal.SIGKILL)
        await until(lambda: record_of(fleet, "a").state is State.FAILED)


async def test_a_lost_record_beside_a_garbled_keepers_file_ends_what_runs(box: MakeBox) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])
        keeper_file, old = model_of(fleet, "a").keeper_file, record_of(fleet, "a")
        keeper_file.write_bytes(b"garbage")
        record_path(fleet, "a").write_bytes(b"garbage")
        await until(lambda: not is_kept(keeper_file))
        assert old.launch is not None
        await until(lambda: not members(old.launch or "", old.server))
        await fleet.start(["a"])
        assert seen(fleet, "a").state is State.AWAKE


# ── switch ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_taken_port_is_found_before_anybody_sleeps_for_it(box: MakeBox) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        models = {"a": {"model": "sim/1GiB"}, "b": {"model": "sim/1GiB", "port": taken.getsockname()[1]}}
        async with box(models).open() as fleet:
            await fleet.start(["a"])
            with pytest.raises(RefusedError, match="is taken"):
                await fleet.switch("b")
            assert seen(fleet, "a").state is State.AWAKE
            assert record_of(fleet, "b").intent is None


async def test_a_silent_sleeper_is_noticed_before_a_model_without_sleep_is_stopped_for_it(
    box: MakeBox,
) -> None:
    models = {"a": {"model": "sim/1GiB", "level": "none"}, "b": {"model": "sim/1GiB"}}
    async with box(models).open() as fleet:
        await fleet.start(["b"])
        await fleet.switch("a")
        with frozen(server_of(fleet, "b")):
            with pytest.raises(OperationError):
                await fleet.switch("b")
            assert seen(fleet, "a").state is State.AWAKE
            assert not (await gate_of(fleet, "a")).closed


async def test_a_switch_that_fails_after_others_slept_says_who_sleeps_now(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a", "b"])
        await inject(fleet, "b", "wake_500")
        with pytest.raises(OperationError) as caught:
            await fleet.switch("b")
        assert seen(fleet, "a").state is State.ASLEEP
        assert "a is asleep" in f"{caught.value.what} {caught.value.cure}"


async def test_a_switch_cancelled_while_the_other_sleeps_says_so(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await inject(fleet, "a", "sleep_slow")
        task = asyncio.create_task(fleet.switch("b", report=machine.report))
        await until(lambda: any(step.phase == "sleep" for step in machine.progress))
        task.cancel()
        with pytest.raises(CancelledByUser) as caught:
            await task
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.ASLEEP, State.ASLEEP)
        assert "a is asleep" in f"{caught.value.what} {caught.value.cure}"
        assert record_of(fleet, "b").intent is None


async def test_cancelling_twice_still_waits_for_the_safe_point() -> None:
    operation = Operation("switch", "a")
    safe = asyncio.Event()

    async def work() -> None:
        await safe.wait()
        operation.checkpoint()

    task = asyncio.create_task(to_safe_point(operation, work()))
    for _ in range(3):
        await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    safe.set()
    with pytest.raises(CancelledByUser):
        await task


# ── gates ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_frozen_while_it_should_drain_is_not_left_with_a_closed_gate(box: MakeBox) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])
        with frozen(server_of(fleet, "a")), pytest.raises(OperationError):
            await fleet.sleep("a")

        async def is_open() -> bool:
            return not (await gate_of(fleet, "a")).closed

        await until(lambda: record_of(fleet, "a").intent is None)
        assert seen(fleet, "a").state is State.AWAKE
        assert await is_open()
        await asyncio.sleep(1.0)  # nothing late is to close it again
        assert await is_open()


async def test_a_start_whose_starter_was_killed_while_priming_ends_awake_with_an_open_gate(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": 1, "env": {"VLLM_SIM_FAULTS": "sleep_slow:1"}}})
    machine.state_dir = machine.folder / "xdg" / "vllm-sleep-tui"
    machine.state_dir.mkdir(parents=True)
    verb = await begin_verb(machine, "start", "a")
    try:
        store = machine.state_dir

        async with machine.open() as fleet:
            assert fleet.state_dir == store
            await until(lambda: seen(fleet, "a").phase == "priming")
            await asyncio.sleep(0.3)  # the call is under way: it takes 3 s
            verb.kill()
            verb.wait()
            await until_state(fleet, "a", State.AWAKE)
            gate = await gate_of(fleet, "a")
            assert not gate.closed
            events = [event async for event in fleet.chat("a", [{"role": "user", "content": "hello"}])]
            assert events[-1].error is None
    finally:
        verb.kill()
        verb.wait()


# ── locks, clocks, disks ─────────────────────────────────────────────────────────────────────────────────


async def test_a_model_that_moved_to_another_gpu_meanwhile_is_moved_under_that_gpus_lock(
    box: MakeBox,
) -> None:
    machine = box({"a": {"model": "sim/1GiB", "gpus": [0]}}, ["24GiB", "24GiB"])
    async with machine.open() as old:
        locks = core_of(old).gpu_locks
        this = holder("test", "a")
        async with hold(locks({0}), this):
            waiting = asyncio.create_task(old.sleep("a", report=machine.report))
            await until(lambda: any(step.phase == "waiting" for step in machine.progress))
            machine.write({"a": {"model": "sim/1GiB", "gpus": [1]}}, ["24GiB", "24GiB"])
            async with machine.open() as new:
                await new.start(["a"])
            busy = hold(locks({1}), this)
            await busy.__aenter__()
        try:
            await asyncio.sleep(1.0)
            assert record_of(old, "a").state is State.AWAKE
        finally:
            await busy.__aexit__(None, None, None)
        await waiting
        assert record_of(old, "a").state is State.ASLEEP


def test_a_user_without_a_name_can_hold_locks() -> None:
    unknown = next(uid for uid in range(54321, 60000) if not is_known(uid))
    code = (
        "import os, sys; from vllm_sleep_tui.fleet.store.locks import holder;"
        "[os.environ.pop(k, 0) for k in ('LOGNAME', 'USER', 'LNAME', 'USERNAME')];"
        f"os.getuid() == 0 and os.setuid({unknown}); print(holder('x', 'y').user)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if os.getuid() == 0:
        assert str(unknown) in done.stdout


def is_known(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def test_use_after_the_clock_was_set_back_is_use() -> None:
    idleness = Idleness()
    awake = Record(config="c", name="a", launch="l", state=State.AWAKE, since=10_000.0)

    def idle(last: float | None, wall: float, clock: float) -> float:
        gate = Gate(closed=False, in_flight=0, last_request=last)
        return idleness.seconds(awake, gate, wall=wall, clock=clock)

    assert idle(None, 10_000.0, 0.0) == 0.0
    assert idle(6500.0, 6500.0, 100.0) == 0.0  # an hour back, and a request just now
    assert idle(6500.0, 6510.0, 110.0) == 10.0


async def test_a_hang_seen_before_a_later_wake_ends_nobody(box: MakeBox) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])
        before = model_of(fleet, "a")
        before.read()
        await fleet.sleep("a")
        await fleet.wake("a")
        await end_hung(before, "nothing moved", 1.0)
        assert record_of(fleet, "a").state is State.AWAKE


async def test_a_frozen_process_that_holds_the_measurements_holds_up_nobody(box: MakeBox) -> None:
    machine = box(ONE)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(120)"
    )
    rival = subprocess.Popen(
        [sys.executable, "-c", code, str(machine.state_dir / "footprints.lock")], stdout=subprocess.PIPE
    )
    try:
        assert rival.stdout is not None
        rival.stdout.readline()
        os.kill(rival.pid, signal.SIGSTOP)

        # In a thread: what is looked for would block this loop for good.
        def run() -> None:
            async def start() -> None:
                async with machine.open() as fleet:
                    await fleet.start(["a"])

            asyncio.run(start())

        await asyncio.wait_for(asyncio.to_thread(run), 100)
    finally:
        rival.kill()
        rival.wait()
        assert rival.stdout is not None
        rival.stdout.close()


async def test_a_keeper_that_cannot_write_its_status_starts_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "a.keeper"
    lock.symlink_to("/dev/full")  # a link, and each write through it: no space left on device
    mark = tmp_path / "ran"
    spec = KeeperSpec(
        argv=(sys.executable, "-c", f"open({str(mark)!r}, 'w'); import time; time.sleep(120)"),
        env=dict(os.environ),
        cwd=str(tmp_path),
        launch="full",
        log=str(tmp_path / "log"),
        lock=str(lock),
        tmp_dir=str(tmp_path / "tmp"),
    )
    status = None
    try:
        with pytest.raises(OperationError, match="symbolic links"):
            status = await launch(spec)
    finally:
        if status is not None and status.keeper is not None:
            os.kill(status.keeper.pid, signal.SIGINT)
    assert not mark.exists()


async def test_a_start_that_is_refused_leaves_no_intent(box: MakeBox) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        models = {"a": {"model": "sim/1GiB", "port": taken.getsockname()[1]}}
        async with box(models).open() as fleet:
            model, operation = model_of(fleet, "a"), Operation("switch", "a")
            process = ProcessId(pid=os.getpid(), start=0)
            intent = Intent(operation="switch", phase="making room", since=0.0, actor=process)
            async with hold([*model.core.gpu_locks({0}), model.lock], holder("test", "a")):
                model.write(intent=intent)
                with pytest.raises(RefusedError, match="is taken"):
                    await Supervised(model).bring_up(operation)
                assert record_of(fleet, "a").intent is None


async def test_an_idle_model_that_is_asked_while_it_drains_is_not_stopped(box: MakeBox) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])
        model, operation = model_of(fleet, "a"), Operation("stop", "a")

        async def in_use() -> None:
            raise RefusedError("a is in use again.")

        async with hold([*model.core.gpu_locks({0}), model.lock], holder("test", "a")):
            with pytest.raises(RefusedError):
                await Server(model, operation).stop(force=False, unless=in_use())
        assert (seen(fleet, "a").state, record_of(fleet, "a").intent) == (State.AWAKE, None)
        assert not (await gate_of(fleet, "a")).closed


async def test_a_gate_that_did_not_open_again_is_seen_to_later(box: MakeBox) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])
        model, process = model_of(fleet, "a"), server_of(fleet, "a")

        async def freeze() -> None:
            os.kill(process.pid, signal.SIGSTOP)
            raise RefusedError("a is in use again.")

        try:
            async with hold([*model.core.gpu_locks({0}), model.lock], holder("test", "a")):
                server = Server(model, Operation("sleep", "a"))
                with pytest.raises(RefusedError):
                    await server.fall_asleep(1, unless=freeze())
                assert record_of(fleet, "a").state is State.AWAKE
                assert record_of(fleet, "a").intent is not None
        finally:
            os.kill(process.pid, signal.SIGCONT)
        await until(lambda: record_of(fleet, "a").intent is None)
        assert record_of(fleet, "a").state is State.AWAKE
        assert not (await gate_of(fleet, "a")).closed


async def test_a_start_without_a_place_for_its_log_says_so_and_leaves_nothing(box: MakeBox) -> None:
    machine = box(ONE)
    (machine.state_dir / "logs").write_text("not a folder")
    async with machine.open() as fleet:
        with pytest.raises(OperationError, match="logs"):
            await fleet.start(["a"])
        record = record_of(fleet, "a")
        assert (record.state, record.intent) == (State.FAILED, None)
        assert record.tmp_dir is not None
        assert not Path(record.tmp_dir).exists()
        (machine.state_dir / "logs").unlink()


def test_a_lock_folder_that_only_root_may_write_to_is_nobodys(tmp_path: Path) -> None:
    own, everybodys = tmp_path / "own", tmp_path / "everybodys"
    own.mkdir(mode=0o755)
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    assert shared_folder(own) == shared_folder(tmp_path / "none") == Path("/tmp")
    assert shared_folder(everybodys) == everybodys


def test_a_spec_shows_no_value_of_its_environment() -> None:
    spec = KeeperSpec(argv=(), env={"S": "hush"}, cwd="", launch="", log="", lock="", tmp_dir="")
    assert "hush" not in repr(spec)


async def test_a_neighbour_that_woke_while_others_held_the_gpu_is_locked_too(box: MakeBox) -> None:
    share = {"args": {"gpu-memory-utilization": 0.3}}
    models = {"a": {"model": "sim/1GiB", **share}, "b": {"model": "sim/1GiB", **share}}
    machine = box(models)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.sleep("a")
        await fleet.sleep("b")
        a, b, operation = model_of(fleet, "a"), model_of(fleet, "b"), Operation("switch", "b", machine.report)

        async def lock_b() -> bool:
            async with acquire(b, operation, make_room=True):
                return read_holder(a.lock) is not None

        async with hold([b.lock], holder("test", "b")):
            waiting = asyncio.create_task(lock_b())
            await until(lambda: any(step.phase == "waiting" for step in machine.progress))
            record = a.read()
            a.write(state=State.AWAKE)  # as by a config that puts it on another GPU
        try:
            assert await waiting
        finally:
            a.core.records.write(record)


# ── what comes, goes and is written meanwhile ──────────────────────────────────────────────────────────────


async def test_gpus_that_were_away_when_the_panel_began_are_found_under_their_own_locks(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as early, machine.open() as late:
        core, later = early._core, core_of(late)  # no driver can be loaded late here: this very core forgets
        core._gpus.clear()
        assert core.gpu_locks({0}) == later.gpu_locks({0})
        core._gpus.clear()
        assert core.total(0) == later.total(0)
        machine.write({"a": {"model": "sim/1GiB", "args": {"gpu-memory-utilization": 1.0}}}, ["24GiB"])
        early.reload(load(machine.config))
        core._gpus.clear()
        with pytest.raises(RefusedError, match="needs"):
            await early.start(["a"])


async def test_a_wake_that_is_run_through_again_has_its_gate_closed_until_it_is_proven(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": 2}})
    limits = OperationLimits(call=5.0, call_per_gib=0.0)
    async with Fleet(load(machine.config), machine.state_dir, limits=limits) as fleet:
        await fleet.start(["a"])
        model = model_of(fleet, "a")
        await inject(fleet, "a", "hang")  # the proof gets no answer
        intent = Intent(operation="wake", phase="prove", since=0.0, actor=ProcessId(pid=os.getpid(), start=0))
        # As its actor leaves it that is killed between the gate and the record.
        model.write(state=State.WAKING, level=2, intent=intent)
        client, closed = client_of(fleet, "a"), False
        while not closed and record_of(fleet, "a").state is State.WAKING:
            with suppress(EngineError):
                closed = (await client.gate()).closed
            await asyncio.sleep(0.01)
        assert closed
        await until(lambda: record_of(fleet, "a").intent is None)


async def test_what_is_being_written_when_the_panel_closes_is_written(box: MakeBox) -> None:
    machine = box(ONE)
    core = Core(load(machine.config), machine.state_dir)
    began = threading.Event()

    def slowly(past: History) -> None:
        began.set()
        time.sleep(0.3)
        past.record_cold_start("a", 1.5)

    core.note(lambda past: past.record_cold_start("a", 1.5))
    core.note(slowly)
    writing = asyncio.get_running_loop().run_in_executor(None, core.flush)
    await asyncio.to_thread(began.wait)
    await core.close()
    await writing
    past = History(machine.state_dir, machine.config)
    try:
        assert past.usual_cold_start("a") == 1.5
    finally:
        past.close()
