"""The guard as vLLM runs it: copied alone, imported by name, in front of an app in a real uvicorn.

Clients come over TCP, the panel over the guard's unix socket."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from vllm_sleep_tui.engine.guard_files import copy_guard

CHAT = "/v1/chat/completions"


class App:
    """Stands for vLLM: answers everything, holds it until released, notices clients that leave."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.bodies: list[bytes] = []
        self.lifespan = False
        self.release = asyncio.Event()
        self.release.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self.lifespan = True
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.seen.append(scope["path"])
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        gone = asyncio.ensure_future(receive())
        released = asyncio.ensure_future(self.release.wait())
        await asyncio.wait({gone, released}, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done()
        for task in (gone, released):
            task.cancel()
        if not left:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})


class Answer:
    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}

    def json(self) -> Any:
        return json.loads(self.body)


class Guarded:
    def __init__(self, port: int, panel: Path, app: App) -> None:
        self.port = port
        self.panel = panel
        self.app = app

    async def open(
        self,
        method: str,
        target: str,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        trusted: bool = False,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if trusted:
            reader, writer = await asyncio.open_unix_connection(self.panel)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = {"Host": f"127.0.0.1:{self.port}", "Connection": "close", **(headers or {})}
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items() if value != "absent")
        length = f"Content-Length: {len(body)}\r\n" if body and "Content-Length" not in lines else ""
        writer.write(f"{method} {target} HTTP/1.1\r\n{head}{length}\r\n".encode("latin-1") + body)
        return reader, writer

    async def ask(
        self,
        method: str,
        target: str,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        trusted: bool = False,
    ) -> Answer:
        reader, writer = await self.open(method, target, headers, body, trusted=trusted)
        return await self.answer(reader, writer)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
        async with asyncio.timeout(60):
            raw = await reader.read()
        writer.close()
        return Answer(raw)

    async def gate(self) -> Any:
        return (await self.ask("GET", "/panel/gate", trusted=True)).json()

    async def set_gate(self, closed: bool) -> Any:
        body = json.dumps({"closed": closed}).encode()
        return (await self.ask("POST", "/panel/gate", body=body, trusted=True)).json()

    async def until_in_flight(self, number: int) -> Any:
        async with asyncio.timeout(60):
            while (state := await self.gate())["in_flight"] != number:
                await asyncio.sleep(0.005)
        return state

    async def until_seen(self, number: int) -> None:
        async with asyncio.timeout(60):
            while len(self.app.seen) < number:
                await asyncio.sleep(0.005)


@pytest.fixture
def panel_socket(monkeypatch: pytest.MonkeyPatch) -> Path:
    path = Path(tempfile.mkdtemp()) / "panel.sock"  # short: a socket's path has 107 characters
    monkeypatch.setenv("SLEEP_TUI_SOCKET", str(path))
    return path


