"""A model that requests wait for is not put away, however long it has been idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.fleet.conftest import Box, seen
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State


async def test_a_wanted_model_stays_while_its_like_is_stopped(box: Callable[..., Box]) -> None:
    idle = {"stop_after": "1s"}
    machine = box({name: {"model": "sim/1GiB", "idle": idle} for name in ("wanted", "other")})
    async with machine.open() as fleet:
        await fleet.start(["wanted", "other"])
    async with (
        Fleet(load(machine.config), machine.state_dir, leads=True) as leader,
        machine.open() as another,
    ):
        async with asyncio.timeout(60):
            while seen(leader, "other").state is not State.STOPPED:
                another.want(["wanted"])  # said by whoever has the requests, heard by whoever leads
                await asyncio.sleep(0.1)
        assert seen(leader, "wanted").state in (State.AWAKE, State.ASLEEP)
        async with asyncio.timeout(60):
            while seen(leader, "wanted").state is not State.STOPPED:
                await asyncio.sleep(0.1)
