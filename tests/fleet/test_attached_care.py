"""What the leader does for attached servers: sleep after idleness, and a name for a hang; never an end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.fleet.beside import model_of, record_of
from tests.fleet.by_hand import vllm
from tests.fleet.conftest import Box, seen, until, until_state
from tests.fleet.test_attached import HELLO, gpus_of
from tests.fleet.test_supervision import QUICK, led
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.attached.backend import probe
from vllm_sleep_tui.fleet.attached.care import AttachedCare, read_use
from vllm_sleep_tui.fleet.attached.probe import ProbeResult, after
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Hang
from vllm_sleep_tui.fleet.supervision.supervisor import Limits
from vllm_sleep_tui.fleet.survey import read_once
from vllm_sleep_tui.telemetry.processes import ProcessId

MakeBox = Callable[..., Box]
FreePort = Callable[[], int]


def attached(box: MakeBox, port: int, **more: Any) -> Box:
    """A box whose only model is attached."""
    return box({"far": {"url": f"http://127.0.0.1:{port}", **more}})


async def fault(port: int, *faults: str) -> None:
    """Switch these faults of the server on, and all others off."""
    async with httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}/simulator/faults"
        assert (await client.post(url, json={"faults": faults})).status_code == 200


@asynccontextmanager
async def stuck_answer(fleet: Fleet, port: int) -> AsyncIterator[None]:
    """A chat whose engine gives no token meanwhile."""
    await fault(port, "hang")
    answer = fleet.chat("far", HELLO)
    task = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
    try:
        yield
    finally:
        await fault(port)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextmanager
def frozen(process: Any) -> Iterator[None]:
    """The server's engine stopped, as a stuck GPU call stops it."""
    engines = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert engines
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in engines:
            os.kill(pid, signal.SIGCONT)


async def test_an_idle_attached_server_goes_to_sleep_and_a_chat_wakes_it(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port, idle={"sleep_after": "2s"}, level=2)
    with vllm(port, gpus=gpus_of(machine)):
        async with led(machine) as fleet:
            await until_state(fleet, "far", State.AWAKE)
            asked = time.monotonic()
            assert [event async for event in fleet.chat("far", HELLO)]
            assert (await until_state(fleet, "far", State.ASLEEP)).level == 2
            assert time.monotonic() - asked >= 2  # the second is not over before, however slow it goes
            assert [event async for event in fleet.chat("far", HELLO)]
            assert (seen(fleet, "far").state, seen(fleet, "far").proof) == (State.AWAKE, "proven")


async def test_an_attached_server_that_is_answering_is_not_idle(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    machine = attached(box, port, idle={"sleep_after": "1s"})
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as asking, stuck_answer(asking, port):
            await until_used(model_of(asking, "far"))
            async with led(machine, Limits(hang=60)) as fleet:  # it leads only now: so it never was idle
                await asyncio.sleep(2.5)  # nothing is to happen
                assert seen(fleet, "far").state is State.AWAKE
        async with led(machine, Limits(hang=60)) as fleet:
            await until_state(fleet, "far", State.ASLEEP)


async def test_one_that_cannot_sleep_is_asked_once_and_left_awake(
    box: MakeBox, free_port: FreePort, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    machine = attached(box, port, idle={"sleep_after": "1s"})

    def refusals() -> int:
        return caplog.text.count("lets nobody from here sleep it")

    with vllm(port, VLLM_SERVER_DEV_MODE="0"):
        async with led(machine) as fleet:
            await until(lambda: refusals() == 1)
            await asyncio.sleep(2)  # nothing is to happen
            assert (refusals(), seen(fleet, "far").state) == (1, State.AWAKE)


async def test_a_hang_is_named_for_everybody_and_nothing_is_ended(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, gpus=gpus_of(machine)) as process:
        async with led(machine, QUICK) as fleet:
            async with stuck_answer(fleet, port):
                await until(lambda: "It hangs: 1 requests under way" in (seen(fleet, "far").reason or ""))

                def told() -> bool:  # again: a look gives 0.3 s, which is little on a busy machine
                    far = read_once(load(machine.config), machine.state_dir).model("far")
                    return (far.state, "no token for" in (far.reason or "")) == (State.AWAKE, True)

                await until(told)
            await until(lambda: seen(fleet, "far").reason is None)
            assert process.poll() is None


async def test_a_frozen_engine_is_named_though_its_server_looks_well(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, gpus=gpus_of(machine)) as process:
        async with led(machine, QUICK) as fleet:
            await until_state(fleet, "far", State.AWAKE)
            with frozen(process):
                await until(lambda: "no word on whether it sleeps" in (seen(fleet, "far").reason or ""))
                assert seen(fleet, "far").state is State.AWAKE
            await until(lambda: seen(fleet, "far").reason is None)


async def test_a_hang_seen_by_a_leader_who_is_gone_is_not_told(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as fleet:
            gone = Hang(symptom="no token", since=time.time(), by=ProcessId(pid=os.getpid(), start=1))
            model_of(fleet, "far").write(hang=gone)
            assert (await until_state(fleet, "far", State.AWAKE)).reason is None
        async with led(machine) as fleet:
            await until(lambda: record_of(fleet, "far").hang is None)


async def test_one_that_is_asked_again_before_it_would_sleep_is_left_at_once_and_tried_later(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port, idle={"sleep_after": "1s"})
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as fleet:
            await until_state(fleet, "far", State.AWAKE)
            far, care = model_of(fleet, "far"), AttachedCare(60)
            await probe([far])
            before = await read_use(far)
            assert before is not None
            async with stuck_answer(fleet, port):
                await until_used(far)
                since = far.core.probes["far"].since
                await asyncio.wait_for(care._put_away(far, before, since), 40)
                assert seen(fleet, "far").state is State.AWAKE
            await until_idle(far)
            now = await read_use(far)
            assert now is not None
            await care._put_away(far, now, since)
            await until_state(fleet, "far", State.ASLEEP)


async def until_used(far: Model) -> None:
    while not (use := await read_use(far)) or not use.under_way:
        await asyncio.sleep(0.01)


async def until_idle(far: Model) -> None:
    while not (use := await read_use(far)) or use.under_way:
        await asyncio.sleep(0.01)


def test_how_long_one_does_not_say_is_reckoned_by_a_clock_that_nobody_sets() -> None:
    busy = ProbeResult(state=State.AWAKE, is_certain=False)
    first = after(None, busy)
    assert first.unsure_since is not None
    assert abs(first.unsure_since - time.monotonic()) < 60
    assert after(first, busy).unsure_since == first.unsure_since
    assert after(first, ProbeResult(state=State.AWAKE)).unsure_since is None