@pytest.fixture
def guard_module(tmp_path: Path, panel_socket: Path) -> Any:
    copy_guard(tmp_path / "guard")
    spec = importlib.util.spec_from_file_location("panel_guard", tmp_path / "guard" / "panel_guard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def guarded(
    guard_module: Any, panel_socket: Path, free_port: Callable[[], int]
) -> AsyncIterator[Guarded]:
    app, port = App(), free_port()
    guard = guard_module.PanelGuard(app)
    config = uvicorn.Config(guard, host="127.0.0.1", port=port, log_level="error", ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(60):
        while not server.started:
            await asyncio.sleep(0.005)
    yield Guarded(port, panel_socket, app)
    app.release.set()
    server.should_exit = True
    await serving


OPEN_PATHS = (
    CHAT,
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/rerank",
    "/rerank",
    "/score",
    "/pooling",
    "/classify",
    "/v1/audio/transcriptions",
    "/tokenize",
    "/detokenize",
    "/v1/responses/resp_a-1/cancel",
    "/health?x=1",
    "/metrics",
    "/version",
    "/v1/models",
    "/ping",
)


async def test_what_anyone_may_use_passes_by_the_port(guarded: Guarded) -> None:
    statuses = {path: (await guarded.ask("POST", path)).status for path in OPEN_PATHS}

    assert statuses == dict.fromkeys(OPEN_PATHS, 200)
    assert guarded.app.seen == [path.partition("?")[0] for path in OPEN_PATHS]


PANEL_PATHS = (
    "/sleep?level=1",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/server_info",
    "/reset_prefix_cache",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/openapi.json",
    "/docs",
    "/panel/gate",
    "/",
    "*",
    "/some/route/of/tomorrow",
)


async def test_everything_else_is_refused_by_the_port_whatever_is_said(guarded: Guarded) -> None:
    for path in PANEL_PATHS:
        for given in ({}, {"X-Panel-Secret": ""}, {"X-Panel-Client": "0"}, {"panel_guard.inside": "True"}):
            refused = await guarded.ask("POST", path, given)
            assert (path, refused.status) == (path, 403)
            assert refused.json()["error"]["code"] == 403
            assert refused.json()["error"]["type"] == "Forbidden"
    assert guarded.app.seen == []


async def test_the_panels_socket_opens_everything(guarded: Guarded) -> None:
    statuses = {path: (await guarded.ask("POST", path, trusted=True)).status for path in PANEL_PATHS}

    # The gate is the guard's own and wants a body.
    assert statuses == dict.fromkeys(PANEL_PATHS, 200) | {"/panel/gate": 400}


async def test_the_panels_socket_is_this_users_alone(guarded: Guarded) -> None:
    assert stat.S_IMODE(guarded.panel.stat().st_mode) == 0o600


async def test_a_clients_request_on_the_panels_socket_is_a_clients(guarded: Guarded) -> None:
    client = {"X-Panel-Client": "1"}
    await guarded.set_gate(True)
    assert (await guarded.ask("POST", CHAT, client, trusted=True)).status == 503
    assert (await guarded.ask("POST", "/sleep", client, trusted=True)).status == 403
    await guarded.set_gate(False)
    guarded.app.release.clear()
    asked = asyncio.create_task(guarded.ask("POST", CHAT, client, trusted=True))
    await guarded.until_in_flight(1)
    guarded.app.release.set()
    assert (await asked).status == 200


ODD_SPELLINGS = (
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/V1/models",
    "/v1/%6dodels",
    "/v1%2Fmodels",
    "/health/../sleep",
    "/health/./x",
    "/v1/models;x",
    "/health%3Fx",
    "/v1/responses/../../sleep",
    "/v1/responses/a%2F..%2Fsleep",
    "/sleep%23/health",
    "/v1/responses/x/cancel/more",
    # The parser that vLLM brings (httptools) makes a path of it, another (h11) does not.
    "http://127.0.0.1/sleep",
)


async def test_an_odd_spelling_of_a_listed_path_is_not_listed(guarded: Guarded) -> None:
    statuses = {path: (await guarded.ask("POST", path)).status for path in ODD_SPELLINGS}

    assert statuses == dict.fromkeys(ODD_SPELLINGS, 403)
    assert guarded.app.seen == []


def spellings(path: str) -> list[str]:
    """Other ways to write an admin path that a lax router might take for it."""
    bare = path.partition("?")[0]
    if not bare.strip("/*"):
        return []
    first = f"%{ord(bare[1]):02x}"
    return [
        f"/{bare}",
        f"{bare}/",
        f"{bare}//",
        f"/.{bare}",
        f"/health/..{bare}",
        f"/health/..;{bare}",
        f"/{first}{bare[2:]}",
        f"/%{first[1:]}{bare[2:]}".replace("%", "%25", 1),
        f"%2f{bare[1:]}",
        bare.upper(),
        bare.title(),
        f"{bare}%00",
        f"{bare};x=1",
        f"{bare}.json",
    ]


async def test_no_spelling_of_an_admin_path_gets_by(guarded: Guarded) -> None:
    for path in PANEL_PATHS:
        for spelled in spellings(path):
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                answer = await guarded.ask(method, spelled)
                assert (method, spelled, answer.status) in {
                    (method, spelled, 403),
                    (method, spelled, 400),  # not a request line at all, says the HTTP server
                }
    assert guarded.app.seen == []


FOREIGN_HOSTS = (
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.",
    "127.0.0.1:80:80",
    "0.0.0.0",
    "",
    "absent",
)


async def test_a_host_that_is_not_loopback_is_refused(guarded: Guarded) -> None:
    for host in FOREIGN_HOSTS:
        answer = await guarded.ask("GET", "/health", {"Host": host})
        assert (host, answer.status) in ((host, 403), ("absent", 400))  # uvicorn refuses a missing one
    assert guarded.app.seen == []


LOOPBACK_HOSTS = ("localhost", "LOCALHOST:8001", "[::1]:9", "127.0.0.1")


async def test_every_name_of_loopback_is_accepted(guarded: Guarded) -> None:
    for host in LOOPBACK_HOSTS:
        assert (host, (await guarded.ask("GET", "/health", {"Host": host})).status) == (host, 200)


FOREIGN_PAGES = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
)


