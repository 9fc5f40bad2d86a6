"""Loops that look again and again: in step with each other, and at once when they are told to."""

from __future__ import annotations

import asyncio
import time

from vllm_sleep_tui.fleet.poller import Poller, until_beat


def test_every_beat_of_a_slow_loop_is_one_of_a_fast_loop_whenever_each_began() -> None:
    began = time.monotonic()
    slow, fast = until_beat(1000.0), until_beat(0.5)
    apart = (slow - fast) % 0.5
    assert min(apart, 0.5 - apart) <= time.monotonic() - began
    assert until_beat(1000.0) < slow


async def test_a_loop_that_is_hurried_looks_without_waiting_for_its_beat() -> None:
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        looked.set()

    looked = asyncio.Event()
    poller = Poller("seldom", 3600.0, look)
    poller.start()
    async with asyncio.timeout(30):
        await looked.wait()
        looked.clear()
        poller.hurry()
        await looked.wait()
    await poller.close()
    assert looks == 2
