"""HTTP to one server, with as little between the call and the socket as possible, and to nobody else.

httpx's core is used without its client: redirects, cookies and events of the client would cost 0.3 ms a call
(measured), and a switch makes six calls within 5 ms. The core also lets us look at each new connection before
a byte goes over it: whoever has the port of a server that is down would hear the key or the prompt.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass

import httpcore
import httpx

from vllm_sleep_tui.engine.failures import (
    EngineRefused,
    EngineUnreachable,
    broken_off,
    no_way_in,
    refused,
    timed_out,
    unreachable,
)

KEEP_ALIVE_SECONDS = 4.0
"""Less than vLLM's own 5 s (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`), so that we hang up first."""
FRESH_SECONDS = 3.0
"""For so long after a good answer a kept connection is sure to be open still."""
LATE_SECONDS = 0.3
"""A limit that is noticed so late says nothing of the server: this process was stopped, by Ctrl-Z say."""
REUSED_BODY_BYTES = 512
"""The calls of a switch have less; a chat's body is another each time, and not worth keeping."""
REUSED_REQUESTS = 64
"""More than there are different calls to one server."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""The longest that we ask for, a page of metrics, has 60 kB; a stranger may send without an end."""
BROKEN = (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError)
FAILED = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)
Check = Callable[[socket.socket], None]
"""Looks who is at the other end of a fresh connection; raises EngineStranger if nothing may be sent there.

OSError is a connection that broke meanwhile. For TCP it runs in a thread: it reads the kernel's tables."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    body: bytes


class Wire:
    """Connections to one server: to its address, or over `uds`, a unix socket; all of them pass `check`."""

    def __init__(self, base_url: str, *, uds: str | None = None, check: Check | None = None) -> None:
        base = httpx.URL(base_url)
        self.where = f"{base.host}:{base.port}" if base.port else base.host
        self._uds = uds
        self._base = str(base).rstrip("/")
        self._requests: dict[tuple[str, str, bytes | None, int], tuple[object, httpcore.Request]] = {}
        # Certificates take 20 ms to read; loopback needs none.
        tls = httpx.create_ssl_context(trust_env=False) if base.scheme == "https" else None

        def pool(kept: int) -> httpcore.AsyncConnectionPool:
            # A proxy variable must not carry loopback traffic away: the core reads no environment.
            return httpcore.AsyncConnectionPool(
                ssl_context=tls,
                max_connections=100,
                max_keepalive_connections=kept,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
                uds=uds,
                network_backend=_Network(check),
            )

        self._pool, self._single = pool(8), pool(0)
        self._fresh_until = 0.0
        self.has_answered = False
        """Whether anything came back yet: the first call of a process pays for imports and connections."""

    async def call(
        self,
        method: str,
        target: str,
        *,
        timeout: float,
        headers: Mapping[str, str],
        body: bytes | None = None,
        repeatable: bool = True,
    ) -> Answer:
        """Send one request and read its answer within `timeout` seconds in all; seconds that pass while
        this process is stopped do not count if it is `repeatable`.

        A request that is not `repeatable` is never sent twice and gets a connection of its own, unless a
        kept one gave a good answer just now: vLLM closes idle ones after 5 s and any after a 500, and a
        break on a kept one does not tell whether the request arrived.
        """
        request = self._request(method, target, headers, body)
        name = _name(request)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            try:
                async with asyncio.timeout(timeout):
                    return await self._attempt(request, repeatable)
            except TimeoutError:
                if not repeatable or loop.time() < began + timeout + LATE_SECONDS:
                    raise
            async with asyncio.timeout(timeout):
                return await self._attempt(request, repeatable)
        except TimeoutError:
            raise timed_out(self.where, name, timeout) from None
        except httpcore.ConnectError:
            raise self._unreachable(name) from None
        except FAILED:
            raise broken_off(self.where, name) from None

    async def _attempt(self, request: httpcore.Request, repeatable: bool) -> Answer:
        if repeatable or asyncio.get_running_loop().time() < self._fresh_until:
            try:
                return await self._on_kept(request)
            except BROKEN:
                if not repeatable:
                    raise
                # The kept connection had been closed; once more on a new one.
        return await self._exchange(self._single, request)

    async def _on_kept(self, request: httpcore.Request) -> Answer:
        self._fresh_until = 0.0
        answer = await self._exchange(self._pool, request)
        if answer.status == 200:
            self._fresh_until = asyncio.get_running_loop().time() + FRESH_SECONDS
        return answer

    async def _exchange(self, pool: httpcore.AsyncConnectionPool, request: httpcore.Request) -> Answer:
        response = await pool.handle_async_request(request)
        try:
            answer = Answer(response.status, await _read(response))
        finally:
            await response.aclose()
        self.has_answered = True
        return answer

    async def stream(
        self, target: str, *, headers: Mapping[str, str], body: bytes
    ) -> AsyncGenerator[bytes, None]:
        """POST `body` and yield the answer as it comes; an error answer raises EngineRefused.

        It has no limit of its own: only who reads the parts knows which of them are progress. Closing the
        generator closes the connection, which makes vLLM abort the request.
        """
        request = self._request("POST", target, headers, body)
        name = _name(request)
        response: httpcore.Response | None = None
        try:
            response = await self._single.handle_async_request(request)
            if response.status != 200:
                raise refused(response.status, await _read(response))
            async for part in _stream_of(response):
                yield part
        except httpcore.ConnectError:
            raise self._unreachable(name) from None
        except FAILED:
            raise broken_off(self.where, name) from None
        finally:
            if response is not None:
                await response.aclose()

    def _unreachable(self, request: str) -> EngineUnreachable:
        if self._uds is not None and not os.path.exists(self._uds):
            return no_way_in(self._uds, request)
        return unreachable(self.where, request)

    def _request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> httpcore.Request:
        if body is not None and len(body) > REUSED_BODY_BYTES:
            return self._new_request(method, target, headers, body)
        # The same few calls come again and again; to make one anew costs 0.1 ms.
        key = (method, target, body, id(headers))
        cached = self._requests.get(key)
        if cached is None or cached[0] is not headers:
            cached = (headers, self._new_request(method, target, headers, body))
            if len(self._requests) < REUSED_REQUESTS:
                self._requests[key] = cached
        return cached[1]

    def _new_request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> httpcore.Request:
        made = httpx.Request(method, self._base + target, headers=headers, content=body)
        url = httpcore.URL(
            scheme=made.url.raw_scheme,
            host=made.url.raw_host,
            port=made.url.port,
            target=made.url.raw_path,
        )
        return httpcore.Request(method, url, headers=made.headers.raw, content=body)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._pool.aclose()
        await self._single.aclose()


class _Network(httpcore.AsyncNetworkBackend):
    """Opens connections as httpx's core does, and has each looked at before anything is sent over it."""

    def __init__(self, check: Check | None) -> None:
        self._inner = httpcore.AnyIOBackend()
        self._check = check

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the host."""
        stream = await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return await self._checked(stream)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the socket."""
        return await self._checked(await self._inner.connect_unix_socket(path, timeout, socket_options))

    async def sleep(self, seconds: float) -> None:
        """Between attempts, of which there are none."""
        await self._inner.sleep(seconds)

    async def _checked(self, stream: httpcore.AsyncNetworkStream) -> httpcore.AsyncNetworkStream:
        if self._check is not None:
            connection = stream.get_extra_info("socket")
            try:
                if connection.family == socket.AF_UNIX:
                    self._check(connection)
                else:
                    await asyncio.to_thread(self._check, connection)
            except OSError as error:
                await stream.aclose()
                raise httpcore.ConnectError(str(error)) from error
            except BaseException:
                await stream.aclose()
                raise
        return stream


def _name(request: httpcore.Request) -> str:
    return f"{request.method.decode()} {request.url.target.decode().partition('?')[0]}"


def _stream_of(response: httpcore.Response) -> AsyncIterator[bytes]:
    assert isinstance(response.stream, AsyncIterable)
    return aiter(response.stream)


async def _read(response: httpcore.Response) -> bytes:
    body = bytearray()
    async for part in _stream_of(response):
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            limit = MAX_ANSWER_BYTES >> 20
            raise EngineRefused(response.status, f"the answer is longer than {limit} MiB")
    return bytes(body)
