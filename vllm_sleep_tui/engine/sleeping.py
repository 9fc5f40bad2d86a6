"""How a vLLM server is put to sleep and woken: the one copy, for servers of ours and of others.

A call that got no answer may have taken effect all the same: the server is asked, never assumed. What a
caller adds to a step, its record of the intent and its clock, is the context that `Step` makes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from vllm_sleep_tui.engine.endpoints import SLEEP
from vllm_sleep_tui.engine.failures import (
    EngineError,
    EngineRefused,
    EngineSilent,
    EngineTimeout,
    EngineUnreachable,
    StillAsleep,
)
from vllm_sleep_tui.engine.metrics import Page

if TYPE_CHECKING:
    from vllm_sleep_tui.engine.client import VllmClient

T = TypeVar("T")
Step = Callable[[str], AbstractContextManager[None]]
"""Goes round one step of a wake from level 2: "weights", "reload", "kv_cache", "reset"."""
OWN = "own"
ALONG_SECONDS = 0.003
"""From sending a wake until the engine has it: a question after that is answered when the wake is done."""


class Told(Enum):
    """When it is known whether a wake has woken everything, where the reply does not tell (before 0.32)."""

    AFTER = auto()
    """It is asked after the reply."""
    ALONG = auto()
    """It is asked while it wakes."""
    LATER = auto()
    """Whoever called finds out, by `check_awake` if by nothing else."""


class WorkerFacts(msgspec.Struct, frozen=True):
    """What one worker says of its sleep mode."""

    state: str = ""
    """"own" if it is the panel's."""
    why: str | None = None
    """Why it is vLLM's."""
    level: int | None = None
    """It sleeps at; told by the panel's alone."""
    refused: str | None = None
    """Why it sleeps on as it did, though it was asked to go deeper: the RAM was not to be had."""
    last: dict[str, float] = {}
    """Bytes and seconds of what it did last, by name."""

    @property
    def is_own(self) -> bool:
        """Whether the panel's sleep mode is at work in it."""
        return self.state == OWN

    @property
    def freed_bytes(self) -> int | None:
        """VRAM that its last sleep gave up; None if it does not tell."""
        return int(self.last["freed_bytes"]) if "freed_bytes" in self.last else None


# ── ask ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def is_sleeping(client: VllmClient, seconds: float) -> bool:
    """Whether it sleeps, after a call that got no answer; waits through an operation under way.

    Raises EngineSilent if it does not tell, so that this is not taken for a refusal of the call before.
    """
    try:
        return await client.is_sleeping(seconds)
    except EngineRefused as error:
        raise EngineSilent(error.what, error.cure) from error


async def answered(
    client: VllmClient, call: Callable[[], Awaitable[T]], seconds: float, *, asleep: bool
) -> T | None:
    """The reply to `call`; None if it was lost, once the engine is through with it.

    A call whose connection broke may never have come there: it is made again, once, if the server is not
    `asleep` as the call would have left it.
    """
    try:
        return await call()
    except EngineTimeout:
        await is_sleeping(client, seconds)
        return None
    except EngineUnreachable as error:
        if not error.sent:
            raise
    return None if await is_sleeping(client, seconds) is asleep else await call()


async def sleep_level(client: VllmClient, seconds: float, *, is_own: bool, otherwise: int = 1) -> int:
    """The level of a sleeper: as our sleep mode says, else by vLLM's own gauge (0.12), else `otherwise`."""
    if is_own and (level := deepest(await worker_facts(client, seconds))) is not None:
        return level
    return Page.read(await client.metrics(), 0.0).sleep_level or otherwise


# ── sleep ───────────────────────────────────────────────────────────────────────────────────────────────────


async def sleep(client: VllmClient, level: int, seconds: float, *, is_own: bool) -> None:
    """The call; a call that got no answer has worked if the server sleeps. It is no proof of freed memory.

    Level 0 of the panel's sleep mode is to vLLM a sleep at level 1, of which that was told to leave the
    weights; without it vLLM is paused, which it calls level 0, and gives up its KV cache (0.31 and newer).
    Raises EngineRefused if the server refuses, another EngineError if it cannot be known.
    """
    asked = level or 1
    if level == 0 and not is_own:
        await answered(client, lambda: client.sleep(0, seconds), seconds, asleep=True)
        await answered(client, lambda: client.release_kv_cache(seconds), seconds, asleep=True)
        return
    reply = await answered(client, lambda: client.sleep(asked, seconds), seconds, asleep=True)
    if reply is None and not await is_sleeping(client, seconds):
        raise EngineSilent(f"it gave no answer to {SLEEP} and is awake.")


# ── wake ────────────────────────────────────────────────────────────────────────────────────────────────────


