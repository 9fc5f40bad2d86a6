"""HTTP to one server, with as little between the call and the socket as possible, and to nobody else.

A switch makes seven calls within 5 ms of their own, so that what a client spends on each of them counts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from vllm_sleep_tui.engine.failures import (
    EngineRefused,
    EngineUnreachable,
    broken_off,
    no_way_in,
    refused,
    timed_out,
    unreachable,
)
from vllm_sleep_tui.upstream import Address, Check, NoConnectionError, Upstream, UpstreamError
from vllm_sleep_tui.upstream import Answer as Coming

FRESH_SECONDS = 3.0
"""For so long after a good answer a kept connection is sure to be open still."""
LATE_SECONDS = 0.3
"""A limit that is noticed so late says nothing of the server: this process was stopped, by Ctrl-Z say."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""The longest that we ask for, a page of metrics, has 60 kB; a stranger may send without an end."""
PORTS = {"http": 80, "https": 443}
IN_PATHS = "/%:@!$&'()*+,;=~"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    body: bytes


class Wire:
    """Connections to one server: to its address, or over `uds`, a unix socket; all of them pass `check`."""

    def __init__(self, base_url: str, *, uds: str | None = None, check: Check | None = None) -> None:
        parts = urlsplit(base_url)
        host, usual = parts.hostname or "", PORTS.get(parts.scheme)
        port = None if parts.port == usual else parts.port
        self.where = f"{host}:{port}" if port else host
        self._uds = uds
        self._prefix = quote(parts.path.rstrip("/"), safe=IN_PATHS)
        name = f"[{host}]" if ":" in host else _ascii(host)
        self._host = f"{name}:{port}" if port else name
        # A proxy variable must not carry loopback traffic away: none is read here.
        address = Address(uds=uds, host=host, port=port or usual or 80, tls=parts.scheme == "https")
        self._upstream = Upstream(address, check)
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
        head, name = self._head(method, target, headers, body), _name(method, target)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            try:
                async with asyncio.timeout(timeout):
                    return await self._exchange(head, body or b"", repeatable)
            except TimeoutError:
                if not repeatable or loop.time() < began + timeout + LATE_SECONDS:
                    raise
            async with asyncio.timeout(timeout):
                return await self._exchange(head, body or b"", repeatable)
        except TimeoutError:
            raise timed_out(self.where, name, timeout) from None
        except NoConnectionError:
            raise self._unreachable(name) from None
        except UpstreamError:
            raise broken_off(self.where, name) from None

    async def _exchange(self, head: bytes, body: bytes, repeatable: bool) -> Answer:
        on_kept = repeatable or asyncio.get_running_loop().time() < self._fresh_until
        self._fresh_until = 0.0
        coming = await self._upstream.send(head, (body,), on_kept=on_kept, repeats=repeatable)
        try:
            answer = Answer(coming.status, await _read(coming))
        finally:
            coming.close()
        self.has_answered = True
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
        head, name = self._head("POST", target, headers, body), _name("POST", target)
        coming: Coming | None = None
        try:
            coming = await self._upstream.send(head, (body,), on_kept=False)
            if coming.status != 200:
                raise refused(coming.status, await _read(coming))
            async for part in coming.parts():
                yield part
        except NoConnectionError:
            raise self._unreachable(name) from None
        except UpstreamError:
            raise broken_off(self.where, name) from None
        finally:
            if coming is not None:
                coming.close()

    def _unreachable(self, request: str) -> EngineUnreachable:
        if self._uds is not None and not os.path.exists(self._uds):
            return no_way_in(self._uds, request)
        return unreachable(self.where, request)

    def _head(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        """The request's head; what is in it is ours, or was checked where it came from."""
        lines = [f"{method} {self._prefix}{target} HTTP/1.1", f"host: {self._host}"]
        lines += [f"{key}: {value}" for key, value in headers.items()]
        if body is not None or method == "POST":
            lines.append(f"content-length: {len(body or b'')}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    async def aclose(self) -> None:
        """Close every connection."""
        self._upstream.close()
        await asyncio.sleep(0)  # asyncio closes them in its next round


def _name(method: str, target: str) -> str:
    return f"{method} {target.partition('?')[0]}"


def _ascii(host: str) -> str:
    """A host's name as it is sent; as it is where it can be none."""
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return quote(host)


async def _read(coming: Coming) -> bytes:
    body = bytearray()
    async for part in coming.parts():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            limit = MAX_ANSWER_BYTES >> 20
            raise EngineRefused(coming.status, f"the answer is longer than {limit} MiB")
    return bytes(body)
