"""What `status` asks of a server that we did not start, by the standard library and without a loop.

Each call raises OSError (TimeoutError among them), HTTPException, ValueError or EngineStranger.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from vllm_sleep_tui.engine import endpoints
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.engine.metrics import Page

if TYPE_CHECKING:
    from vllm_sleep_tui.upstream import Check

MAX_BYTES = 2**20
"""Of an answer that are read; a page of metrics has 60 kB."""
CLOSED = frozenset({401, 403, 404, 405})
"""How a server says that an endpoint is not there, or not for us."""


class PlainClient:
    """One server at `base_url`, a new connection for each call, `seconds` for all of them together.

    `check` looks at each connection before anything, such as the key, is sent over it.
    """

    def __init__(self, base_url: str, seconds: float, *, api_key: str | None, check: Check | None) -> None:
        parts = urlsplit(base_url)
        self.where = parts.netloc
        self._is_https = parts.scheme == "https"
        self._prefix = parts.path
        self._headers = {"accept": "*/*"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        self._check = check
        self._deadline = time.monotonic() + seconds
        self._connection: http.client.HTTPConnection | None = None

    def is_sleeping(self, share: float) -> tuple[int, bool | None]:
        """The status, and whether it sleeps where that is 200; takes at most that share of what is left."""
        status, body = self._get(endpoints.IS_SLEEPING, share)
        return status, _IsSleeping.of(body) if status == HTTPStatus.OK else None

    def health(self) -> int:
        """The status of its health."""
        return self._get(endpoints.HEALTH)[0]

    def models(self) -> int:
        """The status of its list of models, for which vLLM wants the key (05-api-key.txt)."""
        return self._get(endpoints.MODELS)[0]

    def metrics(self) -> Page:
        """Its page of metrics; an empty one where it refuses."""
        status, body = self._get(endpoints.METRICS)
        text = body.decode(errors="replace") if status == HTTPStatus.OK else ""
        return Page.read(text, time.monotonic())

    def hang_up(self) -> None:
        """Break off what is still being read, in another thread."""
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _get(self, path: str, share: float = 1.0) -> tuple[int, bytes]:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        kind = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
        self._connection = connection = kind(self.where, timeout=left * share)
        try:
            connection.connect()
            if self._check is not None:
                self._check(connection.sock)
            connection.request("GET", self._prefix + path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read(MAX_BYTES)
        finally:
            connection.close()


class _IsSleeping(msgspec.Struct):
    is_sleeping: bool

    @classmethod
    def of(cls, body: bytes) -> bool:
        try:
            return msgspec.json.decode(body, type=cls).is_sleeping
        except NOT_JSON as error:
            raise ValueError(str(error)) from None
