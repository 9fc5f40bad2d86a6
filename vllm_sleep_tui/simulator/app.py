"""The ASGI application: routes, the API key, the caller's middlewares, and what becomes of exceptions."""

from __future__ import annotations

import asyncio
import hmac
import importlib
import time
from collections.abc import Awaitable, Callable, Sequence

from vllm_sleep_tui.simulator import http
from vllm_sleep_tui.simulator.admin import Admin
from vllm_sleep_tui.simulator.behaviours import Fault
from vllm_sleep_tui.simulator.client import EngineDead
from vllm_sleep_tui.simulator.http import Answer, AsgiApp, Receive, Request, Scope, Send
from vllm_sleep_tui.simulator.inference import ClientLeft, Inference
from vllm_sleep_tui.simulator.server_state import ServerState

Handler = Callable[[Request], Awaitable[Answer]]
GUARDED_PREFIXES = ("/v1", "/v2", "/inference", "/cohere")
"""The only paths that vLLM's API key guards (05-api-key.txt)."""

COMPLETIONS = "/v1/completions"
BUSY_SECONDS = 8.0
"""Longer than a client waits for the guard."""


class Application:
    """All routes of one server."""

    def __init__(self, server: ServerState) -> None:
        self._server = server
        self._inference = Inference(server)
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/load"): self._load,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi,
            **self._inference.routes(),
        }
        if server.settings.dev_mode:
            self._routes |= Admin(server).routes()
        self._paths = {path for _, path in self._routes}

    @property
    def routes(self) -> Sequence[tuple[str, str]]:
        """Method and path of each route."""
        return tuple(self._routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises what no handler of vLLM's takes."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        request = Request(scope, receive)
        answer = await self._answer(request)
        if answer is None:
            return
        known = request.path if request.path in self._paths else "none"
        self._server.metrics.record_answer(known, request.method, answer.status)
        if answer.chunks is None:
            await http.send_answer(answer, send)
            if request.path == COMPLETIONS and self._server.faults.use(Fault.API_SERVER_BUSY):
                compute(BUSY_SECONDS)
        else:
            await self._stream(answer, request, send)

    async def _stream(self, answer: Answer, request: Request, send: Send) -> None:
        # Watching for the client's leaving frees the place of a stream that waits for its first token.
        sending = asyncio.create_task(http.send_answer(answer, send))
        leaving = asyncio.create_task(request.watch())
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await http.end_tasks(sending, leaving)

    async def _answer(self, request: Request) -> Answer | None:
        handler = self._routes.get((request.method, request.path))
        if handler is None:
            return self._lost(request)
        await request.read()
        try:
            return await handler(request)
        except http.HttpError as error:
            return error.answer
        except EngineDead as dead:
            return http.error(500, str(dead))
        except ClientLeft:
            return None

    def _lost(self, request: Request) -> Answer:
        allowed = [method for method, path in self._routes if path == request.path]
        if allowed:
            return http.detail(405, "Method Not Allowed", allow=", ".join(allowed))
        if request.path.endswith("/") and request.path.rstrip("/") in self._paths:
            location = f"http://{request.headers.get('host', '')}{request.path.rstrip('/')}"
            return Answer(status=307, headers={"location": location})
        return http.detail(404, "Not Found")

    async def _health(self, request: Request) -> Answer:
        return http.empty(503 if self._server.engine.dead.is_set() else 200)

    async def _version(self, request: Request) -> Answer:
        return http.as_json({"version": self._server.settings.version})

    async def _load(self, request: Request) -> Answer:
        tracked = self._server.options.load_tracking
        return http.as_json({"server_load": self._inference.in_flight if tracked else 0})

    async def _metrics(self, request: Request) -> Answer:
        engine = self._server.engine
        held = sum(len(generation.prompt) + generation.made for generation in engine.generations.values())
        content = self._server.metrics.render(
            running=engine.running, held_tokens=held if engine.running else 0
        )
        return http.text(content, "text/plain; version=1.0.0; charset=utf-8")

    async def _openapi(self, request: Request) -> Answer:
        paths: dict[str, dict[str, object]] = {}
        for method, path in self._routes:
            paths.setdefault(path, {})[method.lower()] = {
                "responses": {"200": {"description": "Successful Response"}}
            }
        info = {"title": "FastAPI", "version": "0.1.0"}
        return http.as_json({"openapi": "3.1.0", "info": info, "paths": paths})


def compute(seconds: float) -> None:
    """Keep the processor busy and hear nobody, as vLLM's API server over a long prompt."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class ApiKeyMiddleware:
    """vLLM's own guard, with its gaps: OPTIONS and every path outside the prefixes pass."""

    def __init__(self, app: AsgiApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass on."""
        if (
            scope["type"] == "http"
            and scope["method"] != "OPTIONS"
            and scope["path"].startswith(GUARDED_PREFIXES)
        ):
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            known = [hmac.compare_digest(key, wanted) for wanted in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                await http.send_answer(http.as_json({"error": "Unauthorized"}, 401), send, vary=False)
                return
        await self._app(scope, receive, send)


class ErrorMiddleware:
    """The outermost layer: answers 500 and raises on, upon which the server drops the connection."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; as Starlette, it tells every layer which application it belongs to."""
        scope["app"] = self
        try:
            await self._app(scope, receive, send)
        except http.Unhandled as error:
            await http.send_answer(http.error(500, str(error)), send, vary=False)
            raise


async def _lifespan(receive: Receive, send: Send) -> None:
    """The lifespan protocol, in which nothing happens; the middlewares see it pass."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def wrap(app: AsgiApp, *, keys: Sequence[str], middlewares: Sequence[str]) -> AsgiApp:
    """The application in its layers; a middleware named later is further out, as Starlette stacks them."""
    if keys:
        app = ApiKeyMiddleware(app, keys)
    for name in middlewares:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, type):
            raise ValueError(f"Invalid middleware {name}. Must be a function or a class.")
        app = found(app)
    return ErrorMiddleware(app)
