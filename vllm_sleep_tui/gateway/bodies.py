"""Bodies of requests: read once into one piece of memory, and what they say of the model and of streaming."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from vllm_sleep_tui.gateway.replies import Receive, Refusal

PART_SECONDS = 60.0
"""For the next part of a body to come."""
SLICE = 128 * 1024
"""Bytes that are given to the kernel at a time: what it does not take, asyncio copies."""
LARGE = 1024 * 1024
"""From here on a body is looked at in a thread: all others wait meanwhile."""
FORM_MODEL = re.compile(rb'[; ]name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n')
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Gone(Exception):  # noqa: N818 - it says what happened
    """The client has left."""


class _Peek(msgspec.Struct):
    model: Any = None
    stream: Any = None


_peek = msgspec.json.Decoder(_Peek)


@dataclass(slots=True)
class Body:
    """A whole body, and what it asks for."""

    content: bytearray
    size: int
    """Bytes that it came with."""
    model: str | None
    streams: bool
    is_form: bool

    def rename(self, served: str) -> None:
        """Ask for the model by the name that its server knows; all else stays as it was written."""
        if self.is_form:
            found = FORM_MODEL.search(self.content)
            if found is not None:
                self.content[found.start(1) : found.end(1)] = served.encode()
            return
        values = msgspec.json.decode(self.content, type=dict[str, msgspec.Raw])
        values["model"] = msgspec.Raw(msgspec.json.encode(served))
        renamed = msgspec.json.encode(values)
        del values  # it looks into the content, which cannot change meanwhile
        self.content[:] = renamed

    def slices(self) -> Sequence[bytes]:
        """The body in pieces that are written one after another; a small one is one."""
        if len(self.content) <= SLICE:
            return [bytes(self.content)]
        return _Slices(self.content)


class _Slices(Sequence[bytes]):
    """Pieces of a large body, cut out when they are written."""

    def __init__(self, whole: bytearray) -> None:
        self._whole = whole

    def __len__(self) -> int:
        return -(-len(self._whole) // SLICE)

    def __getitem__(self, index: Any) -> Any:
        return bytes(memoryview(self._whole)[index * SLICE : (index + 1) * SLICE])

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))


class Store:
    """The memory that all bodies together may take."""

    def __init__(self, longest: int, together: int) -> None:
        self._longest = longest
        self._together = together
        self.held = 0

    async def read(self, receive: Receive, length: int | None) -> bytearray:
        """Read a body, `length` bytes if it says so. Raises Refusal if it is too long, Gone with its client.

        It counts until `release`; not if this raises.
        """
        if length is not None and length > self._longest:
            raise self._too_long()
        content = bytearray()
        while True:
            try:
                async with asyncio.timeout(PART_SECONDS):
                    message = await receive()
            except TimeoutError:
                self.held -= len(content)
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "The request's body did not arrive.") from None
            if message["type"] != "http.request":
                self.held -= len(content)
                raise Gone
            part = message.get("body", b"")
            if len(content) + len(part) > self._longest or self.held + len(part) > self._together:
                is_longest = len(content) + len(part) > self._longest
                self.held -= len(content)
                raise self._too_long() if is_longest else self._too_many()
            content += part
            self.held += len(part)
            if not message.get("more_body", False):
                return content

    def release(self, content: bytearray, size: int) -> None:
        """A body that came with this size is not held any longer; once is enough."""
        if content:
            self.held -= size
            content.clear()

    def _too_long(self) -> Refusal:
        limit = f"{self._longest >> 20} MiB" if self._longest >> 20 else f"{self._longest} bytes"
        message = f"The request is longer than {limit} (`gateway: {{max_body: …}}`)."
        return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)

    def _too_many(self) -> Refusal:
        message = "The requests that wait hold all the memory that they may have. Try again."
        return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after=5)


async def understand(content: bytearray, content_type: bytes) -> Body:
    """What a body asks for; raises Refusal if it is no JSON object, nor a form, nor empty."""
    if not content:
        return Body(content, 0, None, streams=False, is_form=False)
    if content_type.lower().startswith(b"multipart/form-data"):
        found = FORM_MODEL.search(content)
        model = found[1].decode(errors="replace") if found else None
        return Body(content, len(content), model or None, streams=False, is_form=True)
    try:
        decode = _peek.decode
        peek = await asyncio.to_thread(decode, content) if len(content) > LARGE else decode(content)
    except NOT_JSON:
        raise Refusal(HTTPStatus.BAD_REQUEST, "The request's body is no JSON object.") from None
    if peek.model is not None and not isinstance(peek.model, str):
        raise Refusal(HTTPStatus.BAD_REQUEST, "`model` must be the name of a model.")
    return Body(content, len(content), peek.model or None, streams=peek.stream is True, is_form=False)
