"""What the gateway itself answers: refusals in the shape that the client's library reads, and JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON_TYPE = b"application/json"
SSE_TYPE = b"text/event-stream; charset=utf-8"
ANTHROPIC_PATH = "/v1/messages"
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(Exception):  # noqa: N818 - it is an answer
    """A request that goes no further, and why."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after = retry_after


def error_body(refusal: Refusal, path: str) -> bytes:
    """The refusal as Anthropic's clients read it on their path, as OpenAI's do elsewhere."""
    kind = _KINDS.get(refusal.status, "api_error")
    if path.startswith(ANTHROPIC_PATH):
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": refusal.message}})
    error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
    return msgspec.json.encode({"error": error})


def error_event(refusal: Refusal, path: str) -> bytes:
    """The same in the middle of a stream of events, whose status was 200 long before."""
    name = b"event: error\n" if path.startswith(ANTHROPIC_PATH) else b""
    return name + b"data: " + error_body(refusal, path) + b"\n\n"


async def refuse(send: Send, refusal: Refusal, path: str) -> None:
    """Answer with it; what is not read of the request's body goes with its connection."""
    headers = [] if refusal.retry_after is None else [(b"retry-after", b"%d" % max(1, refusal.retry_after))]
    if refusal.status is HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    await reply(send, refusal.status, error_body(refusal, path), headers=headers)


async def reply(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = JSON_TYPE,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """A whole answer."""
    fixed = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": int(status), "headers": fixed + (headers or [])})
    await send({"type": "http.response.body", "body": body})


async def reply_json(send: Send, content: object) -> None:
    """A 200 with JSON."""
    await reply(send, HTTPStatus.OK, msgspec.json.encode(content))
