"""uvicorn's HTTP server with a bound on what a client may send before its request begins."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 * 1024
"""Of a request line and its headers; httptools itself has no limit."""
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """One connection; a head that never ends is answered 431 and hung up on."""

    _is_in_head = True
    _is_all_head = True
    """Whether what has just come neither ended a head nor belongs to a body."""
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Some bytes of the client's."""
        self._is_all_head = self._is_in_head
        super().data_received(data)
        if self._is_all_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(TOO_LONG)
                self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._is_in_head, self._is_all_head, self._head_bytes = False, False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head may come."""
        self._is_in_head = True
        super().on_message_complete()
