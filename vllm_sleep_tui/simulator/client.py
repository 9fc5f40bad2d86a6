"""The API server's side of the engine: calls that wait for their answer, and streams of tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINE_LIMIT = 1 << 26
"""Bytes of one message; log-probabilities of a long prompt are long."""
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class EngineDead(Exception):  # noqa: N818 - named as vLLM's EngineDeadError reads
    """The engine is gone; every call and stream ends with this."""

    def __init__(self) -> None:
        super().__init__(DEAD)


class CallFailed(Exception):  # noqa: N818 - the engine's refusal
    """The engine answered a call with an exception; the text is vLLM's."""


@dataclass
class Generation:
    """One request on its way through the engine."""

    id: str
    prompt: list[int]
    begun: float = field(default_factory=time.monotonic)
    messages: asyncio.Queue[Mapping[str, Any] | None] = field(default_factory=asyncio.Queue)
    made: int = 0
    first: float | None = None
    last: float | None = None

    async def next(self) -> Mapping[str, Any]:
        """The next tokens; raises EngineDead."""
        message = await self.messages.get()
        if message is None:
            raise EngineDead
        now = time.monotonic()
        self.made += len(message["texts"])
        self.first = self.first or now
        self.last = now
        return message


class EngineClient:
    """One connection to the engine, used by every request of this server."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._writer: asyncio.StreamWriter | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self.generations: dict[str, Generation] = {}
        self.running = 0
        self.dead = asyncio.Event()

    async def run(self) -> None:
        """Carry messages until the engine ends; then fail all that wait."""
        self._socket.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=LINE_LIMIT)
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except ConnectionError:
            pass
        self.dead.set()
        self.running = 0
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDead())
        for generation in self.generations.values():
            generation.messages.put_nowait(None)

    async def call(self, do: str, **arguments: object) -> Any:
        """Ask the engine; the call is carried out even if nobody waits for its answer any more."""
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        self._send({"do": do, "call": number, **arguments})
        try:
            return await future
        finally:
            del self._calls[number]

    def tell(self, do: str, **arguments: object) -> None:
        """Say something that has no answer."""
        if not self.dead.is_set():
            self._send({"do": do, **arguments})

    def generate(self, id_: str, prompt: list[int], **arguments: object) -> Generation:
        """Start a request; raises EngineDead."""
        generation = Generation(id_, prompt)
        self._send({"do": "add", "request": id_, "prompt": prompt, **arguments})
        self.generations[id_] = generation
        return generation

    def abort(self, id_: str) -> None:
        """Forget a request, and let the engine forget it."""
        if self.generations.pop(id_, None) is not None:
            self.tell("abort", request=id_)

    def abort_all_here(self) -> None:
        """End every open stream with an abort, without the engine, which is about to be killed."""
        for generation in self.generations.values():
            generation.messages.put_nowait({"texts": [], "finish": "abort"})

    def go_silent(self) -> None:
        """Let open streams hang: nobody tells them that the engine is gone."""
        self.generations.clear()

    def _send(self, message: Mapping[str, object]) -> None:
        if self.dead.is_set() or self._writer is None:
            raise EngineDead
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _take(self, message: Mapping[str, Any]) -> None:
        if "running" in message:
            self.running = message["running"]
        elif "request" in message:
            if generation := self.generations.get(message["request"]):
                generation.messages.put_nowait(message)
        elif (future := self._calls.get(message["call"])) is not None and not future.done():
            if "error" in message:
                future.set_exception(CallFailed(message["error"]))
            else:
                future.set_result(message["result"])
