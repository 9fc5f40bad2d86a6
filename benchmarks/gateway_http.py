"""Which HTTP library passes a request on at the least cost: each between one client and one backend.

    python benchmarks/gateway_http.py [--requests 2000] [--streams 500] [--only uvicorn+httptools]

The backend answers at once, so that what is measured is the proxy: milliseconds that it adds to a request and
to the first streamed byte, its CPU for each request, and whether 500 streams at once lose a byte. Candidates
that are not installed are left out and named. `docs/gateway.md` has the figures and the choice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 400}]}).encode()
STREAM_BODY = json.dumps(
    {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
).encode()
REPLY = json.dumps({"choices": [{"message": {"content": "y" * 500}}]}).encode()
EVENT = b'data: {"choices":[{"delta":{"content":"' + b"z" * 40 + b'"}}]}\n\n'
EVENTS = 50
PATH = "/v1/chat/completions"


class Backend(asyncio.Protocol):
    """Answers a POST at once; one that asks for a stream in EVENTS chunks."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.seen = b""

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self.seen += data
        while (end := self.seen.find(b"\r\n\r\n")) >= 0:
            head = self.seen[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.seen) < end + 4 + length:
                return
            body = self.seen[end + 4 : end + 4 + length]
            self.seen = self.seen[end + 4 + length :]
            if b'"stream": true' in body:
                self.streaming = asyncio.ensure_future(self.stream())
            else:
                top = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                self.transport.write(top % len(REPLY) + REPLY)

    async def stream(self) -> None:
        """Chunks, each in a write of its own."""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(EVENTS):
            self.transport.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
            await asyncio.sleep(0)
        self.transport.write(b"0\r\n\r\n")


def run_backend(path: str) -> None:
    """The backend's process."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_unix_server(Backend, path, backlog=2048)
        await server.serve_forever()

    asyncio.run(serve())


# ── candidates: each serves `port` and passes on to the unix socket `path` ───────────────────────────────


def own_client_app(path: str) -> Callable[..., Any]:
    """A raw ASGI application over the gateway's own client."""
    from vllm_sleep_tui.upstream import Address, Upstream

    upstream = Upstream(Address(uds=path))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = [], True
        while more:
            message = await receive()
            body.append(message.get("body", b""))
            more = message.get("more_body", False)
        head = b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        head += b"content-length: %d\r\n\r\n"
        answer = await upstream.send(head % (scope["raw_path"], sum(map(len, body))), body)
        keep = [(k, v) for k, v in answer.headers if k.lower() not in (b"transfer-encoding", b"connection")]
        await send({"type": "http.response.start", "status": answer.status, "headers": keep})
        async for part in answer.parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        answer.close()
        await send({"type": "http.response.body", "body": b""})

    return app


