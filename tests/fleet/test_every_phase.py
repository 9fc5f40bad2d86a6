"""A switch, a start and a stop that are cancelled, cut off or on a full disk, in each of their phases."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.fleet.beside import client_of, model_of, record_of
from tests.fleet.conftest import Box, seen, until
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError
from vllm_sleep_tui.fleet.fleet import Fleet, to_safe_point
from vllm_sleep_tui.fleet.keeper_client import is_kept
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.supervised import Supervised
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.fleet.states import State

MakeBox = Callable[..., Box]
ONE = {"a": {"model": "sim/1GiB"}}
PHASES = ["drain", "sleep", "wake", "weights", "reload", "kv_cache", "reset", "prove"]
START_PHASES = ["loading", "warming", "priming", "sleep", "prove"]


async def settled_and_true(fleet: Fleet) -> None:
    """Nobody is at anything, each record says what its server says, and the gates are as the states."""
    names = list(fleet.loaded.config.models)
    await until(lambda: all(record_of(fleet, name).intent is None for name in names))
    for record in [record_of(fleet, name) for name in names]:
        assert record.state in (State.STOPPED, State.AWAKE, State.ASLEEP, State.FAILED)
        assert is_kept(model_of(fleet, record.name).keeper_file) == (
            record.state in (State.AWAKE, State.ASLEEP)
        )
        if record.state in (State.AWAKE, State.ASLEEP):
            client = client_of(fleet, record.name)
            assert await client.is_sleeping(5) == (record.state is State.ASLEEP)
            if record.resolved_level != "none":
                assert (await client.gate()).closed == (record.state is State.ASLEEP)


@pytest.mark.parametrize("kind", ["cancelled", "cut off"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_switch_ended_in_any_phase_leaves_the_truth(box: MakeBox, phase: str, kind: str) -> None:
    models = {"a": {"model": "sim/1GiB", "level": 2}, "b": {"model": "sim/2GiB", "level": 2}}
    async with box(models).open() as fleet:
        await fleet.start(["a", "b"])
        # What was measured is written off the operation's path, and read here as by another process.
        await until(lambda: model_of(fleet, "b").footprint.awake)
        met: list[str] = []

        def report(progress: Progress) -> None:
            if progress.phase == phase and not met:
                met.append(phase)
                task.cancel()

        operation = Operation("switch", "b", report)
        work = Supervised(model_of(fleet, "b")).switch(operation)
        task = asyncio.ensure_future(to_safe_point(operation, work) if kind == "cancelled" else work)
        with pytest.raises(CancelledByUser if kind == "cancelled" else asyncio.CancelledError):
            await task
        assert met
        await settled_and_true(fleet)
        await fleet.switch("a")
        await settled_and_true(fleet)
        assert seen(fleet, "a").state is State.AWAKE


@pytest.mark.parametrize("kind", ["cancelled", "cut off"])
@pytest.mark.parametrize("phase", START_PHASES)
async def test_a_start_ended_in_any_phase_leaves_the_truth(box: MakeBox, phase: str, kind: str) -> None:
    async with box({"a": {"model": "sim/1GiB", "level": 1}}).open() as fleet:
        met: list[str] = []

        def report(progress: Progress) -> None:
            if progress.phase == phase and not met:
                met.append(phase)
                task.cancel()

        operation = Operation("start", "a", report)
        work = Supervised(model_of(fleet, "a")).switch(operation)
        task = asyncio.ensure_future(to_safe_point(operation, work) if kind == "cancelled" else work)
        with suppress(CancelledByUser, asyncio.CancelledError):
            await task
        assert met
        await settled_and_true(fleet)
        await fleet.switch("a")
        await settled_and_true(fleet)


@pytest.mark.parametrize("kind", ["cancelled", "cut off"])
async def test_a_stop_that_is_ended_leaves_the_truth(box: MakeBox, kind: str) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])

        def report(progress: Progress) -> None:
            if progress.phase == "stopping":
                task.cancel()

        operation = Operation("stop", "a", report)
        work = Supervised(model_of(fleet, "a")).stop(operation, force=False)
        task = asyncio.ensure_future(to_safe_point(operation, work) if kind == "cancelled" else work)
        with suppress(CancelledByUser, asyncio.CancelledError):
            await task
        await settled_and_true(fleet)


@contextmanager
def no_file_grows() -> Iterator[None]:
    """Every write to a file of this process fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("phase", PHASES)
async def test_a_disk_that_is_full_in_any_phase_of_a_switch_costs_no_truth(box: MakeBox, phase: str) -> None:
    models = {"a": {"model": "sim/1GiB", "level": 2}, "b": {"model": "sim/2GiB", "level": 2}}
    async with box(models).open() as fleet:
        await fleet.start(["a", "b"])

        def report(progress: Progress) -> None:
            if progress.phase == phase:
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

        with no_file_grows(), pytest.raises(OperationError, match="Could not write"):
            await fleet.switch("b", report=report)
        await settled_and_true(fleet)
        await fleet.switch("a")
        await settled_and_true(fleet)
        assert seen(fleet, "a").state is State.AWAKE


async def test_a_disk_that_is_full_while_a_model_starts_costs_no_truth(box: MakeBox) -> None:
    async with box(ONE).open() as fleet:
        await fleet.start(["a"])
        await fleet.stop(["a"])

        def report(progress: Progress) -> None:
            if progress.phase == "loading":
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

        with no_file_grows(), pytest.raises(PanelError):
            await fleet.start(["a"], report=report)
        await settled_and_true(fleet)
        await fleet.start(["a"])
        await settled_and_true(fleet)
