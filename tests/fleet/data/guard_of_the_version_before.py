"""The gate in front of one vLLM server: who may ask for what, and what is in flight.

A copy of this file alone is put on the server's PYTHONPATH as ``panel_guard`` and named with
``--middleware panel_guard.PanelGuard``. Hence only the standard library and Python 3.9.
vLLM's own ``--api-key`` does not cover ``/sleep``, ``/collective_rpc`` and the like (vLLM 0.11 to 0.33,
recorded in transcripts/05-api-key.txt), so what is not listed here needs this launch's secret.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SECRET_VARIABLE = "VLLM_SLEEP_TUI_SECRET"
SECRET_HEADER = b"x-panel-secret"
GATE_PATH = "/panel/gate"

INFERENCE = frozenset(
    [
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/audio/speech",
        "/v2/embed",
        "/v2/rerank",
        "/rerank",
        "/score",
        "/pooling",
        "/classify",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
    ]
)
READ_ONLY = frozenset(
    [
        "/health",
        "/ping",
        "/metrics",
        "/version",
        "/load",
        "/v1/models",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    ]
)
STORED_RESPONSE = re.compile(r"/v1/responses/[A-Za-z0-9_-]+\Z")
STORED_RESPONSE_CANCEL = re.compile(r"/v1/responses/[A-Za-z0-9_-]+/cancel\Z")
LOOPBACK = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?\Z", re.IGNORECASE)
MAX_GATE_BODY = 1024


class PanelGuard:
    """ASGI middleware: an allow-list, a gate for inference, and a count of what is in flight."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._secret = os.environ.get(SECRET_VARIABLE, "").encode()
        self._closed = False
        self._in_flight = 0
        self._last_request: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event: pass it on, answer it, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)  # lifespan
            return
        trusted = self._has_secret(scope)
        refusal = _foreign(scope) or self._unlisted(scope, trusted)
        if refusal:
            await _refuse(scope, send, refusal)
        elif _spelling(scope) == GATE_PATH:
            await self._answer_gate(scope, receive, send)
        elif trusted or not _is_inference(_spelling(scope)):
            await self._app(scope, receive, send)
        elif self._closed:
            await _reply_closed(send)
        else:
            await self._count(scope, receive, send)

    def _has_secret(self, scope: Scope) -> bool:
        given = _header(scope, SECRET_HEADER)
        # Without a secret of its own the guard trusts nobody.
        return bool(self._secret) and len(given) == 1 and hmac.compare_digest(given[0], self._secret)

    def _unlisted(self, scope: Scope, trusted: bool) -> str:
        path = _spelling(scope)
        listed = scope["type"] == "http" and (_is_inference(path) or _is_read_only(path))
        if trusted or listed:
            return ""
        return "This address is for the panel only: it needs the X-Panel-Secret of this launch."

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._in_flight += 1
        self._last_request = time.time()
        try:
            # Returns when the answer is complete or, because vLLM watches for it, the client has gone.
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._last_request = time.time()

    async def _answer_gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            wanted = _closed_in(await _body(receive))
            if wanted is None:
                message = 'The body must be {"closed": true} or {"closed": false}.'
                await _reply(send, 400, _error(400, "BadRequestError", message))
                return
            self._closed = wanted
        elif scope["method"] != "GET":
            await _reply(send, 405, _error(405, "MethodNotAllowed", "Use GET or POST."))
            return
        state = {"closed": self._closed, "in_flight": self._in_flight, "last_request": self._last_request}
        await _reply(send, 200, state)


def _spelling(scope: Scope) -> str:
    """The path as it came over the wire, so that no %-encoding can stand for a listed path."""
    raw = scope.get("raw_path")
    if raw is None:
        return str(scope.get("path", ""))
    return bytes(raw).split(b"?", 1)[0].decode("latin-1")


def _is_inference(path: str) -> bool:
    return path in INFERENCE or STORED_RESPONSE.match(path) is not None


def _is_read_only(path: str) -> bool:
    # Cancelling an answer helps a gate that waits for it.
    return path in READ_ONLY or STORED_RESPONSE_CANCEL.match(path) is not None


def _header(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope.get("headers", ()) if key.lower() == name]


def _foreign(scope: Scope) -> str:
    """Why a request is not from this machine's own programs, or an empty string."""
    hosts = [value.decode("latin-1") for value in _header(scope, b"host")]
    # A name that resolves to 127.0.0.1 is how a web page gets at a loopback server.
    if len(hosts) != 1 or not LOOPBACK.match(hosts[0]):
        return "The Host header must be 127.0.0.1, localhost or [::1]: this server is for this machine only."
    for origin in _header(scope, b"origin"):
        scheme, _, host = origin.decode("latin-1").partition("://")
        if scheme.lower() not in ("http", "https") or not LOOPBACK.match(host):
            return "A web page of another site may not use this server."
    if b"cross-site" in [value.lower() for value in _header(scope, b"sec-fetch-site")]:
        return "A web page of another site may not use this server."
    return ""


async def _body(receive: Receive) -> bytes:
    body = b""
    while len(body) <= MAX_GATE_BODY:
        message = await receive()
        if message["type"] != "http.request":
            break
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body
    return b""


def _closed_in(body: bytes) -> bool | None:
    try:
        closed = json.loads(body)["closed"]
    except (ValueError, TypeError, KeyError):
        return None
    return closed if isinstance(closed, bool) else None


def _error(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def _refuse(scope: Scope, send: Send, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    await _reply(send, 403, _error(403, "Forbidden", message))


async def _reply_closed(send: Send) -> None:
    message = "The model is asleep or about to sleep. Try again, or wake it in vllm-sleep-tui."
    await _reply(send, 503, _error(503, "ServiceUnavailable", message), (b"retry-after", b"1"))


async def _reply(
    send: Send,
    status: int,
    payload: dict[str, Any],
    *headers: tuple[bytes, bytes],
) -> None:
    body = json.dumps(payload).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})
