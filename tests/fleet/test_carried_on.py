"""A start whose starter died, in the hands of somebody who wanted something else."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.fleet.beside import model_of, record_of
from tests.fleet.conftest import Box, seen, until, until_state
from tests.fleet.test_supervision import begin
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import CancelledByUser
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.fleet import to_safe_point
from vllm_sleep_tui.fleet.keeper_client import is_kept
from vllm_sleep_tui.fleet.operations import groups
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.reconcile import is_unfinished
from vllm_sleep_tui.fleet.operations.supervised import Supervised
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import hold, holder
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.fleet.supervision.restart import Restarter

MakeBox = Callable[..., Box]


@asynccontextmanager
async def abandoned(box: MakeBox) -> AsyncIterator[tuple[Box, Core]]:
    """A box in which the starter of `a` was killed; and a core that nobody watches over."""
    machine = box({"a": {"model": "sim/1GiB"}, "b": {"model": "sim/1GiB"}}, speed="5")
    core = Core(load(machine.config), machine.state_dir)
    verb = begin(machine, "start", "a")
    try:
        await until(lambda: "compiling" in str(core.records.read("a").intent))
    finally:
        verb.kill()
        verb.wait()
    try:
        yield machine, core
    finally:
        await core.close()


def is_ours(record: Record) -> bool:
    """Whether this process has taken the start on."""
    return record.intent is not None and record.intent.actor == actor()


@pytest.mark.parametrize("target", ["a", "b"])
async def test_a_cancelled_switch_leaves_the_start_it_carried_on_to_the_next(
    box: MakeBox, target: str
) -> None:
    async with abandoned(box) as (machine, core):
        launch = core.records.read("a").launch
        operation = Operation("switch", target, machine.report)
        task = asyncio.create_task(to_safe_point(operation, Supervised(core.model(target)).switch(operation)))
        await until(lambda: is_ours(core.records.read("a")))
        task.cancel()
        with pytest.raises(CancelledByUser) as caught:
            await task
        assert "`stop a`" in caught.value.cure
        left = core.records.read("a")
        assert (left.state, left.launch, is_kept(core.model("a").keeper_file)) == (
            State.STARTING,
            launch,
            True,
        )
        async with machine.open() as fleet:
            await until_state(fleet, "a", State.AWAKE)
            assert core.records.read("a").launch == launch


async def test_a_start_that_is_stopped_does_not_end_the_switch_that_carried_it_on(box: MakeBox) -> None:
    async with abandoned(box) as (machine, core):
        operation = Operation("switch", "b", machine.report)
        task = asyncio.create_task(Supervised(core.model("b")).switch(operation))
        await until(lambda: is_ours(core.records.read("a")))
        async with machine.open() as fleet:
            await fleet.stop(["a"])
            await task
            await until_state(fleet, "b", State.AWAKE)
            assert seen(fleet, "a").state is State.STOPPED


async def test_a_start_whose_starter_died_is_stopped_like_any_other(box: MakeBox) -> None:
    async with abandoned(box) as (_, core):
        await groups.stop_all([core.model("a")], Operation("stop", "a"), False)
        assert core.records.read("a").state is State.STOPPED


# ── a restart by a leader that dies ──────────────────────────────────────────────────────────────────────


async def dies_asleep(box: MakeBox) -> tuple[Box, Core]:
    """A box whose sleeper `b` has died, and a core that nobody watches over."""
    machine = box({"a": {"model": "sim/1GiB"}, "b": {"model": "sim/1GiB"}}, speed="10")
    async with machine.open() as fleet:
        await fleet.start(["b"])
        await fleet.sleep("b")
        server = record_of(fleet, "b").server
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        await until_state(fleet, "b", State.FAILED)
        await until(lambda: record_of(fleet, "b").state is State.FAILED)
    return machine, Core(load(machine.config), machine.state_dir)


async def test_a_sleeper_whose_restart_was_cut_off_ends_asleep(box: MakeBox) -> None:
    machine, core = await dies_asleep(box)
    leading = asyncio.create_task(Restarter(pauses=(0.0,)).act(core.model("b")))
    await until(lambda: "compiling" in str(core.records.read("b").intent))
    leading.cancel()  # as its process does when it is killed: nothing is unwound that is written down
    await asyncio.wait({leading})
    assert core.records.read("b").state is State.STARTING
    await core.close()
    async with machine.open() as fleet:
        await until_state(fleet, "b", State.ASLEEP)
        await fleet.switch("b")
        await until(lambda: not is_unfinished(model_of(fleet, "b")))
        assert seen(fleet, "b").state is State.AWAKE
        await fleet.sleep("b")
        await fleet.stop(["b"])
        await fleet.start(["b"])
        assert not is_unfinished(model_of(fleet, "b"))


async def test_a_sleeper_that_is_restarted_is_asleep_before_anybody_else_gets_the_gpu(box: MakeBox) -> None:
    _, core = await dies_asleep(box)
    leading = asyncio.create_task(Restarter(pauses=(0.0,)).act(core.model("b")))
    await until(lambda: core.records.read("b").state is State.STARTING)
    async with hold(core.gpu_locks({0}), holder("test", "a")):
        assert core.records.read("b").state is State.ASLEEP
    await leading
    await core.close()


async def test_a_fallen_sleeper_that_somebody_starts_is_awake(box: MakeBox) -> None:
    machine, core = await dies_asleep(box)
    await core.close()
    async with machine.open() as fleet:
        await fleet.start(["b"])
        assert not is_unfinished(model_of(fleet, "b"))
        assert seen(fleet, "b").state is State.AWAKE