async def test_a_web_page_of_another_site_is_refused(guarded: Guarded) -> None:
    for headers in FOREIGN_PAGES:
        assert (headers, (await guarded.ask("POST", CHAT, headers)).status) == (headers, 403)
    assert guarded.app.seen == []


async def test_a_web_page_on_this_machine_may_chat(guarded: Guarded) -> None:
    headers = {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}

    assert (await guarded.ask("POST", CHAT, headers)).status == 200


async def test_requests_in_flight_are_counted_until_they_are_answered(guarded: Guarded) -> None:
    assert (await guarded.gate()) == {"closed": False, "in_flight": 0, "last_request": None}
    guarded.app.release.clear()
    before = time.time()
    first = asyncio.create_task(guarded.ask("POST", CHAT))
    second = asyncio.create_task(guarded.ask("POST", "/v1/completions"))

    started = await guarded.until_in_flight(2)
    guarded.app.release.set()
    await asyncio.gather(first, second)
    ended = await guarded.until_in_flight(0)

    assert before <= started["last_request"] <= ended["last_request"] <= time.time()


async def test_a_client_that_hangs_up_is_no_longer_in_flight(guarded: Guarded) -> None:
    guarded.app.release.clear()
    _, writer = await guarded.open("POST", CHAT)
    await guarded.until_in_flight(1)

    writer.close()

    await guarded.until_in_flight(0)


async def test_looking_and_the_panels_own_requests_count_for_nothing(guarded: Guarded) -> None:
    guarded.app.release.clear()
    waiting = [
        asyncio.create_task(guarded.ask("POST", CHAT, trusted=True)),
        asyncio.create_task(guarded.ask("GET", "/metrics")),
    ]
    await guarded.until_seen(2)

    assert (await guarded.gate()) == {"closed": False, "in_flight": 0, "last_request": None}
    guarded.app.release.set()
    await asyncio.gather(*waiting)


async def test_a_closed_gate_answers_inference_at_once_and_lets_the_rest_pass(guarded: Guarded) -> None:
    assert (await guarded.set_gate(True))["closed"] is True

    answer = await guarded.ask("POST", CHAT, body=b'{"messages": []}')

    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("ServiceUnavailable", None, 503)
    assert (await guarded.ask("GET", "/health")).status == 200
    assert (await guarded.ask("POST", CHAT, trusted=True)).status == 200
    assert (await guarded.set_gate(False))["closed"] is False
    assert (await guarded.ask("POST", CHAT)).status == 200


async def test_closing_the_gate_leaves_what_is_in_flight_alone(guarded: Guarded) -> None:
    guarded.app.release.clear()
    running = asyncio.create_task(guarded.ask("POST", CHAT))
    await guarded.until_in_flight(1)

    assert (await guarded.set_gate(True))["in_flight"] == 1
    guarded.app.release.set()

    assert (await running).status == 200


NONSENSE = (b"", b"{", b"[]", b'{"closed": 1}', b"{}", b" " * 5000)


async def test_nonsense_at_the_gate_changes_nothing(guarded: Guarded) -> None:
    for body in NONSENSE:
        answer = await guarded.ask("POST", "/panel/gate", body=body, trusted=True)
        assert (body, answer.status) == (body, 400)
    assert (await guarded.ask("DELETE", "/panel/gate", trusted=True)).status == 405
    assert (await guarded.gate())["closed"] is False


async def test_the_apps_start_and_end_pass_through(guarded: Guarded) -> None:
    assert guarded.app.lifespan


