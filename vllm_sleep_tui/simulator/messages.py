"""Anthropic's shape of a chat, as vLLM has it at `/v1/messages`: made of the chat of OpenAI's clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

STOPS = {"stop": "end_turn", "length": "max_tokens"}


def as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same question for `/v1/chat/completions`."""
    system = body.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) else []
    kept = {name: value for name, value in body.items() if name not in ("system", "messages")}
    return {**kept, "messages": [*first, *body.get("messages", ())]}


def as_message(chat: Mapping[str, Any]) -> dict[str, Any]:
    """The whole answer of a chat."""
    choice = chat["choices"][0]
    return {
        "id": chat["id"],
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": choice["message"]["content"]}],
        "model": chat["model"],
        "stop_reason": STOPS.get(choice["finish_reason"], "end_turn"),
        "stop_sequence": None,
        "usage": {
            "input_tokens": chat["usage"]["prompt_tokens"],
            "output_tokens": chat["usage"]["completion_tokens"],
        },
    }


async def as_events(chunks: AsyncIterator[bytes], model: str) -> AsyncIterator[bytes]:
    """The events of a streamed chat; an error among them is passed on as one."""
    usage = {"input_tokens": 0, "output_tokens": 0}
    message: dict[str, Any] = {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": model,
    }
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
    yield _event("message_start", message=message)
    yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    stop, count = None, 0
    async for chunk in chunks:
        payload = chunk.removeprefix(b"data: ").strip()
        if payload == b"[DONE]":
            break
        event = json.loads(payload)
        if "error" in event:
            yield _event("error", error={"type": "api_error", "message": event["error"]["message"]})
            return
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                count += 1
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
            stop = choice["finish_reason"] or stop
    yield _event("content_block_stop", index=0)
    delta = {"stop_reason": STOPS.get(stop or "", "end_turn"), "stop_sequence": None}
    yield _event("message_delta", delta=delta, usage={"output_tokens": count})
    yield _event("message_stop")


def _event(kind: str, **content: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n".encode()
