"""The client against a server on a real socket that answers as vLLM was recorded to, or not at all."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_sleep_tui.engine.answers import CallDelta
from vllm_sleep_tui.engine.chat import ChatDelta, deltas
from vllm_sleep_tui.engine.client import Completion, Gate, ModelCard, SleepReply, VllmClient, WakeReply
from vllm_sleep_tui.engine.failures import EngineRefused, EngineTimeout, EngineUnreachable
from vllm_sleep_tui.fleet.peer_checks import check_own

DATA = Path(__file__).parent / "data"
SECRET = "the-secret-of-this-launch"


@dataclass
class Request:
    connection: int
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Answers each request with what `replies` has for its method and path, and remembers it."""

    port: int = 0
    replies: dict[str, Reply] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        try:
            while not writer.is_closing():
                request = await read_request(reader, connection)
                self.requests.append(request)
                await self.replies[f"{request.method} {request.target.partition('?')[0]}"](writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()

    def answer(self, what: str, body: Any = b"", status: int = 200) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def reply(writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
            await writer.drain()

        self.replies[what] = reply

    def stream(self, what: str, *parts: bytes, then_hang: bool = False) -> None:
        async def reply(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for part in parts:
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await writer.drain()
            if not then_hang:
                writer.write(b"0\r\n\r\n")

        self.replies[what] = reply

    def say_nothing(self, what: str) -> None:
        async def reply(writer: asyncio.StreamWriter) -> None:
            del writer

        self.replies[what] = reply

    def targets(self) -> list[str]:
        return [f"{request.method} {request.target}" for request in self.requests]


async def read_request(reader: asyncio.StreamReader, connection: int) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, target, _ = head[0].split(" ")
    headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(connection, method, target, headers, body)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    served = Server()
    listener = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    served.port = listener.sockets[0].getsockname()[1]
    yield served
    listener.close()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[VllmClient]:
    async with VllmClient(server.port, secret=SECRET) as client:
        yield client


async def collect(client: VllmClient, **options: Any) -> list[ChatDelta]:
    messages = [{"role": "user", "content": "hi"}]
    options = {"model": "qwen", "first_timeout": 5, **options}
    async with aclosing(client.chat(messages, **options)) as deltas:
        return [delta async for delta in deltas]


async def test_the_level_goes_in_the_query_and_the_reply_is_read(server: Server, client: VllmClient) -> None:
    server.answer("POST /sleep", {"status": "sleeping", "level": 2})

    assert await client.sleep(2, timeout=30) == SleepReply(status="sleeping", level=2)
    assert server.targets() == ["POST /sleep?level=2"]
    assert server.requests[0].headers["x-panel-secret"] == SECRET


async def test_tags_are_repeated_and_never_joined(server: Server, client: VllmClient) -> None:
    server.answer("POST /wake_up", {"status": "sleeping", "tags": ["weights"]})

    assert await client.wake_up(["weights", "kv_cache"], timeout=30) == WakeReply(status="sleeping")
    assert await client.wake_up(timeout=30) == WakeReply(status="sleeping")
    assert server.targets() == ["POST /wake_up?tags=weights&tags=kv_cache", "POST /wake_up"]


async def test_empty_replies_of_older_versions_leave_the_status_unknown(
    server: Server, client: VllmClient
) -> None:
    server.answer("POST /sleep")
    server.answer("POST /wake_up")

    assert await client.sleep(1, timeout=30) == SleepReply()
    assert (await client.wake_up(timeout=30)).status is None


async def test_what_a_server_tells_about_itself_is_read(server: Server, client: VllmClient) -> None:
    card = {"id": "qwen", "object": "model", "root": "Qwen/Qwen3-0.6B", "max_model_len": 4096}
    server.answer("GET /version", {"version": "0.32.0"})
    server.answer("GET /v1/models", {"object": "list", "data": [card, {"id": "alias"}]})
    server.answer("GET /metrics", b"vllm:num_requests_running 0.0\n")
    server.answer("GET /is_sleeping", {"is_sleeping": True})

    assert await client.version() == "0.32.0"
    assert await client.models() == (
        ModelCard(id="qwen", max_model_len=4096),
        ModelCard(id="alias"),
    )
    assert await client.metrics() == "vllm:num_requests_running 0.0\n"
    assert await client.is_sleeping(timeout=1) is True


async def test_the_gate_is_read_and_set(server: Server, client: VllmClient) -> None:
    server.answer("GET /panel/gate", {"closed": False, "in_flight": 2, "last_request": 17.5})
    server.answer("POST /panel/gate", {"closed": True, "in_flight": 0, "last_request": None})

    assert await client.gate() == Gate(closed=False, in_flight=2, last_request=17.5)
    assert await client.set_gate(True) == Gate(closed=True, in_flight=0)
    assert json.loads(server.requests[1].body) == {"closed": True}


async def test_a_call_to_the_workers_gives_one_result_each(server: Server, client: VllmClient) -> None:
    server.answer("POST /collective_rpc", {"results": [None, "x"]})
    server.answer("POST /reset_prefix_cache", {"success": True})

    assert await client.collective_rpc("reload_weights", timeout=30) == [None, "x"]
    assert json.loads(server.requests[0].body) == {"method": "reload_weights", "args": []}
    await client.reset_prefix_cache(timeout=30)


async def test_the_proof_reads_the_figures_of_the_given_tokens_not_of_likelier_ones(
    server: Server, client: VllmClient
) -> None:
    likely = {"9": {"logprob": -0.1, "rank": 1}, "11": {"logprob": -4.5, "rank": 80}}
    only = {"12": {"logprob": -0.25, "rank": 1, "decoded_token": "x"}}
    choice = {"text": " Paris", "finish_reason": "length", "prompt_logprobs": [None, likely, only]}
    server.answer("POST /v1/completions", {"id": "cmpl-1", "choices": [choice]})

    completion = await client.complete([10, 11, 12], model="qwen", timeout=30, prompt_logprobs=1)

    assert completion == Completion(" Paris", "length", (-4.5, -0.25))
    sent = json.loads(server.requests[0].body)
    assert sent["prompt"] == [10, 11, 12]
    assert (sent["max_tokens"], sent["temperature"], sent["prompt_logprobs"]) == (1, 0, 1)


async def test_a_completion_without_figures_has_none(server: Server, client: VllmClient) -> None:
    server.answer("POST /v1/completions", {"choices": [{"text": "a", "prompt_logprobs": None}]})

    assert await client.complete("hi", model="qwen", timeout=30) == Completion("a", None, None)
    assert "prompt_logprobs" not in json.loads(server.requests[0].body)


async def test_an_embedding_is_a_row_of_numbers(server: Server, client: VllmClient) -> None:
    server.answer("POST /v1/embeddings", {"data": [{"index": 0, "embedding": [0.5, -1]}]})

    assert await client.embed("hi", model="e", timeout=30) == (0.5, -1.0)


@pytest.mark.parametrize(
    ("status", "body", "message", "kind"),
    [
        (
            500,
            {"error": {"message": "CUDA Error: out of memory", "type": "InternalServerError", "param": None}},
            "CUDA Error: out of memory",
            "InternalServerError",
        ),
        (401, {"error": "Unauthorized"}, "Unauthorized", None),
        (404, {"detail": "Not Found"}, "Not Found", None),
        (502, b"<html>\x1b[31mbad gateway</html>", "<html>bad gateway</html>", None),
        (503, b"", "no reason given", None),
    ],
)
async def test_every_shape_of_error_is_understood(
    server: Server, client: VllmClient, status: int, body: Any, message: str, kind: str | None
) -> None:
    server.answer("POST /sleep", body, status)

    with pytest.raises(EngineRefused) as refused:
        await client.sleep(1, timeout=30)

    assert (refused.value.status, refused.value.message, refused.value.kind) == (status, message, kind)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("body", [b"hello", b"", b"{}", b'{"is_sleeping": "yes"}', b"\xff"])
async def test_an_answer_that_is_not_vllms_is_refused(
    server: Server, client: VllmClient, body: bytes
) -> None:
    server.answer("GET /is_sleeping", body)

    with pytest.raises(EngineRefused, match="not vLLM's"):
        await client.is_sleeping(timeout=30)


async def test_nobody_listening_is_told_from_an_answer_that_broke_off(free_port: Callable[[], int]) -> None:
    async with VllmClient(free_port()) as client:
        with pytest.raises(EngineUnreachable, match="Nothing answers") as failure:
            await client.sleep(1, timeout=30)
        assert failure.value.sent is False
        assert await client.health() is False


async def test_a_server_that_ends_between_our_connecting_and_the_look_is_not_there(
    server: Server,
) -> None:
    def check(connection: socket.socket) -> None:
        server.connections += 1
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    async with VllmClient(server.port, check=check) as client:
        with pytest.raises(EngineUnreachable, match="Nothing answers"):
            await client.version()
    assert server.requests == []


async def test_a_look_at_the_other_end_of_a_port_holds_nobody_else_up(server: Server) -> None:
    server.answer("GET /version", {"version": "0.32.0"})
    may_go_on = threading.Event()

    def check(connection: socket.socket) -> None:
        assert may_go_on.wait(60)

    async with VllmClient(server.port, check=check) as client:
        asked = asyncio.create_task(client.version())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, may_go_on.set)
        assert await asked == "0.32.0"


async def test_a_socket_that_was_removed_is_named_with_a_cure(tmp_path: Path) -> None:
    gone = tmp_path / "panel.sock"
    async with VllmClient(1, uds=str(gone)) as client:
        with pytest.raises(EngineUnreachable) as failure:
            await client.gate()
    assert str(gone) in failure.value.what
    assert "--force" in failure.value.cure


async def test_a_frozen_server_whose_socket_is_full_is_silent_and_no_stranger(tmp_path: Path) -> None:
    path = str(tmp_path / "panel.sock")
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as filling:
        listening.bind(path)
        listening.listen(0)
        filling.connect(path)  # as much as it has room for
        async with VllmClient(1, uds=path, check=check_own) as client:
            with pytest.raises(EngineTimeout):
                await client.gate(timeout=0.1)


async def test_no_answer_in_time_says_that_it_may_still_happen(server: Server, client: VllmClient) -> None:
    server.say_nothing("POST /sleep")
    server.say_nothing("GET /is_sleeping")

    with pytest.raises(EngineTimeout, match=r"POST /sleep within 0\.05 s") as late:
        await client.sleep(1, timeout=0.05)
    with pytest.raises(EngineTimeout) as busy:
        await client.is_sleeping(timeout=0.05)

    assert "may still" in late.value.cure
    assert busy.value.cure == ""


async def test_a_process_that_was_stopped_meanwhile_asks_once_more(
    server: Server, client: VllmClient
) -> None:
    server.answer("POST /panel/gate", {"closed": False, "in_flight": 0})
    server.answer("POST /sleep")
    asking = asyncio.create_task(client.set_gate(False, timeout=0.5))
    await asyncio.sleep(0)
    time.sleep(1.0)  # noqa: ASYNC251 - nothing of this process runs, as after SIGSTOP
    assert (await asking).closed is False

    acting = asyncio.create_task(client.sleep(1, timeout=0.1))
    await asyncio.sleep(0)
    time.sleep(1.0)  # noqa: ASYNC251
    with pytest.raises(EngineTimeout):
        await acting


async def test_health_is_false_for_anything_but_200_in_time(server: Server, client: VllmClient) -> None:
    server.answer("GET /health")
    assert await client.health() is True
    server.answer("GET /health", status=503)
    assert await client.health() is False
    server.say_nothing("GET /health")
    assert await client.health(timeout=0.05) is False


async def test_calls_that_may_be_repeated_share_one_connection(server: Server, client: VllmClient) -> None:
    server.answer("GET /panel/gate", {"closed": True, "in_flight": 0, "last_request": None})
    server.answer("POST /v1/completions", {"choices": [{"text": "a"}]})
    for _ in range(3):
        await client.gate()
        await client.complete("hi", model="qwen", timeout=30)

    assert server.connections == 1


async def test_a_kept_connection_that_vllm_closed_is_replaced_once(
    server: Server, client: VllmClient
) -> None:
    server.answer("GET /is_sleeping", {"is_sleeping": False})
    await client.is_sleeping(timeout=30)
    answering = server.replies["GET /is_sleeping"]

    async def close_the_first(writer: asyncio.StreamWriter) -> None:
        server.replies["GET /is_sleeping"] = answering
        writer.close()

    server.replies["GET /is_sleeping"] = close_the_first

    assert await client.is_sleeping(timeout=30) is False
    assert [request.connection for request in server.requests] == [1, 1, 2]


async def test_what_changes_the_model_is_never_sent_twice(server: Server, client: VllmClient) -> None:
    server.answer("GET /version", {"version": "0.24.0"})
    await client.version()

    async def break_off(writer: asyncio.StreamWriter) -> None:
        writer.close()

    server.replies["POST /sleep"] = break_off
    with pytest.raises(EngineUnreachable, match="closed the connection during POST /sleep") as failure:
        await client.sleep(1, timeout=30)

    assert failure.value.sent is True
    assert server.targets() == ["GET /version", "POST /sleep?level=1"]


async def test_what_changes_the_model_uses_a_kept_connection_only_after_a_good_answer_on_it(
    server: Server, client: VllmClient
) -> None:
    server.answer("GET /version", {"version": "0.24.0"})
    server.answer("POST /sleep", {"status": "sleeping", "level": 1})
    await client.version()
    await client.sleep(1, timeout=30)
    assert [request.connection for request in server.requests] == [1, 1]

    server.answer("GET /version", {}, status=404)
    with pytest.raises(EngineRefused):
        await client.version()
    await client.sleep(1, timeout=30)
    assert server.requests[-1].connection == 2


async def test_after_a_500_the_next_call_works(server: Server, client: VllmClient) -> None:
    async def fail_and_close(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 X\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server.replies["POST /wake_up"] = fail_and_close
    server.replies["GET /is_sleeping"] = fail_and_close
    with pytest.raises(EngineRefused):
        await client.wake_up(timeout=30)
    with pytest.raises(EngineRefused):
        await client.is_sleeping(timeout=30)
    server.answer("GET /is_sleeping", {"is_sleeping": True})

    assert await client.is_sleeping(timeout=30) is True


async def test_a_proxy_in_the_environment_is_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    server.answer("GET /version", {"version": "0.32.0"})

    async with VllmClient(server.port) as client:
        assert await client.version() == "0.32.0"


async def test_an_attached_server_gets_its_key_and_no_secret(server: Server) -> None:
    server.answer("GET /base/version", {"version": "0.32.0"})
    url = f"http://127.0.0.1:{server.port}/base/"

    async with VllmClient(0, base_url=url, api_key="k") as client:
        await client.version()

    assert server.requests[0].headers["authorization"] == "Bearer k"
    assert "x-panel-secret" not in server.requests[0].headers


async def test_an_endless_answer_is_cut(server: Server, client: VllmClient) -> None:
    server.stream("GET /metrics", *[b"x" * 1024 * 1024] * 17)

    with pytest.raises(EngineRefused, match="longer than 16 MiB"):
        await client.metrics(timeout=20)


async def test_a_recorded_answer_comes_as_text_and_counts(server: Server, client: VllmClient) -> None:
    raw = (DATA / "chat-stream.raw").read_bytes()

    async def replay(writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(raw), 7):  # however the network cuts it
            writer.write(raw[start : start + 7])
            await writer.drain()

    server.replies["POST /v1/chat/completions"] = replay

    deltas = await collect(client, params={"temperature": 0.5})

    assert "".join(delta.text for delta in deltas) == "� A� A�;"
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert (deltas[-1].prompt_tokens, deltas[-1].completion_tokens) == (20, 6)
    sent = json.loads(server.requests[0].body)
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (sent["model"], sent["temperature"]) == ("qwen", 0.5)


async def test_chat_goes_without_the_secret_so_that_the_gate_counts_it(
    server: Server, client: VllmClient
) -> None:
    server.stream("POST /v1/chat/completions", b"data: [DONE]\n\n")

    assert await collect(client) == []
    assert "x-panel-secret" not in server.requests[0].headers


async def test_reasoning_is_read_under_both_of_its_names(server: Server, client: VllmClient) -> None:
    server.stream(
        "POST /v1/chat/completions",
        b'data: {"choices":[{"delta":{"reasoning":"new "}}]}\n\n',
        b': still here\n\ndata: {"choices":[{"delta":{"reasoning_content":"old"}}]}\r\n\r\n',
        b"data: [DONE]\n\n",
    )

    assert [delta.reasoning for delta in await collect(client)] == ["new ", "old"]


async def test_an_error_in_the_middle_is_the_last_delta(server: Server, client: VllmClient) -> None:
    server.stream(
        "POST /v1/chat/completions",
        b'data: {"choices":[{"delta":{"content":"half"}}]}\n\n',
        b'data: {"error": {"message": "EngineCore died", "type": "X", "param": null, "code": 500}}\n\n',
        b"data: [DONE]\n\n",
    )

    assert await collect(client) == [ChatDelta(text="half"), ChatDelta(error="EngineCore died")]


async def test_a_stream_that_ends_without_its_end_mark_is_a_failure(
    server: Server, client: VllmClient
) -> None:
    server.stream("POST /v1/chat/completions", b'data: {"choices":[{"delta":{"content":"half"}}]}\n\n')

    with pytest.raises(EngineUnreachable, match="closed the connection"):
        await collect(client)


async def test_a_refused_chat_says_why(server: Server, client: VllmClient) -> None:
    error = {"error": {"message": "maximum context length", "type": "BadRequestError", "code": 400}}
    server.answer("POST /v1/chat/completions", error, 400)

    with pytest.raises(EngineRefused, match="maximum context length"):
        await collect(client)


async def test_a_sleeper_that_sends_headers_and_then_nothing_is_given_up(
    server: Server, client: VllmClient
) -> None:
    server.stream("POST /v1/chat/completions", then_hang=True)

    with pytest.raises(EngineTimeout, match=r"within 0\.1 s"):
        await collect(client, first_timeout=0.1)


async def test_an_answer_that_stalls_is_given_up_by_its_own_limit(server: Server, client: VllmClient) -> None:
    server.stream(
        "POST /v1/chat/completions", b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', then_hang=True
    )

    with pytest.raises(EngineTimeout, match=r"within 0\.1 s"):
        await collect(client, stall_timeout=0.1)


@pytest.mark.parametrize("begun", [b"", b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'])
@pytest.mark.parametrize("comment", [b": keep-alive\n\n", b":", b"event: ping\nid: 1\n", b"dat"])
async def test_what_is_no_event_keeps_no_answer_alive(
    server: Server, client: VllmClient, begun: bytes, comment: bytes
) -> None:
    async def keep_alive(writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + (b"%x\r\n%b\r\n" % (len(begun), begun) if begun else b""))
        while True:  # until the client hangs up
            writer.write(b"%x\r\n%b\r\n" % (len(comment), comment))
            await writer.drain()
            await asyncio.sleep(0.01)

    server.replies["POST /v1/chat/completions"] = keep_alive

    async with asyncio.timeout(60):
        with pytest.raises(EngineTimeout, match=r"within 0\.2 s"):
            await collect(client, first_timeout=30 if begun else 0.2, stall_timeout=0.2)
        await server.hung_up.wait()


async def test_closing_the_stream_hangs_up_so_that_vllm_stops(server: Server, client: VllmClient) -> None:
    server.stream(
        "POST /v1/chat/completions", b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', then_hang=True
    )

    deltas = client.chat([{"role": "user", "content": "hi"}], model="qwen", first_timeout=30)
    assert (await anext(deltas)).text == "a"
    await deltas.aclose()

    async with asyncio.timeout(60):
        await server.hung_up.wait()


async def test_cancelling_a_call_leaves_the_client_usable(server: Server, client: VllmClient) -> None:
    server.say_nothing("POST /sleep")
    server.answer("GET /version", {"version": "0.32.0"})
    call = asyncio.create_task(client.sleep(1, timeout=60))
    async with asyncio.timeout(60):
        while not server.requests:
            await asyncio.sleep(0.005)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert await client.version() == "0.32.0"


async def recorded(name: str) -> list[ChatDelta]:
    """The deltas of a stream that vLLM 0.32 sent, cut at odd places."""
    raw = (DATA / name).read_bytes()

    async def parts() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(raw), 97):
            yield raw[start : start + 97]

    stream = deltas(parts(), "here", first_timeout=30, stall_timeout=30)
    return [delta async for delta in stream]


async def test_what_a_model_calls_comes_in_the_pieces_that_vllm_sends() -> None:
    found = await recorded("tool-calls.raw")
    calls = [call for delta in found for call in delta.calls]
    assert calls[0] == CallDelta(index=0, id="chatcmpl-tool-9babe3f0c78d5ead", name="get_weather")
    assert "".join(call.arguments for call in calls) == '"Paris"'  # the braces are lost on the way, in 0.32
    assert "".join(delta.text for delta in found) == ""
    assert [delta.finish_reason for delta in found if delta.finish_reason] == ["tool_calls"]


async def test_how_likely_each_token_was_comes_with_it() -> None:
    chances = [chance for delta in await recorded("logprobs.raw") for chance in delta.chances]
    assert [chance.token for chance in chances][:3] == ["Paris", " and", " Rome"]
    assert [other.token for other in chances[0].top_logprobs] == ["Paris", "The"]
    assert round(chances[0].logprob, 3) == -0.461
