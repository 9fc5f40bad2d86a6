"""What processes a server has, and what becomes of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import httpx
import psutil
import pytest
from contract_backends import CHAT, QUESTION, Server, title, wait_for


def test_a_connection_is_refused_until_health_is_200(start: Callable[[], Server]) -> None:
    server = start()
    with pytest.raises(httpx.ConnectError):
        server.get("/health")
    server.wait_ready()
    assert server.get("/health").status_code == 200
    assert "Application startup complete." in server.log.read_text()


def test_the_engine_is_a_child_in_the_group_and_session_of_its_server(server: Server) -> None:
    engine = server.engine()
    assert engine.parent() == psutil.Process(server.process.pid)
    assert os.getpgid(engine.pid) == server.process.pid
    assert os.getsid(engine.pid) == server.process.pid
    assert engine.name().startswith("VLLM::EngineCor")


def test_sigterm_ends_a_ready_server_with_0_and_its_engine_too(start: Callable[[], Server]) -> None:
    server = start().wait_ready()
    engine = server.engine()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_a_killed_server_leaves_its_engine_and_frees_its_port(start: Callable[[], Server]) -> None:
    server = start().wait_ready()
    engine = server.engine()
    server.process.kill()
    assert server.wait_exit() == -signal.SIGKILL
    with pytest.raises(httpx.ConnectError):
        server.get("/health")
    assert engine.is_running()
    assert engine.ppid() != server.process.pid
    assert title(engine).startswith("VLLM::EngineCore")
    for orphan in [*engine.children(recursive=True), engine]:
        orphan.kill()
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_a_killed_engine_ends_its_server_with_0_and_its_stream_with_an_error(
    start: Callable[[], Server],
) -> None:
    server = start().wait_ready()
    body = {**QUESTION, "max_tokens": server.backend.endless_tokens, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client:
        url = f"http://127.0.0.1:{server.port}{CHAT}"
        with client.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.engine().kill()
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert rest[-2].startswith('data: {"error": {"message": "EngineCore encountered an issue.')
    assert server.wait_exit() == 0
