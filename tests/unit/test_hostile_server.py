"""A server that answers with anything at all: each call ends in an answer or in an EngineError."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.chat import ChatDelta
from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.fleet.attached.probe import probe_all
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.upstream import Address, Upstream, UpstreamError

LIMIT = 5.0


class AnyServer:
    """Answers every request on a fresh connection with the same bytes, then hangs up, or does not."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        self.reply = b""
        self.hangs_up = True
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                peer, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(peer, self.reply, self.hangs_up), daemon=True).start()

    def answer(self, peer: socket.socket, reply: bytes, hangs_up: bool) -> None:
        with peer, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request and (part := peer.recv(65536)):
                request += part
            peer.sendall(reply)
            if not hangs_up:
                self.ended.wait(30)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):  # or the reset would swallow the reply
                pass

    def close(self) -> None:
        self.ended.set()
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.thread.join(10)


@pytest.fixture(scope="module")
def server() -> Iterator[AnyServer]:
    made = AnyServer()
    yield made
    made.close()


CALLS: dict[str, Callable[[VllmClient, float], Awaitable[object]]] = {
    "version": lambda client, limit: client.version(limit),
    "models": lambda client, limit: client.models(limit),
    "configured": lambda client, limit: client.configured(limit),
    "metrics": lambda client, limit: client.metrics(limit),
    "is_sleeping": lambda client, limit: client.is_sleeping(limit),
    "sleep": lambda client, limit: client.sleep(1, limit),
    "wake_up": lambda client, limit: client.wake_up(("weights",), timeout=limit),
    "collective_rpc": lambda client, limit: client.collective_rpc("reload_weights", limit),
    "reset_prefix_cache": lambda client, limit: client.reset_prefix_cache(limit),
    "gate": lambda client, limit: client.gate(limit),
    "set_gate": lambda client, limit: client.set_gate(True, limit),
    "complete": lambda client, limit: client.complete((1, 2, 3), model="m", prompt_logprobs=1, timeout=limit),
    "embed": lambda client, limit: client.embed("x", model="m", timeout=limit),
    "chat": lambda client, limit: chat(client, limit),
}


async def chat(client: VllmClient, limit: float) -> list[ChatDelta]:
    asked = client.chat([{"role": "user"}], model="m", first_timeout=limit, stall_timeout=limit)
    async with aclosing(asked) as deltas:
        return [delta async for delta in deltas]


async def try_all(port: int, limit: float = LIMIT) -> dict[str, EngineError | None]:
    """What each call raised."""
    raised: dict[str, EngineError | None] = {}
    async with VllmClient(port, secret="s") as client:
        assert await client.health(limit) in (True, False)
        for name, call in CALLS.items():
            try:
                await call(client, limit)
                raised[name] = None
            except EngineError as error:
                raised[name] = error
    return raised


def check(server: AnyServer, reply: bytes) -> None:
    server.reply, server.hangs_up = reply, True
    for error in asyncio.run(try_all(server.port)).values():
        if error is not None:
            assert all(char.isprintable() or char in "\n\t" for char in f"{error.what}{error.cure}")
            assert len(error.what) < 1000


KEYS = ["data", "choices", "text", "is_sleeping", "version", "results", "paths", "closed", "in_flight"]
MORE = [
    "prompt_logprobs",
    "logprob",
    "delta",
    "content",
    "usage",
    "error",
    "message",
    "type",
    "embedding",
    "id",
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 3),
    st.sampled_from([10**400, -(2**63) - 1, 1e308, float("inf"), float("nan"), "", "\x1b]0;x\x07", "\ud800"]),
    st.text(max_size=5),
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, *MORE]), inner, max_size=4)
    ),
    max_leaves=8,
)
CLOSE = [
    {"data": [{"id": "x", "max_model_len": 10**30, "embedding": [1e999]}]},
    {"choices": [{"text": "", "prompt_logprobs": [None, {"2": {"logprob": 10**400}}, {}]}]},
    {"choices": [{"text": "", "prompt_logprobs": [{"2": None}]}]},
    {"choices": [{"delta": {"content": 3}}], "usage": {"prompt_tokens": 2**70}},
    {"is_sleeping": "no", "version": 3, "paths": [], "closed": 1, "in_flight": -1},
    {"error": {"message": {"a": ["\x1b[2J"]}, "type": 4}},
    {"error": {"message": "x" * 100_000, "type": "T"}},
]
DEEP = b"[" * 200_000
STATUS = st.sampled_from([200, 200, 200, 200, 204, 301, 400, 404, 500, 503, 599])


