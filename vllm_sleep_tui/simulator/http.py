"""Just enough HTTP on raw ASGI: requests, answers, and vLLM's three shapes of an error."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
REASONS = {
    400: "Bad Request",
    404: "NotFoundError",
    500: "InternalServerError",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, or with `chunks` a stream."""

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    chunks: AsyncIterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpError(Exception):
    """An error in vLLM's shape that the server survives and the connection too."""

    def __init__(self, status: int, message: str, *, kind: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.answer = error(status, message, kind=kind, param=param)


class Unhandled(Exception):  # noqa: N818 - stands for an exception that no handler of vLLM's takes
    """A 500 after which the server closes the connection without saying so (h100/contract.jsonl)."""


def text(content: str, content_type: str = "text/plain; charset=utf-8") -> Answer:
    """A 200 with text."""
    return Answer(body=content.encode(), content_type=content_type)


def empty(status: int = 200) -> Answer:
    """An answer without a body."""
    return Answer(status=status)


def as_json(content: object, status: int = 200) -> Answer:
    """JSON as compact as the real server's."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return Answer(status=status, body=body, content_type="application/json")


def error_body(status: int, message: str, *, kind: str = "", param: str | None = None) -> dict[str, object]:
    """The body of vLLM's own errors; `code` repeats the status."""
    kind = kind or REASONS.get(status, "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error(status: int, message: str, *, kind: str = "", param: str | None = None) -> Answer:
    """One of vLLM's own errors."""
    return as_json(error_body(status, message, kind=kind, param=param), status)


def detail(status: int, message: str, *, allow: str = "") -> Answer:
    """An error of the routing, which has a shape of its own."""
    body = json.dumps({"detail": message}, separators=(",", ":")).encode()
    headers = {"allow": allow} if allow else {}
    return Answer(status=status, body=body, content_type="application/json", headers=headers)


def invalid(kind: str, place: str, message: str, given: str, context: str = "") -> HttpError:
    """A validation error as pydantic words it and vLLM wraps it; always 400."""
    ending = f", 'ctx': {context}" if context else ""
    quoted = f'"{message}"' if "'" in message else f"'{message}'"
    inner = f"{{'type': '{kind}', 'loc': '{place}', 'msg': {quoted}, 'input': '{given}'{ending}}}"
    return HttpError(400, f"1 validation error:\n  {inner}", kind="Bad Request", param=place)


class Request:
    """One request; `gone` is set when the client hangs up."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query = parse_qs(scope.get("query_string", b"").decode(), keep_blank_values=True)
        self.headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.body = b""
        self.gone = asyncio.Event()
        self._receive = receive

    async def read(self) -> None:
        """Take the whole body."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                return

    async def watch(self) -> None:
        """Set `gone` once the client hangs up; run it beside a long answer."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    def json(self) -> dict[str, Any]:
        """The body as an object; raises HttpError in the validation's words."""
        if "application/json" not in self.headers.get("content-type", ""):
            message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
            raise HttpError(400, message, kind="Bad Request")
        if not self.body:
            raise invalid("missing", "body", "Field required", "None")
        try:
            content = json.loads(self.body)
        except ValueError as bad:
            place = getattr(bad, "pos", 0)
            context = f"{{'error': '{getattr(bad, 'msg', bad)}'}}"
            raise invalid(
                "json_invalid", f"body.{place}", "JSON decode error", "<dict of 0 items>", context
            ) from None
        if not isinstance(content, dict):
            raise invalid("model_attributes_type", "body", "Input should be a valid dictionary", str(content))
        return content


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait until all have ended; their errors are their owner's to ask for."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


async def send_answer(answer: Answer, send: Send, *, vary: bool = True) -> None:
    """Put an answer on the wire."""
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    if answer.chunks is None:
        headers.append((b"content-length", str(len(answer.body)).encode()))
    if answer.content_type:
        headers.append((b"content-type", answer.content_type.encode()))
    if vary:
        headers.append((b"vary", b"Origin"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if answer.chunks is None:
        await send({"type": "http.response.body", "body": answer.body})
        return
    # The head goes out before the first chunk: a sleeping server's stream is 200, headers, silence.
    await send({"type": "http.response.body", "body": b"", "more_body": True})
    async with contextlib.aclosing(answer.chunks) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
