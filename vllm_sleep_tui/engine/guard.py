"""The gate in front of one vLLM server: who may ask for what, and what is in flight.

A copy of this file alone is put on the server's PYTHONPATH as ``panel_guard`` and named with
``--middleware panel_guard.PanelGuard``. Hence only the standard library and Python 3.9, and vLLM's uvicorn.
vLLM's own ``--api-key`` does not cover ``/sleep``, ``/collective_rpc`` and the like (vLLM 0.11 to 0.33,
recorded in transcripts/05-api-key.txt), so over TCP only what is listed here is answered. The panel comes in
by a unix socket in the launch's private folder: whoever can open it is this user, and no secret is sent that
another program, on the port before vLLM is, could hear.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SOCKET_VARIABLE = "SLEEP_TUI_SOCKET"
"""The path of the panel's socket. Ray's workers, maybe on other machines, get what starts with VLLM_."""
CLIENT_HEADER = b"x-panel-client"
"""On the panel's socket: the request is a client's; it counts as in flight, and a closed gate refuses it."""
GATE_PATH = "/panel/gate"
GATE_CLOSED = b"x-panel-gate"
"""A header of the answer that a closed gate gives: the request has not reached the model."""
INSIDE = "panel_guard.inside"
"""A key of a scope that no client can set: the request came by the panel's socket."""

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
"""Bytes; {"closed": true} has 16."""
BODY_SECONDS = 30.0
"""For the body of a request to arrive, and a second more for each BODY_RATE bytes of it that did."""
BODY_RATE = 16384
"""Bytes a second: less than any line that people work over."""
MAX_HELD = 2**30
"""Bytes of all bodies together that wait for their ends; anybody on this machine may send one."""
TOUCH_SECONDS = 600.0
"""Cleaners of /tmp go by age, in days or hours, and nothing else touches a socket that is only used."""
ENDING_SECONDS = 1
"""For answers under way on the panel's socket when the server ends."""


