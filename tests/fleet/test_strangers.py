"""Processes of somebody else where ours should be: refused, named, never touched, never talked to."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.fleet.beside import core_of, model_of, record_of
from tests.fleet.by_hand import answers, vllm, web_server
from tests.fleet.conftest import GIB, Box, seen, until, until_state
from vllm_sleep_tui.errors import PanelError, RefusedError
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.telemetry.processes import ProcessId, start_ticks

MakeBox = Callable[..., Box]
FreePort = Callable[[], int]
HELLO = [{"role": "user", "content": "hello there"}]


def one(box: MakeBox, port: int) -> Box:
    return box({"a": {"model": "sim/1GiB", "port": port}})


async def test_a_listener_on_the_configured_port_is_named_and_left_alone(
    box: MakeBox, free_port: FreePort, tmp_path: Path
) -> None:
    port = free_port()
    with web_server(port, tmp_path) as stranger:
        async with one(box, port).open() as fleet:
            with pytest.raises(RefusedError) as caught:
                await fleet.start(["a"])
            for word in (f"Port {port}", f"pid {stranger.pid}", getpass.getuser(), "http.server"):
                assert word in caught.value.what
            assert "`url:`" in caught.value.cure
            assert seen(fleet, "a").state is State.STOPPED
            await fleet.stop(["a"])
        assert stranger.poll() is None
        assert answers(port, "/") == 200


async def test_a_server_with_our_models_name_is_not_taken_for_ours(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    async with one(box, port).open() as fleet:
        await fleet.start(["a"])
        keeper = record_of(fleet, "a").keeper
        assert keeper is not None
        os.kill(keeper.pid, 9)
        await until_state(fleet, "a", State.FAILED)
        await until(lambda: answers(port, "/health") is None)
        with vllm(port, name="a") as stranger:
            named = f"pid {stranger.pid}, user .*simulator serve"
            with pytest.raises(RefusedError, match=named):
                await fleet.start(["a"])
            with pytest.raises(RefusedError, match=named):
                await fleet.switch("a")
            with pytest.raises(RefusedError, match=f"Port {port} of a is taken"):
                _ = [event async for event in fleet.chat("a", HELLO)]
            assert seen(fleet, "a").state is State.FAILED
            await fleet.stop(["a"])
            assert stranger.poll() is None


async def test_a_question_to_a_model_that_has_just_died_does_not_go_to_whoever_took_its_port(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = one(box, port)
    async with machine.open() as fleet:
        await fleet.start(["a"])
    # No fleet is open now, so nobody writes the death down.
    keeper = record_of(fleet, "a").keeper
    assert keeper is not None
    os.kill(keeper.pid, 9)
    await until(lambda: answers(port, "/health") is None)
    assert record_of(fleet, "a").state is State.AWAKE
    with vllm(port, name="a") as stranger:
        async with machine.open() as fleet:
            with pytest.raises(RefusedError, match=f"taken by pid {stranger.pid}"):
                _ = [event async for event in fleet.chat("a", HELLO)]


async def test_a_record_whose_pids_were_given_to_others_ends_nobody(
    box: MakeBox, free_port: FreePort
) -> None:
    machine = one(box, free_port())
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as stranger:
        reused = ProcessId(stranger.pid, (start_ticks(stranger.pid) or 0) - 1)
        async with machine.open() as fleet:
            model = model_of(fleet, "a")
            record = msgspec.structs.replace(
                model.read(),
                state=State.AWAKE,
                launch="gone",
                keeper=reused,
                server=reused,
                engines=(reused,),
                port=machine_port(machine),
                secret="old",
                gpus=(0,),
            )
            model.core.records.write(record)
            model.keeper_file.write_text(
                json.dumps(
                    {
                        "launch": "gone",
                        "keeper": {"pid": reused.pid, "start": reused.start},
                        "server": {"pid": reused.pid, "start": reused.start},
                    }
                )
            )
            assert (await until_state(fleet, "a", State.FAILED)).reason
            await fleet.stop(["a"], force=True)
            await fleet.start(["a"])
            assert seen(fleet, "a").state is State.AWAKE
        assert stranger.poll() is None
        stranger.kill()


def machine_port(machine: Box) -> int:
    port: int = json.loads(machine.config.read_text())["models"]["a"]["port"]
    return port


WRAPPER = """\
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
(here / "begun").touch()
while not (here / "go").exists():
    time.sleep(0.01)
os.execv(sys.executable, [sys.executable, "-m", "vllm_sleep_tui.simulator", *sys.argv[1:]])
"""


def delayed(machine: Box) -> None:
    """The server begins only when the file `go` is there: the port is free until then."""
    (machine.folder / "wrapper.py").write_text(WRAPPER)
    content = json.loads(machine.config.read_text())
    content["vllm_command"] = [sys.executable, str(machine.folder / "wrapper.py")]
    machine.config.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["any program", "another vLLM"])
async def test_a_port_that_is_taken_between_the_look_and_the_start_is_noticed(
    box: MakeBox, free_port: FreePort, tmp_path: Path, kind: str
) -> None:
    port = free_port()
    machine = one(box, port)
    delayed(machine)
    async with machine.open() as fleet:
        task = asyncio.create_task(fleet.start(["a"]))
        await until(lambda: (machine.folder / "begun").exists())
        # vLLM binds with SO_REUSEPORT: a second one begins as if it were alone.
        taking = web_server(port, tmp_path) if kind == "any program" else vllm(port, name="a")
        with taking as stranger:
            (machine.folder / "go").touch()
            with pytest.raises(PanelError) as caught:
                await task
            assert str(port) in caught.value.what
            assert f"pid {stranger.pid}" in caught.value.what
            assert seen(fleet, "a").state is State.FAILED
            assert stranger.poll() is None
            assert answers(port, "/" if kind == "any program" else "/health") == 200


async def test_memory_held_by_somebody_elses_vllm_is_refused_with_pid_user_command_and_size(
    box: MakeBox, free_port: FreePort
) -> None:
    machine = box({"a": {"model": "sim/1GiB", "args": {"gpu-memory-utilization": 0.7}}})
    async with machine.open() as fleet:
        folder = core_of(fleet).simulated
        with vllm(free_port(), "--gpu-memory-utilization", "0.6", gpus=folder) as stranger:
            with pytest.raises(RefusedError) as caught:
                await fleet.start(["a"])
            said = f"{caught.value.what} {caught.value.cure}"
            for word in (str(stranger.pid), getpass.getuser(), "simulator serve sim/1GiB", "GiB"):
                assert word in said, said
            assert seen(fleet, "a").state is State.STOPPED
            await until(lambda: fleet.snapshot().gpus[0].others)
            (other,) = fleet.snapshot().gpus[0].others
            assert (other.bytes or 0) > 10 * GIB
            assert stranger.poll() is None
        await until(lambda: not fleet.snapshot().gpus[0].used_bytes)
        await fleet.start(["a"])
        assert seen(fleet, "a").state is State.AWAKE