async def test_a_websocket_by_the_port_is_closed(guard_module: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("reached")

    scope = {"type": "websocket", "raw_path": b"/v1/realtime", "headers": [(b"host", b"localhost")]}
    await guard_module.PanelGuard(app)(scope, receive, send)
    scope[guard_module.INSIDE] = True
    await guard_module.PanelGuard(app)(scope, receive, send)

    assert [message if message == "reached" else message["type"] for message in sent] == [
        "websocket.close",
        "reached",
    ]


async def test_a_server_whose_panel_could_not_reach_it_does_not_start(
    guard_module: Any, panel_socket: Path, free_port: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    panel_socket.write_text("in the way")
    guard = guard_module.PanelGuard(App())
    config = uvicorn.Config(guard, host="127.0.0.1", port=free_port(), log_config=None, ws="none")
    server = uvicorn.Server(config)

    with contextlib.suppress(SystemExit):  # newer uvicorns leave like this, older ones return
        await server.serve()

    assert not server.started
    assert "The panel's socket cannot be opened" in caplog.text


HALF = {"Content-Length": "40"}


async def test_a_body_that_is_not_complete_is_not_in_flight_and_finds_the_gate_closed(
    guarded: Guarded,
) -> None:
    reader, writer = await guarded.open("POST", CHAT, HALF, b'{"messages":')
    other = await guarded.ask("POST", CHAT)  # by now the guard has the half of the first

    assert other.status == 200
    assert (await guarded.set_gate(True))["in_flight"] == 0
    writer.write(b" [] " + b" " * 23 + b"}")
    assert (await guarded.answer(reader, writer)).status == 503
    assert guarded.app.seen == [CHAT]


async def test_a_body_in_pieces_reaches_the_model_whole(guarded: Guarded) -> None:
    reader, writer = await guarded.open("POST", CHAT, {"Content-Length": "300000"}, b"x" * 100_000)
    await guarded.ask("GET", "/health")
    writer.write(b"y" * 200_000)

    assert (await guarded.answer(reader, writer)).status == 200
    assert guarded.app.bodies[-1] == b"x" * 100_000 + b"y" * 200_000


async def test_a_body_that_does_not_come_is_not_waited_for(guard_module: Any, guarded: Guarded) -> None:
    guard_module.BODY_SECONDS = 0.1
    reader, writer = await guarded.open("POST", CHAT, HALF, b"{")

    answer = await guarded.answer(reader, writer)

    assert (answer.status, answer.json()["error"]["code"]) == (408, 408)
    assert guarded.app.seen == []


def test_the_copy_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    copy_guard(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import panel_guard; print(panel_guard.PanelGuard)"

    # -I and -S: neither our environment nor site-packages can be found.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert "PanelGuard" in done.stdout, done.stderr


def test_the_copy_is_valid_for_the_oldest_python_that_vllm_ran_on(tmp_path: Path) -> None:

    copy_guard(tmp_path)

    ast.parse((tmp_path / "panel_guard.py").read_text(), feature_version=(3, 9))


@pytest.fixture
def quick_touch(guard_module: Any) -> None:
    guard_module.TOUCH_SECONDS = 0.01


async def test_a_cleaner_by_age_finds_the_panels_socket_young(quick_touch: None, guarded: Guarded) -> None:
    for path in (guarded.panel, guarded.panel.parent):
        os.utime(path, (0, 0))
    async with asyncio.timeout(60):
        while min(path.stat().st_mtime for path in (guarded.panel, guarded.panel.parent)) < 1:
            await asyncio.sleep(0.005)


async def test_a_body_for_what_no_gate_closes_is_not_held(guarded: Guarded) -> None:
    reader, writer = await guarded.open("POST", "/tokenize", HALF, b"{")

    await guarded.until_seen(1)  # the application has it while the half of it is missing
    writer.write(b" " * 39)

    assert (await guarded.answer(reader, writer)).status == 200


async def test_bodies_that_wait_have_a_limit_over_all_and_give_their_room_back(
    guard_module: Any, guarded: Guarded
) -> None:
    guard_module.MAX_HELD = 100
    waiting, waiter = await guarded.open("POST", CHAT, {"Content-Length": "80"}, b"x" * 70)
    # The guard has those by the time it refuses; one with room for itself may come before them.
    async with asyncio.timeout(60):
        while (refused := await guarded.ask("POST", CHAT, body=b"y" * 40)).status == 200:
            await asyncio.sleep(0.005)

    assert (refused.status, refused.json()["error"]["code"]) == (413, 413)
    waiter.write(b"x" * 10)
    assert (await guarded.answer(waiting, waiter)).status == 200
    _, leaver = await guarded.open("POST", CHAT, {"Content-Length": "80"}, b"x" * 70)
    leaver.close()
    async with asyncio.timeout(60):
        while (await guarded.ask("POST", CHAT, body=b"z" * 100)).status != 200:
            await asyncio.sleep(0.005)
