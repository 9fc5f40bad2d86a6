"""Connections to the servers of models: one request out, its answer in, byte for byte and with back pressure.

httpx and httpcore cost 0.5 ms of CPU a request and more (docs/gateway.md), and 0.2 s to import; here is
httptools' parser on asyncio's own transports and nothing between. Each new connection is looked at before a
byte goes over it: whoever has the port of a server that is down would hear the key or the prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import cast

import httptools

HeaderList = list[tuple[bytes, bytes]]
Check = Callable[[socket.socket], None]
"""Looks who is at the other end of a fresh connection; raises a PanelError if nothing may be sent there.

OSError is a connection that broke meanwhile. For TCP it runs in a thread: it reads the kernel's tables."""

KEEP_ALIVE_SECONDS = 4.0
"""Less than vLLM's own 5 s (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`), so that we hang up first."""
KEPT = 64
"""Idle connections to one server."""
HIGH_WATER = 256 * 1024
"""Bytes of an answer that wait for a slow client; more are left in the kernel, and so in the server."""
WRITE_HIGH_WATER = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
CONNECT_SECONDS = 10.0
EYEBALLS_SECONDS = 0.25
"""After which the next address of a host is tried beside the first (RFC 8305 recommends this)."""
FULL_SECONDS = 0.01
"""Between two tries for a unix socket on which more wait to be accepted than it has room for."""


class UpstreamError(Exception):
    """The server could not be reached, or broke off."""

    def __init__(self, what: str, *, sent: bool) -> None:
        super().__init__(what)
        self.sent = sent
        """Whether the server may have seen the request."""


class NoConnectionError(UpstreamError):
    """There is nobody who takes a connection, or nobody any more."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a unix socket, or host and port."""

    uds: str | None = None
    host: str = ""
    port: int = 0
    tls: bool = False