def httpcore_app(path: str) -> Callable[..., Any]:
    """The same over httpcore."""
    import httpcore

    pool = httpcore.AsyncConnectionPool(uds=path, max_connections=1000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = [(b"host", b"127.0.0.1"), (b"content-length", b"%d" % len(body))]
        request = httpcore.Request("POST", "http://127.0.0.1" + scope["path"], headers=headers, content=body)
        response = await pool.handle_async_request(request)
        keep = [(k, v) for k, v in response.headers if k.lower() not in (b"transfer-encoding", b"connection")]
        await send({"type": "http.response.start", "status": response.status, "headers": keep})
        assert not isinstance(response.stream, bytes)
        async for part in response.stream:  # type: ignore[union-attr]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await response.aclose()
        await send({"type": "http.response.body", "body": b""})

    return app


def uvicorn_with(
    http: str, loop: str, make: Callable[[str], Callable[..., Any]]
) -> Callable[[int, str], None]:
    """A candidate under uvicorn."""

    def run(port: int, path: str) -> None:
        import uvicorn

        async def late(scope: Any, receive: Any, send: Any, made: list[Any] = []) -> None:  # noqa: B006
            if not made:
                made.append(make(path))  # inside the loop
            await made[0](scope, receive, send)

        uvicorn.run(
            late,
            host="127.0.0.1",
            port=port,
            http=http,  # type: ignore[arg-type]
            loop=loop,  # type: ignore[arg-type]
            lifespan="off",
            log_config=None,
            access_log=False,
            ws="none",
        )

    return run


def run_aiohttp(port: int, path: str) -> None:
    """aiohttp on both sides."""
    import aiohttp
    from aiohttp import web

    async def handle(request: web.Request) -> web.StreamResponse:
        session: aiohttp.ClientSession = request.app["session"]
        data = await request.read()
        async with session.post("http://127.0.0.1" + request.path, data=data) as got:
            kind = got.headers["content-type"]
            if "content-length" in got.headers:
                return web.Response(status=got.status, body=await got.read(), headers={"content-type": kind})
            answer = web.StreamResponse(status=got.status, headers={"content-type": kind})
            await answer.prepare(request)
            async for part in got.content.iter_any():
                await answer.write(part)
            await answer.write_eof()
            return answer

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.UnixConnector(path, limit=1000)
        async with aiohttp.ClientSession(connector=connector) as made:
            app["session"] = made
            yield

    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_post("/{tail:.*}", handle)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


def run_granian(port: int, path: str) -> None:
    """granian (Rust) with the gateway's own client."""
    from granian.server.embed import Server

    async def serve() -> None:
        await Server(own_client_app(path), address="127.0.0.1", port=port, interface="asginl").serve()

    asyncio.run(serve())


CANDIDATES: dict[str, tuple[tuple[str, ...], Callable[[int, str], None]]] = {
    "uvicorn h11 + httpcore": (("httpcore",), uvicorn_with("h11", "asyncio", httpcore_app)),
    "uvicorn httptools + httpcore": (("httptools",), uvicorn_with("httptools", "asyncio", httpcore_app)),
    "uvicorn h11 + own client": (("httptools",), uvicorn_with("h11", "asyncio", own_client_app)),
    "uvicorn httptools + own client": (("httptools",), uvicorn_with("httptools", "asyncio", own_client_app)),
    "the same on uvloop": (("httptools", "uvloop"), uvicorn_with("httptools", "uvloop", own_client_app)),
    "aiohttp both sides": (("aiohttp",), run_aiohttp),
    "granian + own client": (("granian", "httptools"), run_granian),
}


# ── the client ───────────────────────────────────────────────────────────────────────────────────────────


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> tuple[float, float, bytes]:
    """One request on a kept connection: seconds to the body's first byte and to its end, and the body."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    began = time.perf_counter()
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    top = (await reader.readuntil(b"\r\n\r\n")).lower()
    first, content = 0.0, b""
    if b"content-length:" in top:
        content = await reader.readexactly(int(top.split(b"content-length:")[1].split(b"\r\n")[0]))
        first = time.perf_counter() - began
    else:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            content += (await reader.readexactly(size + 2))[:-2]
            first = first or time.perf_counter() - began
        await reader.readexactly(2)
    return first, time.perf_counter() - began, content


Connect = Callable[[], Any]


async def one_after_another(
    connect: Connect, count: int, body: bytes, whole: bytes
) -> tuple[list[float], list[float]]:
    """Milliseconds to the first byte and to the end, of `count` requests on one connection."""
    reader, writer = await connect()
    firsts, totals = [], []
    for number in range(count + 200):
        first, total, content = await ask(reader, writer, body)
        assert content == whole
        if number >= 200:
            firsts.append(first * 1e3)
            totals.append(total * 1e3)
    writer.close()
    return firsts, totals


async def at_once(connect: Connect, count: int, whole: bytes) -> tuple[int, float]:
    """Streams at once: how many came without every byte, and seconds for all."""
    wanted = hashlib.sha256(whole).digest()

    async def one() -> bool:
        try:
            reader, writer = await connect()
            _, _, content = await ask(reader, writer, STREAM_BODY)
            writer.close()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            return False
        return hashlib.sha256(content).digest() == wanted

    began = time.perf_counter()
    fine = await asyncio.gather(*(one() for _ in range(count)))
    return count - sum(fine), time.perf_counter() - began


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[98]


async def until_it_answers(connect: Connect) -> None:
    """Wait for the first answer."""
    deadline = time.monotonic() + 20
    while True:
        try:
            reader, writer = await connect()
            await asyncio.wait_for(ask(reader, writer, BODY), 5)
            writer.close()
            return
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def measure(connect: Connect, pid: int | None, requests: int, streams: int) -> dict[str, float]:
    """All figures of one way to the backend."""
    await until_it_answers(connect)
    process = psutil.Process(pid) if pid else None

    def cpu() -> float:
        return sum(process.cpu_times()[:2]) if process else 0.0

    begun = cpu()
    _, totals = await one_after_another(connect, requests, BODY, REPLY)
    used = (cpu() - begun) / (requests + 200) * 1e3
    firsts, _ = await one_after_another(connect, requests // 4, STREAM_BODY, EVENT * EVENTS)
    lost, took = await at_once(connect, streams, EVENT * EVENTS)
    p50, p99 = percentiles(totals)
    first50, first99 = percentiles(firsts)
    return {
        "p50": p50,
        "p99": p99,
        "cpu": used,
        "first_p50": first50,
        "first_p99": first99,
        "lost": lost,
        "streams_s": took,
        "rss_mb": process.memory_info().rss / 1e6 if process else 0.0,
    }


def main() -> None:
    """Measure each candidate and print what it adds to the direct way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    multiprocessing.set_start_method("fork")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "backend")
        backend = multiprocessing.Process(target=run_backend, args=[path], daemon=True)
        backend.start()
        figures = measure(
            lambda: asyncio.open_unix_connection(path), None, arguments.requests, arguments.streams
        )
        results["direct"] = asyncio.run(figures)
        for name, (needs, run) in CANDIDATES.items():
            if arguments.only and arguments.only not in name:
                continue
            try:
                for module in needs:
                    __import__(module)
            except ImportError as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                continue
            port = free_port()
            proxy = multiprocessing.Process(target=run, args=[port, path], daemon=True)
            proxy.start()
            try:
                way = lambda port=port: asyncio.open_connection("127.0.0.1", port)  # noqa: E731
                results[name] = asyncio.run(measure(way, proxy.pid, arguments.requests, arguments.streams))
            except (OSError, TimeoutError, AssertionError) as error:
                print(f"{name}: failed, {error!r}", file=sys.stderr)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    proxy.kill()
                proxy.join()
        backend.kill()
    if arguments.json:
        print(json.dumps(results))
        return
    direct = results.pop("direct")
    print(f"direct: p50 {direct['p50']:.2f} ms, p99 {direct['p99']:.2f} ms")
    columns = "   p50    p99    CPU  first    p99  lost  all in   RSS"
    print(f"{'milliseconds added by':32} {columns}")
    for name, f in results.items():
        print(
            f"{name:32} {f['p50'] - direct['p50']:6.2f} {f['p99'] - direct['p99']:6.2f} {f['cpu']:6.2f} "
            f"{f['first_p50'] - direct['first_p50']:6.2f} {f['first_p99'] - direct['first_p99']:6.2f} "
            f"{f['lost']:5.0f} {f['streams_s']:6.2f}s {f['rss_mb']:4.0f}M"
        )


if __name__ == "__main__":
    main()
