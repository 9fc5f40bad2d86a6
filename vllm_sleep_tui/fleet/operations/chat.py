"""A conversation with a model, which is switched to first if it is not awake."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vllm_sleep_tui.engine.chat import SEES_CURE, Thinking, refusal, with_pictures
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.errors import OperationError, PanelError, RefusedError, UsageError
from vllm_sleep_tui.fleet.backend import backend_of
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.pictures import MOST_SENT, Picture, data_url
from vllm_sleep_tui.fleet.snapshot import ChatEvent, Report, SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.sizing.vision import takes_pictures

if TYPE_CHECKING:  # a panel that is opening does without it
    from vllm_sleep_tui.engine.client import VllmClient

UNFINISHED = "The server ended the answer without saying that it is whole."
FIRST_LIMIT = 300.0
"""Seconds to the first piece of an answer: a long prompt is computed in it."""


class Switcher(Protocol):
    """Who can make a model awake."""

    async def switch(self, name: str, *, force: bool = False, report: Report | None = None) -> SwitchTimes:
        """Make the model awake."""


async def answer(
    switcher: Switcher,
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
    report: Report | None,
    *,
    switches: bool = True,
) -> AsyncIterator[ChatEvent]:
    """The pieces of an answer; what goes wrong in the middle comes as the last event's `error`.

    A message may have `pictures`, which are read now. Raises PanelError before anything is switched if they
    cannot be sent. Without `switches` a model that is not awake raises OperationError; one that falls asleep
    after that look is woken by nobody: its gate turns the request away.
    """
    name, backend = model.name, backend_of(model)
    messages = await asyncio.to_thread(_sendable, model, messages)
    if (state := await backend.state()) is not State.AWAKE:
        if not switches:
            raise OperationError(
                f"{name} is {state.value}, and --no-switch leaves it so.",
                f"Switch: vllm-sleep-tui switch {name}",
            )
        ledger = await switcher.switch(name, report=report)
        yield ChatEvent(model=name, switch_seconds=ledger.total, switch_times=ledger)
    began, first = time.monotonic(), True
    client, served = await backend.endpoint()
    stream = client.chat(messages, model=served, params=params, first_timeout=FIRST_LIMIT)
    thinking, finish = Thinking(), None
    failed: str | None = None
    try:
        async for delta in stream:
            ttft = None
            if first and (delta.text or delta.reasoning or delta.calls):
                ttft, first = time.monotonic() - began, False
            text, reasoning = thinking.feed(delta)
            finish = delta.finish_reason or finish
            yield ChatEvent(
                model=name,
                text=text,
                reasoning=reasoning,
                calls=delta.calls,
                chances=delta.chances,
                finish_reason=delta.finish_reason,
                prompt_tokens=delta.prompt_tokens,
                completion_tokens=delta.completion_tokens,
                ttft=ttft,
            )
            if delta.error is not None:
                failed = delta.error
                break
        else:
            failed = None if finish is not None else UNFINISHED
    except PanelError as failure:
        error = refusal(failure) if isinstance(failure, EngineError) else failure
        failed = f"{error.what} {error.cure}".strip()
    finally:
        await stream.aclose()
    text, reasoning = thinking.end(finish)
    context = None if failed is not None else await _context(client, served)
    if text or reasoning or context or failed is not None:
        yield ChatEvent(model=name, text=text, reasoning=reasoning, error=failed, context_tokens=context)


def check_sees(model: Model, pictures: Sequence[Picture]) -> None:
    """Raises RefusedError if there are pictures and the model is known to read text alone."""
    if pictures and takes_pictures(model.config, model.base) is False:
        raise RefusedError(f"{model.name} reads text alone: its checkpoint has no part that sees.", SEES_CURE)


def _sendable(model: Model, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages as a server takes them; raises PanelError if the last one's pictures cannot be sent.

    Of an earlier one the model is told that its picture is not there any more, or is left out: it reads text
    alone, or later pictures have all the room.
    """
    sendable: list[Mapping[str, Any]] = []
    check_sees(model, messages[-1].get("pictures", ()))
    shown = [picture for message in messages for picture in message.get("pictures", ())]
    sees = not shown or takes_pictures(model.config, model.base) is not False
    room = MOST_SENT
    for message in reversed(messages):  # the latest have the room first
        pictures: Sequence[Picture] = message.get("pictures", ())
        if not pictures:
            sendable.append(message)
            continue
        text, urls = message["content"], []
        for picture in pictures:
            room -= picture.bytes
            if not sees or room < 0:
                text += "\n(A picture that was here is left out.)"
                continue
            try:
                urls.append(data_url(picture))
            except UsageError:
                if message is messages[-1]:
                    raise
                text += "\n(A picture that was here is not there any more.)"
        content = with_pictures(text, urls) if urls else text
        sendable.append({"role": message["role"], "content": content})
    return sendable[::-1]


async def _context(client: VllmClient, served: str) -> int | None:
    """The tokens that prompt and answer may have together; None where the server does not say."""
    try:
        cards = {card.id: card for card in await client.models()}
    except EngineError:
        return None
    return cards[served].max_model_len if served in cards else None
