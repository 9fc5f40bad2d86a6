"""HTTP to one server, with as little between the call and the socket as httpx allows.

httpx's transport is used without its client: redirects, cookies and events of the client would cost
0.3 ms a call (measured), and a switch makes six calls within 5 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

import httpx

from vllm_sleep_tui.engine.failures import EngineRefused, broken_off, refused, timed_out, unreachable

KEEP_ALIVE_SECONDS = 4.0
"""Less than vLLM's own 5 s (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`), so that we hang up first."""
FRESH_SECONDS = 3.0
"""For so long after a good answer a kept connection is sure to be open still."""
LATE_SECONDS = 0.3
"""A limit that is noticed so late says nothing of the server: this process was stopped, by Ctrl-Z say."""
REUSED_BODY_BYTES = 512
REUSED_REQUESTS = 64
MAX_ANSWER_BYTES = 16 * 1024 * 1024
BROKEN = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    body: bytes


class Wire:
    """Connections to one server."""

    def __init__(self, base_url: str) -> None:
        base = httpx.URL(base_url)
        # Certificates take 20 ms to read; loopback needs none.
        verify = base.scheme == "https"
        pooled = httpx.Limits(max_keepalive_connections=8, keepalive_expiry=KEEP_ALIVE_SECONDS)
        self.where = f"{base.host}:{base.port}" if base.port else base.host
        self._base = str(base).rstrip("/")
        self._requests: dict[tuple[str, str, bytes | None, int], tuple[object, httpx.Request]] = {}
        # A proxy variable must not carry loopback traffic away: transports read no environment.
        self._pool = httpx.AsyncHTTPTransport(verify=verify, trust_env=False, limits=pooled)
        single = httpx.Limits(max_keepalive_connections=0)
        self._single = httpx.AsyncHTTPTransport(verify=verify, trust_env=False, limits=single)
        self._fresh_until = 0.0

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
        except httpx.ConnectError:
            raise unreachable(self.where, name) from None
        except httpx.TransportError:
            raise broken_off(self.where, name) from None

    async def _attempt(self, request: httpx.Request, repeatable: bool) -> Answer:
        if repeatable or asyncio.get_running_loop().time() < self._fresh_until:
            try:
                return await self._on_kept(request)
            except BROKEN:
                if not repeatable:
                    raise
                # The kept connection had been closed; once more on a new one.
        return await _exchange(self._single, request)

    async def _on_kept(self, request: httpx.Request) -> Answer:
        self._fresh_until = 0.0
        answer = await _exchange(self._pool, request)
        if answer.status == 200:
            self._fresh_until = asyncio.get_running_loop().time() + FRESH_SECONDS
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
        response: httpx.Response | None = None
        try:
            response = await self._single.handle_async_request(request)
            if response.status_code != 200:
                raise refused(response.status_code, await _read(response))
            async for part in _stream_of(response):
                yield part
        except httpx.ConnectError:
            raise unreachable(self.where, name) from None
        except httpx.TransportError:
            raise broken_off(self.where, name) from None
        finally:
            if response is not None:
                await response.aclose()

    def _request(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> httpx.Request:
        if body is not None and len(body) > REUSED_BODY_BYTES:
            return httpx.Request(method, self._base + target, headers=headers, content=body)
        # The same few calls come again and again; to make one anew costs 0.1 ms.
        key = (method, target, body, id(headers))
        known = self._requests.get(key)
        if known is None or known[0] is not headers:
            known = (headers, httpx.Request(method, self._base + target, headers=headers, content=body))
            if len(self._requests) < REUSED_REQUESTS:
                self._requests[key] = known
        return known[1]

    async def aclose(self) -> None:
        """Close every connection."""
        await self._pool.aclose()
        await self._single.aclose()


def _name(request: httpx.Request) -> str:
    return f"{request.method} {request.url.path}"


def _stream_of(response: httpx.Response) -> httpx.AsyncByteStream:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream


async def _exchange(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> Answer:
    response = await transport.handle_async_request(request)
    try:
        return Answer(response.status_code, await _read(response))
    finally:
        await response.aclose()


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    async for part in _stream_of(response):
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            limit = MAX_ANSWER_BYTES >> 20
            raise EngineRefused(response.status_code, f"the answer is longer than {limit} MiB")
    return bytes(body)
