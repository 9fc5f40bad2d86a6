"""HTTP and WebSocket of the panel in a browser, on loopback alone.

Whoever comes must know the token of this run, which the link holds; a page of another site is refused
besides. Each tab gets a panel, as a process of its own that ends with it, just as a panel in a terminal does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import textual_serve
from aiohttp import WSMsgType, web
from textual_serve.app_service import AppService
from textual_serve.download_manager import DownloadManager

from vllm_sleep_tui.engine import endpoints
from vllm_sleep_tui.errors import OperationError

HOST = "127.0.0.1"
MAX_PANELS = 8
"""At once; each is a process of some 60 MiB."""
MAX_MESSAGE = 1024 * 1024
"""Bytes that one message of a tab may have: a large paste."""
MAX_CELLS = 1000
"""Columns or rows that a tab may ask for."""
END_SECONDS = 5.0
"""For a panel to end, which takes 3 s at most once it has begun; then it is killed."""
PAGES = {"": "page.html", "page.css": "page.css", "page.js": "page.js"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    # textual.js makes style elements; its own page would load a font from elsewhere, ours loads nothing.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PanelService(AppService):
    """The panel of one tab."""

    def __init__(self, arguments: Sequence[str], tab: web.WebSocketResponse) -> None:
        super().__init__(
            "",
            write_bytes=tab.send_bytes,
            write_str=tab.send_str,
            close=self._close_tab,
            download_manager=DownloadManager(),
        )
        self._arguments = arguments
        self._tab = tab

    async def _close_tab(self) -> None:
        await self._tab.close()

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        """Textual's own would go through a shell."""
        environment = self._build_environment(width, height)
        environment.pop("TMUX", None)  # what is copied belongs to the browser, not to who started the server
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=environment,
            start_new_session=True,  # Ctrl+C is for the server: to a panel it would mean to stop its starts
        )
        self._stdin = self._process.stdin
        return self._process

    async def run(self) -> None:
        """Pass on what the panel draws; whichever way it ends, its tab says so."""
        try:
            await super().run()
        finally:
            await self._tab.close()

    async def stop(self) -> None:
        """End the panel as a terminal that hangs up does: whoever comes next carries its starts on."""
        process, task = self._process, self._task
        if process is None or task is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGHUP)
        try:
            await asyncio.wait_for(process.wait(), END_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(task, return_exceptions=True)


class PanelServer:
    """Serves panels that are started by `arguments`; one that ends with its `run`."""

    def __init__(self, arguments: Sequence[str], port: int) -> None:
        """Raises OperationError if the port is taken; 0 is a free one."""
        self._arguments = arguments
        self._token = secrets.token_urlsafe(32)
        self._panels: set[PanelService] = set()
        self._socket = socket.socket()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((HOST, port))
            self._socket.listen()  # whoever opens the link at once waits, and is not refused
        except OSError as error:
            raise OperationError(
                f"Port {port} cannot be opened: {os.strerror(error.errno or 0)}.", "Name another with --port."
            ) from None
        self._authority = f"{HOST}:{self._socket.getsockname()[1]}"

    @property
    def link(self) -> str:
        """What to open; it holds the key."""
        return f"http://{self._authority}/#token={self._token}"

    async def run(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP."""
        app = web.Application(middlewares=[self._guarded])
        statics = Path(textual_serve.__file__).parent / "static"
        app.add_routes(
            [
                *(web.get(f"/{path}", self._page) for path in PAGES),
                web.get("/ws/{token}", self._panel),
                web.static("/static", statics),
            ]
        )
        app.on_shutdown.append(self._end_panels)
        ends, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, ends.set)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=END_SECONDS)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        await ends.wait()
        await runner.cleanup()

    async def _end_panels(self, _: web.Application) -> None:
        await asyncio.gather(*(panel.stop() for panel in self._panels))

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The guard's rules, and a tab of another port of this machine is another site too."""
        headers = [(name.lower(), value) for name, value in request.raw_headers]
        foreign = endpoints.why_foreign({"headers": headers})
        origin = request.headers.get("Origin")
        if not foreign and origin is not None and origin != f"http://{request.host}":
            foreign = "A page of another port may not use this server."
        if foreign:
            return web.Response(status=403, text=foreign, headers=HEADERS)
        try:
            answer = await handler(request)
        except web.HTTPException as error:
            error.headers.update(HEADERS)
            raise
        if not answer.prepared:
            answer.headers.update(HEADERS)
        return answer

    async def _page(self, request: web.Request) -> web.Response:
        name = PAGES[request.path[1:]]
        text = resources.files("vllm_sleep_tui.web").joinpath(name).read_text("utf-8")
        return web.Response(text=text, content_type=TYPES[Path(name).suffix])

    async def _panel(self, request: web.Request) -> web.StreamResponse:
        if not secrets.compare_digest(request.match_info["token"].encode(), self._token.encode()):
            return web.Response(status=403, text="The link's key is not of this run.")
        if len(self._panels) >= MAX_PANELS:
            return web.Response(status=503, text=f"{MAX_PANELS} panels are open already.")
        tab = web.WebSocketResponse(heartbeat=15, max_msg_size=MAX_MESSAGE)
        panel = PanelService(self._arguments, tab)
        self._panels.add(panel)
        try:
            await tab.prepare(request)
            await panel.start(_cells(request.query.get("width"), 80), _cells(request.query.get("height"), 24))
            async for message in tab:
                if message.type is WSMsgType.TEXT:
                    await _pass_on(message.data, panel, tab)
        finally:
            try:
                await panel.stop()
            finally:
                self._panels.discard(panel)
        return tab


async def _pass_on(text: str, panel: PanelService, tab: web.WebSocketResponse) -> None:
    """Do what a tab says; what is not of its language is dropped."""
    try:
        said: Any = json.loads(text)
        kind, *rest = said
        if kind == "stdin":
            await panel.send_bytes(rest[0].encode())
        elif kind == "resize":
            await panel.set_terminal_size(_cells(rest[0]["width"], 80), _cells(rest[0]["height"], 24))
        elif kind == "ping":
            await tab.send_json(["pong", rest[0]])
        elif kind == "focus":
            await panel.focus()
        elif kind == "blur":
            await panel.blur()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass


def _cells(said: object, otherwise: int) -> int:
    """A number of columns or rows that a terminal can have."""
    try:
        return min(max(int(str(said)), 1), MAX_CELLS)
    except ValueError:
        return otherwise
