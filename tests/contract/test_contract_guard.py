"""A server behind the panel's guard: a port for clients, a socket for the panel, on the real one as here."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from contract_backends import CHAT, NAME, QUESTION, Backend, Server, running, wait_for

from tests.contract.conftest import make_gpus
from vllm_sleep_tui.engine.guard_files import copy_guard

GUARD = ("--middleware", "panel_guard.PanelGuard")
ADMIN = (
    ("POST", "/sleep?level=1"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("POST", "/collective_rpc"),
    ("GET", "/server_info"),
    ("GET", "/panel/gate"),
    ("GET", "/openapi.json"),
)


class Guarded:
    """One guarded server: its port as a client sees it, its socket as the panel does."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        # Each call on a connection of its own: after an error inside, uvicorn hangs up without a word.
        fresh = httpx.Limits(max_keepalive_connections=0)
        transport = httpx.HTTPTransport(uds=str(path), limits=fresh)
        self.panel = httpx.Client(base_url="http://127.0.0.1", transport=transport, timeout=60.0)


@pytest.fixture
def guarded(backend: Backend, tmp_path: Path) -> Iterator[Guarded]:
    folder = Path(tempfile.mkdtemp())  # short: a socket's path has 107 characters
    copy_guard(folder)
    environment = {
        "PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}" if backend.name == "simulator" else str(folder),
        "SLEEP_TUI_SOCKET": str(folder / "panel.sock"),
        "VLLM_SLEEP_TUI_SIMULATED_GPUS": str(make_gpus(tmp_path / "gpus")),
    }
    with running(backend, tmp_path, *GUARD, **environment) as server:
        both = Guarded(server.wait_ready(), folder / "panel.sock")
        yield both
        both.panel.close()


def test_the_port_serves_clients_and_the_socket_the_panel(guarded: Guarded) -> None:
    server, panel = guarded.server, guarded.panel
    for method, path in ADMIN:
        answer = httpx.request(method, f"http://127.0.0.1:{server.port}{path}", timeout=30.0)
        assert (path, answer.status_code) == (path, 403)
    assert server.post(CHAT, {**QUESTION, "model": NAME}).status_code == 200

    # An error inside has the shape that the panel reads, whatever layer gave it.
    unknown = panel.post("/collective_rpc", json={"method": "no_such_method"})
    assert (unknown.status_code, "error" in unknown.json()) == (500, True)
    assert panel.post("/panel/gate", json={"closed": True}).json()["in_flight"] == 0
    assert server.post(CHAT, {**QUESTION, "model": NAME}).status_code == 503
    assert panel.post(CHAT, json={**QUESTION, "model": NAME}).status_code == 200
    as_client = panel.post(CHAT, json={**QUESTION, "model": NAME}, headers={"X-Panel-Client": "1"})
    assert as_client.status_code == 503
    assert panel.post("/sleep?level=1").status_code == 200
    assert panel.get("/is_sleeping").json() == {"is_sleeping": True}
    assert panel.post("/wake_up").status_code == 200
    assert panel.post("/panel/gate", json={"closed": False}).status_code == 200

    # An answer under way on the socket is counted, and a stop is not held by who listens to it.
    tokens = server.backend.endless_tokens
    streamed = {**QUESTION, "model": NAME, "stream": True, "max_tokens": tokens, "ignore_eos": True}
    with panel.stream("POST", CHAT, json=streamed, headers={"X-Panel-Client": "1"}) as answer:
        lines = answer.iter_lines()
        next(lines)
        wait_for(lambda: panel.get("/panel/gate").json()["in_flight"] == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0
