"""uvicorn's HTTP server with bounds on what clients may send, and hold open, before a request begins."""

from __future__ import annotations

import asyncio
import resource
from functools import cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 * 1024
"""Of a request line and its headers; httptools itself has no limit."""
HEAD_SECONDS = 30.0
"""For a head to arrive once a connection is made."""
MOST_FILES = 16384
"""Open files that this process wants; a soft limit of 1024, as is usual, is too few for 500 streams."""
SPARE_FILES = 256
"""Of them, those that are left to the fleet in the same process."""
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


@cache
def most_connections() -> int:
    """How many clients may be connected: each needs a second file, to the server of its model."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, (wanted - SPARE_FILES) // 2)


class BoundedProtocol(HttpToolsProtocol):
    """One connection; a head that never ends is answered 431 and hung up on, as is one that never comes."""

    _is_in_head = True
    _is_all_head = True
    """Whether what has just come neither ended a head nor belongs to a body."""
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected; one too many is told so."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.write(TOO_MANY)
            transport.close()
        else:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of the client's."""
        self._is_all_head = self._is_in_head
        super().data_received(data)
        if self._is_all_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(TOO_LONG)
                self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins, on a connection that was kept too."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stop_timer()
        self._is_in_head, self._is_all_head, self._head_bytes = False, False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head may come."""
        self._is_in_head = True
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