class Upstream:
    """The connections to one server; each new one passes `check` before a byte goes over it."""

    def __init__(self, address: Address, check: Check | None = None) -> None:
        self.address = address
        self._check = check
        self._idle: deque[tuple[float, _Connection]] = deque()
        self._is_closed = False

    async def send(
        self, head: bytes, body: Sequence[bytes], *, on_kept: bool = True, repeats: bool = True
    ) -> Answer:
        """Send one request and read the head of its answer; raises UpstreamError.

        A kept connection that turns out to be closed costs one more try on a new one, if it `repeats`. If
        that is not to be had either, the server may have died of the request.
        """
        may_be_sent = False
        while on_kept and (connection := self._kept()) is not None:
            try:
                return await self._exchange(connection, head, body)
            except UpstreamError:
                if connection.has_heard or not repeats:
                    raise
                may_be_sent = True
        try:
            connection = await self._connect()
        except UpstreamError as error:
            error.sent = may_be_sent
            raise
        return await self._exchange(connection, head, body)

    def close(self) -> None:
        """Close what is idle now, and what is in use when it ends."""
        self._is_closed = True
        while self._idle:
            self._idle.pop()[1].abort()

    async def _exchange(self, connection: _Connection, head: bytes, body: Sequence[bytes]) -> Answer:
        try:
            await connection.send(head, body)
            await connection.head()
        except BaseException:
            connection.abort()
            raise
        return Answer(self, connection)

    def _kept(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            since, connection = self._idle.pop()
            if connection.is_open and now - since < KEEP_ALIVE_SECONDS:
                return connection
            connection.abort()
        return None

    def _keep(self, connection: _Connection) -> None:
        now = asyncio.get_running_loop().time()
        if self._is_closed or connection.is_paused or not connection.is_reusable or len(self._idle) >= KEPT:
            connection.abort()
            return
        self._idle.append((now, connection))
        while self._idle and now - self._idle[0][0] > KEEP_ALIVE_SECONDS:
            self._idle.popleft()[1].abort()

    async def _connect(self) -> _Connection:
        loop, address = asyncio.get_running_loop(), self.address
        connection: _Connection
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if address.uds is not None:
                    plain = await _connected_to(address.uds)
                    _, connection = await loop.create_unix_connection(_Connection, sock=plain)
                else:
                    tls = _tls() if address.tls else None
                    _, connection = await loop.create_connection(
                        _Connection,
                        address.host,
                        address.port,
                        ssl=tls,
                        happy_eyeballs_delay=EYEBALLS_SECONDS,
                    )
        except (OSError, TimeoutError, UnicodeError) as error:  # the last for a host that is no name
            raise NoConnectionError(f"no connection: {error}", sent=False) from None
        if self._check is not None:
            try:
                await connection.look(self._check)
            except BaseException:
                connection.abort()
                raise
        return connection


@functools.cache
def _tls() -> ssl.SSLContext:
    """The machine's own certificates, which take 20 ms to read."""
    return ssl.create_default_context()


async def _connected_to(path: str) -> socket.socket:
    """A socket that is connected to the unix socket; waits while that has no room for it. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        while True:
            try:
                made.connect(path)
                return made
            except BlockingIOError:  # asyncio takes it for a connection that is under way
                await asyncio.sleep(FULL_SECONDS)
    except BaseException:
        made.close()
        raise


class Answer:
    """The answer to one request: its head, then `parts`. Close it, or take all of it."""

    def __init__(self, upstream: Upstream, connection: _Connection) -> None:
        self._upstream = upstream
        self._connection = connection
        self.status: int = connection.status
        self.headers: HeaderList = connection.headers

    def header(self, name: bytes) -> bytes | None:
        """The first header of that name, in small letters."""
        return next((value for key, value in self.headers if key.lower() == name), None)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises UpstreamError if it breaks off."""
        while (part := await self._connection.part()) is not None:
            yield part

    def close(self) -> None:
        """Give the connection back if the answer is complete, else break it off: vLLM then aborts."""
        if self._connection.is_complete:
            self._upstream._keep(self._connection)
        else:
            self._connection.abort()


class _Connection(asyncio.Protocol):
    """One connection and the answer that comes over it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._parts: deque[bytes] = deque()
        self._buffered = 0
        self._failure: str | None = None
        self._has_head = False
        self._is_too_much = False
        """Whether the server sends more than the answer that was asked for."""
        self._head_bytes = 0
        self.is_paused = False
        self.is_complete = True
        self.is_reusable = True
        self.is_open = True
        self.has_heard = False
        self.status = 0
        self.headers: HeaderList = []

    # ── asyncio ──────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        self.has_heard = True
        if self._parser is None or self.is_complete:
            self._fail("it sent what nobody asked for")
            return
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES + 65536:
                self._fail("the head of its answer is too long")
                return
        try:
            self._parser.feed_data(data)
            if self._is_too_much:
                self._fail("it sent what nobody asked for")
        except httptools.HttpParserUpgrade:
            self._fail("it changed the protocol")
        except httptools.HttpParserError:
            self._fail("its answer is no HTTP")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if error is None and not self.is_complete and self._has_head and self._ends_with_connection():
            self.on_message_complete()
        self._fail("it broke off")
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)

    def pause_writing(self) -> None:
        self._can_write = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)
        self._can_write = None

    # ── httptools ────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        self._is_too_much = self.is_complete  # another answer behind the one that was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:
            self.headers.append((name, value))
            return
        self._head_bytes += len(name) + len(value)  # behind the body, where nobody needs it
        if self._head_bytes > MAX_HEAD_BYTES + 65536:
            self._is_too_much = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self._is_too_much:
            return
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue, 103 Early Hints: the answer comes after it
            self.headers = []
            return
        self.status, self._has_head = status, True
        self._wake()

    def on_body(self, part: bytes) -> None:
        if self._is_too_much:
            return
        self._parts.append(part)
        self._buffered += len(part)
        if self._buffered > HIGH_WATER and not self.is_paused and self._transport is not None:
            self._transport.pause_reading()
            self.is_paused = True
        self._wake()

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self._has_head or self._is_too_much:
            return
        self.is_complete = True
        self.is_reusable = self.is_open and self._parser.should_keep_alive()
        self._wake()

    # ── the exchange ─────────────────────────────────────────────────────────────────────────────────────

    async def look(self, check: Check) -> None:
        """Let `check` see who is at the other end."""
        assert self._transport is not None
        plain = self._transport.get_extra_info("socket")
        try:
            if plain.family == socket.AF_UNIX:
                check(plain)
            else:
                await asyncio.to_thread(check, plain)  # it reads the kernel's tables
        except OSError as error:
            raise NoConnectionError(f"no connection: {error}", sent=False) from None

    async def send(self, head: bytes, body: Sequence[bytes]) -> None:
        """Write a request."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._has_head = self.is_complete = self.has_heard = self._is_too_much = False
        self._head_bytes, self.headers = 0, []
        self._parts.clear()  # of an answer that nobody read to its end
        self._buffered = 0
        if len(body) == 1 and len(body[0]) < 65536:
            self._transport.write(head + body[0])
            return
        self._transport.write(head)
        for part in body:
            self._transport.write(part)
            if self._can_write is not None:
                await self._can_write
            if not self.is_open:
                return  # `head` says what has come, or that it broke off

    async def head(self) -> None:
        """Wait for the status and the headers; raises UpstreamError."""
        while not self._has_head:
            await self._more()

    async def part(self) -> bytes | None:
        """The next part of the body; None at its end. Raises UpstreamError."""
        while not self._parts:
            if self.is_complete:
                return None
            await self._more()
        part = self._parts.popleft() if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._buffered = 0
        if self.is_paused and self._transport is not None and self.is_open:
            self._transport.resume_reading()
            self.is_paused = False
        return part

    def abort(self) -> None:
        """Close it at once."""
        self.is_open = False
        if self._transport is not None:
            with contextlib.suppress(Exception):
                self._transport.abort()

    async def _more(self) -> None:
        if self._failure is not None:
            raise UpstreamError(self._failure, sent=True)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, what: str) -> None:
        if self._failure is None:
            self._failure = what
        self.abort()
        self._wake()

    def _ends_with_connection(self) -> bool:
        """Whether the answer has neither a length nor chunks, so that its end is the connection's."""
        names = {name.lower() for name, _ in self.headers}
        return not names & {b"content-length", b"transfer-encoding"}