class PanelGuard:
    """ASGI middleware: an allow-list, a gate for inference, and a count of what is in flight."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._closed = False
        self._in_flight = 0
        self._held = 0
        self._last_request: float | None = None
        self._door: _Door | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event: pass it on, answer it, or refuse it."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        inside = scope.get(INSIDE) is True
        trusted = inside and not _header(scope, CLIENT_HEADER)
        refusal = why_foreign(scope) or _unlisted(scope, trusted)
        if refusal:
            await _refuse(scope, send, refusal)
        elif _spelling(scope) == GATE_PATH:
            await self._answer_gate(scope, receive, send)
        elif trusted:
            await self._app(scope, receive, send)
        else:
            await self._serve_client(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server's life: the panel's socket opens with its start and closes with its end."""

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self._door is not None:
                await self._door.close()
            return message

        async def watched_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    self._door = _Door(scope.get("app", self))
                except (OSError, KeyError) as error:
                    # Without it nobody can drive this server; uvicorn ends it with these words in the log.
                    why = f"The panel's socket cannot be opened: {error!r}"
                    message = {"type": "lifespan.startup.failed", "message": why}
            await send(message)

        await self._app(scope, watched_receive, watched_send)

    async def _serve_client(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a listed request of a client, once its body is there and if the gate is open then."""
        if not is_inference(_spelling(scope)):
            await self._app(scope, receive, send)
            return
        if self._closed:
            await _reply_closed(send)
            return
        # Until its body is complete it is no work of the model's: no drain waits for it.
        taken: collections.deque[Message] = collections.deque()
        try:
            is_whole = await self._take_body(receive, taken)
        except _NoBody as error:
            payload = _error(error.status, error.kind, error.message)
            await _reply(send, error.status, payload, (b"connection", b"close"))
            return
        finally:
            # From here on it is the application's, which takes it at once, or nobody's.
            self._held -= sum(map(_size, taken))
        if not is_whole:
            return
        if self._closed:
            await _reply_closed(send)
        else:
            await self._count(scope, _replay(taken, receive), send)

    async def _take_body(self, receive: Receive, taken: collections.deque[Message]) -> bool:
        """Take the messages of a body, each counted as held; False if the client left before its end.

        Raises _NoBody if it comes too slowly or if too much is held already.
        """
        deadline = time.monotonic() + BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:  # noqa: UP041 - the built-in one only from Python 3.11 on
                why = f"The request's body did not arrive in time: {BODY_SECONDS:.0f} s are for a short one."
                raise _NoBody(408, "RequestTimeout", why) from None
            if message["type"] != "http.request":
                return False
            if self._held + _size(message) > MAX_HELD:
                why = f"The bodies that are arriving together are larger than {MAX_HELD} bytes. Try again."
                raise _NoBody(413, "RequestEntityTooLarge", why)
            self._held += _size(message)
            taken.append(message)
            if not message.get("more_body", False):
                return True
            deadline += _size(message) / BODY_RATE

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


class _NoBody(Exception):  # noqa: N818 - it says what happened
    """A request that goes no further, and the answer to it."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message


class _Door:
    """The panel's way in: the whole application once more, on a unix socket of this user alone."""

    def __init__(self, app: App) -> None:
        """Open it; raises OSError or KeyError if that fails."""
        import uvicorn  # there is no vLLM without it

        path = os.environ[SOCKET_VARIABLE]
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(128)
        except OSError:
            listener.close()
            raise

        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            scope[INSIDE] = True
            await app(scope, receive, send)

        # log_config and access_log as they are: both belong to the whole process, and vLLM has set them.
        config = uvicorn.Config(
            inside,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            proxy_headers=False,
            timeout_graceful_shutdown=ENDING_SECONDS,
        )
        self._server = uvicorn.Server(config)
        # Signals are the outer server's: older uvicorns set handlers by the one, newer by the other.
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        self._touching = asyncio.ensure_future(_touch(path))

    async def close(self) -> None:
        """Let answers under way end, for ENDING_SECONDS, and stop."""
        self._touching.cancel()
        self._server.should_exit = True
        await asyncio.wait({self._serving}, timeout=ENDING_SECONDS + 1)


async def _touch(path: str) -> None:
    """Keep a socket and its folder young, for as long as they are there."""
    while True:
        for name in (path, os.path.dirname(path)):
            with contextlib.suppress(OSError):
                os.utime(name)
        await asyncio.sleep(TOUCH_SECONDS)


def _spelling(scope: Scope) -> str:
    """The path as it came over the wire, so that no %-encoding can stand for a listed path."""
    raw = scope.get("raw_path")
    if raw is None:
        return str(scope.get("path", ""))
    return bytes(raw).split(b"?", 1)[0].decode("latin-1")


def _unlisted(scope: Scope, trusted: bool) -> str:
    """Why a request is not for everybody, or an empty string."""
    path = _spelling(scope)
    if trusted or (scope["type"] == "http" and (is_inference(path) or is_read_only(path))):
        return ""
    return "This address is for the panel only, which has a way in of its own."


def is_inference(path: str) -> bool:
    """Whether a closed gate refuses it."""
    return path in INFERENCE or is_stored(path)


def is_stored(path: str) -> bool:
    """Whether it is an answer that the server has kept."""
    return STORED_RESPONSE.match(path) is not None


def is_read_only(path: str) -> bool:
    """Whether anybody may ask for it at any time."""
    # Cancelling an answer helps a gate that waits for it.
    return path in READ_ONLY or STORED_RESPONSE_CANCEL.match(path) is not None


def _header(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope.get("headers", ()) if key.lower() == name]


def why_foreign(scope: Scope) -> str:
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


def _size(message: Message) -> int:
    return len(message.get("body", b""))


def _replay(taken: collections.deque[Message], receive: Receive) -> Receive:
    """What was `taken`, none of it kept, then what comes."""

    async def again() -> Message:
        return taken.popleft() if taken else await receive()

    return again


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
    await _reply(
        send,
        503,
        _error(503, "ServiceUnavailable", message),
        (b"retry-after", b"1"),
        (GATE_CLOSED, b"closed"),
    )


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
