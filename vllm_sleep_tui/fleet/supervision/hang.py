"""Servers that look well and answer nobody: requests are under way and nothing in the engine moves.

`/health` says 200 while the engine is stuck (vLLM 0.32, 06-frozen-engine.txt), so its counters are compared,
and before the verdict it is asked for one token itself: a client that sends its request slowly hangs too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.engine import proof
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.engine.metrics import Page
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.acquire import acquire
from vllm_sleep_tui.fleet.operations.end import fail
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.store.records import Record

if TYPE_CHECKING:  # a panel that is opening does without it
    from vllm_sleep_tui.engine.client import Gate, VllmClient


class _Still(msgspec.Struct, frozen=True):
    launch: str | None
    signs: tuple[float | None, ...]
    since: float


class HangWatch:
    """Remembers of each model since when nothing moved."""

    def __init__(self, limit: float, probe: float) -> None:
        self.limit = limit
        self._probe = probe
        self._still: dict[str, _Still] = {}
        self._deaf: dict[str, tuple[tuple[str | None, float], float]] = {}

    def is_deaf(self, record: Record) -> bool:
        """Whether a server that just did not answer has not answered for `limit` seconds.

        A silence ends with a sleep or a wake: in between nobody looked.
        """
        stay = (record.launch, record.since)
        known, since = self._deaf.get(record.name, (None, 0.0))
        if known != stay:
            since = time.monotonic()
            self._deaf[record.name] = (stay, since)
        return time.monotonic() - since >= self.limit

    def hears(self, record: Record) -> None:
        """It has just answered."""
        self._deaf.pop(record.name, None)

    async def is_hung(self, client: VllmClient, record: Record, gate: Gate) -> bool:
        """Whether requests have been under way for `limit` seconds without anything moving."""
        if not gate.in_flight:
            self._still.pop(record.name, None)
            return False
        signs = await read_signs(client)
        known = self._still.get(record.name)
        if known is None or (known.launch, known.signs) != (record.launch, signs):
            self._still[record.name] = _Still(record.launch, signs, time.monotonic())
            return False
        if time.monotonic() - known.since < self.limit:
            return False
        if not await self._answers(client, record):
            return True
        self._still.pop(record.name)
        return False

    async def _answers(self, client: VllmClient, record: Record) -> bool:
        """Whether it gives one token; a refusal is an answer, though none of the engine's."""
        try:
            await proof.one_token(client, record.name, self._probe)
        except EngineError:
            return False
        return True


async def read_signs(client: VllmClient) -> tuple[float | None, ...]:
    """The signs of life; all None if the metrics do not come, which is no sign either."""
    try:
        text = await client.metrics()
    except EngineError:
        text = ""
    return Page.read(text, time.monotonic()).signs_of_life


async def end_hung(
    model: Model, symptom: str, limit: float, leads: Callable[[], bool] = lambda: True
) -> None:
    """End a hung server and write down why."""
    before = model.record
    async with acquire(model, Operation("restart", model.name), make_room=False):
        if not model.record.is_same_stay(before) or not leads():
            return  # it ended, or has slept and was proven since
        await fail(
            model,
            f"It hung: {symptom} for {limit:.0f} s.",
            "Look at its log, then start it again.",
            died_from=model.record.state,
        )