async def wake(
    client: VllmClient, level: int, seconds: float, step: Step, *, quick: float, told: Told = Told.AFTER
) -> None:
    """Wake a sleeper of `level`; `quick` is the limit of the one call that moves no weights.

    Raises StillAsleep if it answers well and sleeps on, EngineRefused if it refuses.
    """
    if level == 2:
        await _wake_from_2(client, seconds, step, quick, told)
    else:
        await _wake_the_last(client, (), seconds, told)


async def _wake_from_2(client: VllmClient, seconds: float, step: Step, quick: float, told: Told) -> None:
    """The four steps that vLLM wants from its client; any of them may be repeated after a crash."""
    with step("weights"):
        await answered(client, lambda: client.wake_up(("weights",), timeout=seconds), seconds, asleep=False)
    with step("reload"):
        await answered(
            client, lambda: client.collective_rpc("reload_weights", seconds), seconds, asleep=False
        )
    with step("kv_cache"):
        await _wake_the_last(client, ("kv_cache",), seconds, told)
    with step("reset"):
        await client.reset_prefix_cache(quick)


async def _wake_the_last(client: VllmClient, tags: Sequence[str], seconds: float, told: Told) -> None:
    """Wake what sleeps still; raises StillAsleep unless everything is awake then, as far as that is told."""
    along = asyncio.ensure_future(_is_awake_soon(client, seconds)) if told is Told.ALONG else None
    try:
        reply = await answered(client, lambda: client.wake_up(tags, timeout=seconds), seconds, asleep=False)
        # It was asleep before: that it is awake is true of now. That it sleeps may be of before the wake.
        if along is not None and await along:
            return
        if reply is not None and reply.status is not None:
            if reply.status != "awake":
                raise StillAsleep
        elif told is not Told.LATER:
            await check_awake(client, seconds)
    finally:
        if along is not None:
            along.cancel()
            await asyncio.gather(along, return_exceptions=True)


async def _is_awake_soon(client: VllmClient, seconds: float) -> bool:
    """Whether it is known to be awake, asked while it wakes; never raises an EngineError."""
    await asyncio.sleep(ALONG_SECONDS)
    try:
        return not await client.is_sleeping(seconds)
    except EngineError:
        return False


async def check_awake(client: VllmClient, seconds: float) -> None:
    """Raises StillAsleep if it sleeps on after a wake."""
    if await client.is_sleeping(seconds):
        raise StillAsleep


async def reload(client: VllmClient, seconds: float, *, quick: float) -> None:
    """Load the weights of a server that is awake once more, and forget what was computed with the old."""
    await client.collective_rpc("reload_weights", seconds)
    await client.reset_prefix_cache(quick)


# ── the panel's own sleep mode ──────────────────────────────────────────────────────────────────────────────


async def worker_facts(client: VllmClient, seconds: float) -> list[WorkerFacts]:
    """What each worker says of its sleep mode; vLLM without ours refuses the question."""
    return await _ask_workers(client, "panel_sleep_facts", seconds)


async def keep_weights(client: VllmClient, seconds: float) -> list[WorkerFacts]:
    """Have the sleep that comes now give up the KV cache alone (level 0), of each worker that is our own."""
    return await _ask_workers(client, "panel_keep_weights", seconds)


async def forget_weights(client: VllmClient, seconds: float) -> None:
    """Take that back: the sleep does not come. Without an answer it is forgotten ten seconds later."""
    with contextlib.suppress(EngineError):
        await _ask_workers(client, "panel_keep_weights", seconds, False)


async def sleep_deeper(client: VllmClient, level: int, seconds: float, *, is_own: bool) -> list[WorkerFacts]:
    """From level 0 to 1 or 2 without a wake; who sleeps at another level, or lacks RAM, stays as it is.

    vLLM's own sleep mode has no such word: there it has gone deeper, or refuses.
    """
    if not is_own:
        await sleep(client, level, seconds, is_own=False)
        return [WorkerFacts(level=level)]
    return await _ask_workers(client, "panel_sleep_deeper", seconds, level)


def deepest(workers: Sequence[WorkerFacts]) -> int | None:
    """The level from which all of these workers come back by one wake; None if one of them tells none.

    What is at level 0 comes back by a wake from 1, and both by one from 2, which loads all weights again.
    """
    levels = [worker.level for worker in workers]
    return None if None in levels else max((level or 0 for level in levels), default=None)


async def _ask_workers(client: VllmClient, method: str, seconds: float, *args: Any) -> list[WorkerFacts]:
    answers = await client.collective_rpc(method, seconds, args)
    try:
        return msgspec.convert(answers, list[WorkerFacts])
    except msgspec.ValidationError as error:
        raise EngineRefused(200, f"the answer to {method} is not our sleep mode's: {error}") from None
