"""A streamed chat answer: what is asked for, and its events as deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from vllm_sleep_tui.engine.answers import CallDelta, TokenChance
from vllm_sleep_tui.engine.failures import (
    NOT_JSON,
    EngineError,
    EngineRefused,
    broken_off,
    refused,
    timed_out,
    unreadable,
)

REQUEST = "POST /v1/chat/completions"
NO_TEMPLATE = "you must provide a chat template"
NO_CHAT = "does not support Chat Completions"
NOT_MULTIMODAL = "is not a multimodal model"
"""vLLM 0.24 to 0.32 (source; recorded on 0.32): 400 before anything is looked at."""
TEMPLATE_CURE = (
    "Add `chat-template: FILE` (Jinja) to its `args:` and restart it, or take its instruct version."
)
SEES_CURE = "Ask a model that sees, or leave the pictures out."
OPEN, CLOSE = "<think>", "</think>"
MAX_EVENT_BYTES = 4 * 1024 * 1024
"""An event holds some tokens; what goes on for longer without an end is no stream of events."""


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """One event of an answer; the token counts are totals so far, None where the event has none.

    `finish_reason` "abort" means that the server was put to sleep or paused meanwhile.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    chances: tuple[TokenChance, ...] = ()
    """Of each token, where `logprobs` were asked for."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Logprobs(msgspec.Struct):
    content: tuple[TokenChance, ...] | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # its name up to vLLM 0.14
    tool_calls: tuple[_Call, ...] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Chunk)


def chat_body(messages: Sequence[Mapping[str, Any]], model: str, params: Mapping[str, Any]) -> bytes:
    """The request: streamed, with running token counts; `params` (temperature, …) go on top."""
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return msgspec.json.encode(
        {"model": model, "messages": messages, **params, "stream": True, "stream_options": usage}
    )


def with_pictures(text: str, urls: Sequence[str]) -> list[dict[str, Any]]:
    """A message's content with pictures, each a `data:` URL."""
    said = [{"type": "text", "text": text}] if text else []
    return [*said, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


class Thinking:
    """Takes the `<think>` block at the beginning of an answer's text for reasoning, as what it is.

    A server without a reasoning parser leaves it there. Anywhere else, or never closed in an answer that came
    to its end, those marks are words of the answer. Nothing that was fed is lost.
    """

    def __init__(self) -> None:
        self._held = ""
        self._thought: list[str] | None = None
        """What stood in the block so far; None before it."""
        self._is_over = False

    def feed(self, delta: ChatDelta) -> tuple[str, str]:
        """The text and the reasoning of one more delta, as far as they can be told apart."""
        if delta.reasoning and self._thought is None:
            self._is_over = True  # the server tells them apart itself
        text, self._held = self._held + delta.text, ""
        if self._is_over:
            return text, delta.reasoning
        if self._thought is None:
            words = text.lstrip()
            if OPEN.startswith(words[: len(OPEN)]) and len(words) < len(OPEN):
                self._held = text
                return "", ""
            if not words.startswith(OPEN):
                self._is_over = True
                return text, ""
            self._thought, text = [], words[len(OPEN) :]
        return self._inside(text)

    def _inside(self, text: str) -> tuple[str, str]:
        assert self._thought is not None
        thought, closed, answer = text.partition(CLOSE)
        if closed:
            self._is_over = True
            return answer.lstrip("\n"), thought
        keep = next((size for size in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:size])), 0)
        self._held = text[len(text) - keep :]
        self._thought.append(text[: len(text) - keep])
        return "", self._thought[-1]

    def end(self, finish_reason: str | None) -> tuple[str, str]:
        """The rest, as no more comes."""
        held, self._held = self._held, ""
        if self._is_over or self._thought is None:
            return held, ""
        if finish_reason == "stop":
            return OPEN + "".join(self._thought) + held, ""
        return "", held


def refusal(error: EngineError) -> EngineError:
    """The failure of a chat in a person's words, where vLLM's own do not say what to do."""
    if not isinstance(error, EngineRefused):
        return error
    if NO_TEMPLATE in error.message:
        return EngineError(
            "The model has no chat template, so vLLM cannot make a prompt of a chat.", TEMPLATE_CURE
        )
    if NOT_MULTIMODAL in error.message:
        return EngineError("This model reads text alone: its server takes no pictures.", SEES_CURE)
    # Its server has routes for its own task alone (vLLM 0.24 to 0.32, source).
    if NO_CHAT in error.message or (error.status == 404 and error.message == "Not Found"):
        return EngineError(
            "This model does not chat: it embeds, ranks or classifies.",
            "Ask it at POST /v1/embeddings, /rerank or /classify of its port.",
        )
    return error


async def deltas(
    parts: AsyncGenerator[bytes, None], where: str, *, first_timeout: float, stall_timeout: float
) -> AsyncGenerator[ChatDelta, None]:
    """The deltas of a stream of server-sent events; one that ends early raises EngineUnreachable.

    EngineTimeout is raised if no event comes for `first_timeout` seconds, or `stall_timeout` after the first.
    An error in the middle is a last delta with `error` set: its status was 200 long before.
    """
    pending = b""
    loop = asyncio.get_running_loop()
    limit = first_timeout
    deadline = loop.time() + limit
    async with aclosing(parts):
        while (part := await _before(deadline, parts, where, limit)) is not None:
            *lines, pending = (pending + part).split(b"\n")
            if len(pending) > MAX_EVENT_BYTES:
                raise unreadable(REQUEST, pending)
            for payload in _payloads(lines):
                if payload == b"[DONE]":
                    return
                delta = _delta(payload)
                yield delta
                if delta.error is not None:
                    return
                # Only an event moves the limit: vLLM sends comments while its engine stands still, too.
                limit = stall_timeout
                deadline = loop.time() + limit
    raise broken_off(where, REQUEST)


async def _before(
    deadline: float, parts: AsyncGenerator[bytes, None], where: str, limit: float
) -> bytes | None:
    """The next part; None at the end. Raises EngineTimeout, which names `limit`, at the loop's `deadline`."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(parts, None)
    except TimeoutError:
        raise timed_out(where, REQUEST, limit) from None


def _payloads(lines: Sequence[bytes]) -> Iterator[bytes]:
    # vLLM sends one data line per event; anything else is a comment that keeps the line open.
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip()


def _delta(payload: bytes) -> ChatDelta:
    try:
        chunk = _decoder.decode(payload)
    except NOT_JSON:
        raise unreadable(REQUEST, payload) from None
    if chunk.error is not None:
        return ChatDelta(error=refused(200, payload).message)
    choice = chunk.choices[0] if chunk.choices else _Choice()
    usage = chunk.usage or _Usage()
    return ChatDelta(
        text=choice.delta.content or "",
        reasoning=choice.delta.reasoning or choice.delta.reasoning_content or "",
        calls=_calls(choice.delta.tool_calls) if choice.delta.tool_calls else (),
        chances=(choice.logprobs.content or ()) if choice.logprobs is not None else (),
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _calls(calls: tuple[_Call, ...]) -> tuple[CallDelta, ...]:
    functions = [(call, call.function or _Function()) for call in calls]
    return tuple(
        CallDelta(
            index=call.index,
            id=call.id or "",
            name=function.name or "",
            arguments=function.arguments or "",
        )
        for call, function in functions
    )
