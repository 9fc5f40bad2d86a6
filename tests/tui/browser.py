"""A headless Chromium, spoken to by its own protocol: no driver beside it is needed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome-stable"))), None
)
DEADLINE = 60.0


class Page:
    """One tab: what it asked for, and what its WebSockets got."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self.asked: list[str] = []
        """The addresses of all its requests."""
        self.received = b""

    async def read(self) -> None:
        """Take what Chromium says next, waiting for it a little."""
        with contextlib.suppress(TimeoutError):
            message = json.loads(await self._socket.receive_str(timeout=0.2))
            parameters = message.get("params", {})
            if "id" in message:
                self._answers[message["id"]] = message
            elif message["method"] == "Network.requestWillBeSent":
                self.asked.append(parameters["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                self.asked.append(parameters["url"])
            elif message["method"] == "Network.webSocketFrameReceived":
                frame = parameters["response"]
                if frame["opcode"] == 2:
                    self.received += base64.b64decode(frame["payloadData"])

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Read until a condition holds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen"
            await self.read()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask Chromium to do something; its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        await self.until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def value(self, expression: str) -> Any:
        """What an expression is on the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def press(self, text: str) -> None:
        """Type letters."""
        for letter in text:
            for kind in ("keyDown", "keyUp"):
                more = {"text": letter} if kind == "keyDown" else {}
                await self.call("Input.dispatchKeyEvent", type=kind, key=letter, **more)

    async def picture(self, path: Path) -> None:
        """Keep what is seen as a PNG."""
        result = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(result["data"]))


@asynccontextmanager
async def opened(address: str, folder: Path) -> AsyncIterator[Page]:
    """Chromium, with a profile of its own in `folder`, at an address."""
    assert CHROMIUM is not None
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--window-size=1280,800",
    ]
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={folder}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the command may be a script that starts it
    )
    try:
        where = folder / "DevToolsActivePort"
        deadline = time.monotonic() + DEADLINE
        while not (where.exists() and where.read_text().count("\n")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            await asyncio.sleep(0.05)
        port = where.read_text().split("\n")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tab = next(one for one in await answer.json() if one["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Network", "Page", "Runtime"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=address)
                yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE)
