"""What cannot be asked is not called well, what is only busy not silent, and nothing is out of reach."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.command_line import CommandLine, write_config
from tests.fleet.by_hand import vllm
from tests.fleet.conftest import SIMULATOR, Box, inject, seen
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, start_ticks

MakeBox = Callable[..., Box]
FreePort = Callable[[], int]
SECONDS = 120.0


async def test_a_server_that_only_has_much_to_do_is_waited_for(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        # Once it has answered the proof it computes, and hears nobody for longer than a guard is given.
        await inject(fleet, "a", "api_server_busy:1")
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


# ── attached servers ─────────────────────────────────────────────────────────────────────────────────────


class Closed(http.server.BaseHTTPRequestHandler):
    """A server behind a proxy that lets inference and its health through, and may hide a sleeper."""

    protocol_version = "HTTP/1.1"
    speaks: ClassVar[bool] = True

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "far", "object": "model", "created": 1, "owned_by": "x"}]}
        found: dict[str, Any] = {"/health": {}, "/v1/models": models}
        self.answer(200, found[self.path]) if self.path in found else self.answer(404, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        if not self.speaks:
            self.connection.settimeout(SECONDS)
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # as a sleeper: silent until the client leaves
            self.close_connection = True
            return
        choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        usage = {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
        kind = {"id": "1", "object": "text_completion", "created": 1, "model": "far"}
        self.answer(200, {**kind, "choices": [choice], "usage": usage})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def closed(port: int, *, speaks: bool) -> Iterator[None]:
    """Serve on the port."""
    kind = type("Kind", (Closed,), {"speaks": speaks})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attached_to(tmp_path: Path, port: int) -> CommandLine:
    config = write_config(
        tmp_path / "vllm-sleep-tui.yaml", ["vllm"], {"far": {"url": f"http://127.0.0.1:{port}"}}
    )
    return CommandLine(config, tmp_path / "state")


@pytest.mark.parametrize("speaks", [True, False])
def test_an_attached_server_that_hides_whether_it_sleeps_must_speak_to_be_called_awake(
    tmp_path: Path, free_port: FreePort, speaks: bool
) -> None:
    port = free_port()
    machine = attached_to(tmp_path, port)
    with closed(port, speaks=speaks):
        done = machine.run("switch", "far", seconds=SECONDS)
    assert done.returncode == (0 if speaks else 1), done.stderr
    assert speaks or "whether it sleeps" in done.stderr


def test_an_attached_server_whose_sleep_never_ends_is_not_awake(tmp_path: Path, free_port: FreePort) -> None:
    port = free_port()
    machine = attached_to(tmp_path, port)
    folder = tmp_path / "far-gpus"
    devices.create(folder, [("Far", 24 * 2**30)], ram_total_bytes=64 * 2**30)
    with vllm(port, gpus=folder, VLLM_SIM_FAULTS="sleep_hangs"), socket.socket() as sleeping:
        sleeping.connect(("127.0.0.1", port))
        sleeping.sendall(b"POST /sleep?level=1 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")
        sleeping.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sleeping.recv(1)
        done = machine.run("switch", "far", seconds=SECONDS)
        while "did not answer within" in done.stderr:  # a look gives it 1.5 s, little on a busy machine
            done = machine.run("switch", "far", seconds=SECONDS)
    assert done.returncode == 1, done.stdout
    assert "whether it sleeps" in done.stderr


@pytest.mark.usefixtures("own_orphans")
def test_a_model_that_gets_a_url_while_it_runs_can_still_be_stopped(
    tmp_path: Path, free_port: FreePort
) -> None:
    own = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": {"VLLM_SIM_TIMES": "instant"}}
    gpus = [{"name": "Test", "memory": "24GiB"}]
    config = write_config(tmp_path / "vllm-sleep-tui.yaml", SIMULATOR, {"a": own}, simulated_gpus=gpus)
    machine = CommandLine(config, tmp_path / "state")
    machine("start", "a")
    pid = machine.status()["a"]["pid"]
    server = ProcessId(pid, start_ticks(pid) or 0)
    write_config(config, SIMULATOR, {"a": {"url": f"http://127.0.0.1:{free_port()}"}}, simulated_gpus=gpus)
    told = machine.status()["a"]
    assert f"pid {pid}" in told["reason"]
    assert "stop a" in told["cure"]
    assert f"pid {pid} " in machine("orphans")
    machine("stop", "a")
    assert not is_alive(server)
    assert f"pid {pid}" not in (machine.status()["a"]["reason"] or "")
    done = machine.run("stop", "a")
    assert done.returncode == 1
    assert "attached" in done.stderr