def answer(status: int, body: bytes, length: int | None = None) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def stream(*payloads: bytes) -> bytes:
    body = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (
        len(body),
        body,
    )


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@settings(max_examples=60)
@given(STATUS, st.sampled_from(CLOSE) | JSON)
@example(200, CLOSE[1])
@example(500, CLOSE[5])
@example(500, CLOSE[6])
def test_json_of_any_shape(server: AnyServer, status: int, value: Any) -> None:
    check(server, answer(status, dumped(value)))


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(JSON.map(dumped), st.sampled_from(CLOSE).map(dumped), st.binary(max_size=20)), max_size=3
    )
)
@example([DEEP])
@example([b'{"error": ' + DEEP])
def test_events_of_any_shape(server: AnyServer, payloads: list[bytes]) -> None:
    check(server, stream(*payloads))


@settings(max_examples=40)
@given(st.binary(max_size=60), STATUS)
@example(DEEP, 200)
@example(DEEP, 500)
@example(b'{"results": ' + DEEP, 200)
@example(b'{"unknown": ' + DEEP, 200)
@example(b"<html><body>502 Bad Gateway</body></html>", 200)
@example(b"\xff\xfe\x00", 200)
def test_bodies_that_are_no_json(server: AnyServer, body: bytes, status: int) -> None:
    check(server, answer(status, body))


@settings(max_examples=40)
@given(
    st.one_of(st.binary(max_size=60), st.binary(max_size=40).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail))
)
@example(b"")
@example(b"HTTP/1.1 200 OK\r\n")
@example(b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n")
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999999999999999\r\n\r\n{}")
@example(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}")
@example(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc")
@example(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n")
@example(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
@example(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000 + b"\r\n")
@example(answer(200, b'{"is_sleeping": tr', 5000))
@example(answer(200, b'{"version": "0.32.0"}', 3))
def test_bytes_that_are_no_http_or_end_too_soon(server: AnyServer, reply: bytes) -> None:
    check(server, reply)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\n", answer(200, b'{"data": [', 5000)])
def test_an_answer_that_never_ends_is_given_up_in_time(server: AnyServer, reply: bytes) -> None:
    server.reply, server.hangs_up = reply, False
    raised = asyncio.run(try_all(server.port, limit=0.1))
    assert all(isinstance(error, EngineError) for error in raised.values())


async def got(server: AnyServer, reply: bytes) -> tuple[int, bytes, int]:
    """Status and body of one answer, and how many headers came with it."""
    server.reply, server.hangs_up = reply, True
    upstream = Upstream(Address(host="127.0.0.1", port=server.port))
    coming = await upstream.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", ())
    try:
        body = b"".join([part async for part in coming.parts()])
        return coming.status, body, len(coming.headers)
    finally:
        coming.close()
        upstream.close()


async def test_a_second_answer_behind_the_first_is_not_taken_for_a_part_of_it(server: AnyServer) -> None:
    assert await got(server, answer(200, b"ok") + answer(500, b"bad")) == (200, b"ok", 1)


async def test_headers_behind_a_body_are_not_kept_and_have_an_end(server: AnyServer) -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
    assert await got(server, chunked + b"x: y\r\n\r\n") == (200, b"ok", 1)
    with pytest.raises(UpstreamError):
        await got(server, chunked + b"x: yyyyyyyy\r\n" * 100_000 + b"\r\n")


@settings(max_examples=60)
@given(
    st.one_of(
        st.binary(max_size=60), st.builds(answer, STATUS, st.one_of(JSON.map(dumped), st.binary(max_size=30)))
    )
)
@example(answer(200, DEEP))
@example(answer(200, b'{"unknown": ' + DEEP))
@example(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000 + b"\r\n")
@example(answer(403, b"{}"))
def test_a_look_at_an_attached_server_that_answers_anything_is_a_probe_result(
    server: AnyServer, reply: bytes
) -> None:
    server.reply, server.hangs_up = reply, True
    far = ModelConfig(url=f"http://127.0.0.1:{server.port}")
    seen = probe_all({"far": far}, LIMIT)["far"]
    assert seen.state in (State.STOPPED, State.AWAKE, State.ASLEEP)
    assert (seen.reason is not None) == (seen.state is State.STOPPED)
