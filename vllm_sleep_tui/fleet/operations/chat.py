"""A conversation with a model, which is switched to first if it is not awake."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vllm_sleep_tui.engine.chat import refusal
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.attached import backend as attached
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.operations.end import is_whole
from vllm_sleep_tui.fleet.operations.reconcile import lives
from vllm_sleep_tui.fleet.snapshot import ChatEvent, Report, SwitchTimes
from vllm_sleep_tui.fleet.states import State

if TYPE_CHECKING:
    from vllm_sleep_tui.engine.client import VllmClient

FIRST_LIMIT = 300.0
"""Seconds to the first piece of an answer: a long prompt is computed in it."""


class Switcher(Protocol):
    """Who can make a model awake."""

    async def switch(self, name: str, *, force: bool = False, report: Report | None = None) -> SwitchTimes:
        """Make the model awake."""


async def answer(
    switcher: Switcher,
    core: Core,
    name: str,
    messages: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
    report: Report | None,
) -> AsyncIterator[ChatEvent]:
    """The pieces of an answer; what goes wrong in the middle comes as the last event's `error`."""
    if await state_of(core, name) is not State.AWAKE:
        ledger = await switcher.switch(name, report=report)
        yield ChatEvent(model=name, switch_seconds=ledger.total)
    began, first = time.monotonic(), True
    client, served = await endpoint(core, name)
    stream = client.chat(messages, model=served, params=params, first_timeout=FIRST_LIMIT)
    try:
        async for delta in stream:
            ttft = None
            if first and (delta.text or delta.reasoning):
                ttft, first = time.monotonic() - began, False
            yield ChatEvent(
                model=name,
                text=delta.text,
                reasoning=delta.reasoning,
                finish_reason=delta.finish_reason,
                error=delta.error,
                prompt_tokens=delta.prompt_tokens,
                completion_tokens=delta.completion_tokens,
                ttft=ttft,
            )
    except PanelError as failure:
        error = refusal(failure) if isinstance(failure, EngineError) else failure
        yield ChatEvent(model=name, error=f"{error.what} {error.cure}".strip())
    finally:
        await stream.aclose()


async def state_of(core: Core, name: str) -> State:
    """The model's state; of an attached one, asked now: RefusedError if its server does not answer."""
    if core.model(name).url is not None:
        return (await attached.see(core, name)).state
    record = core.records.read(name)
    if record.state is State.AWAKE and not (lives(core, record) and is_whole(record)):
        return State.FAILED  # nobody has written it down yet, and somebody else may be on its port by now
    return record.state


async def endpoint(core: Core, name: str) -> tuple[VllmClient, str]:
    """Who is asked, and by which name; raises OperationError if an attached server does not tell it."""
    if core.model(name).url is not None:
        return attached.client_of(core, name), await attached.served_name(core, name)
    return core.client(core.records.read(name)), name
