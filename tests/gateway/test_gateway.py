"""The endpoint from outside: what it lists, lets through, switches to, and refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from tests.gateway.conftest import MakeGated
from vllm_sleep_tui.engine import endpoints


def test_a_request_starts_wakes_and_switches_to_its_model(gated: MakeGated) -> None:
    here = gated({"a": {"model": "sim/1GiB", "aliases": ["gpt-4o"]}, "b": {"model": "sim/4GiB"}})
    assert here.states() == {"a": "stopped", "gpt-4o": "stopped", "b": "stopped"}
    first = here.chat("gpt-4o")
    assert first.status_code == 200, first.text
    assert first.json()["model"] == "a"
    assert here.chat("b").json()["model"] == "b"
    assert here.states()["a"] == "asleep"
    assert here.chat("a").json()["model"] == "a"
    assert here.states() == {"a": "awake", "gpt-4o": "awake", "b": "asleep"}
    assert (
        'gateway_switches_total{model="a",outcome="done"} 2'
        in httpx.get(f"{here.base}/metrics", timeout=60).text
    )


def test_a_stream_is_passed_on_byte_for_byte(gated: MakeGated) -> None:
    here = gated()
    body = {"model": "a", "prompt": "tell me", "max_tokens": 20, "stream": True}
    with httpx.stream("POST", f"{here.url}/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        through = b"".join(answer.iter_raw())
    port = next(m["port"] for m in json.loads(here.verb("status", "--json"))["models"] if m["name"] == "a")
    direct = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).content

    def pieces(events: bytes) -> list[object]:
        lines = [line.removeprefix(b"data: ") for line in events.split(b"\n\n") if line]
        return [json.loads(line)["choices"] if line != b"[DONE]" else "done" for line in lines]

    assert pieces(through) == pieces(direct)
    assert through.endswith(b"data: [DONE]\n\n")


def test_names_paths_and_prefixes_lead_to_one_model(gated: MakeGated) -> None:
    here = gated({"org/big:8b": {"model": "sim/1GiB"}, "b": {"model": "sim/4GiB"}})
    assert here.chat("org/big:8b").json()["model"] == "org/big:8b"
    assert here.chat("org-big-8b").json()["model"] == "org/big:8b"
    body = {"prompt": "x", "max_tokens": 2}
    for prefix in ("org/big:8b", "org-big-8b", "org%2Fbig%3A8b"):
        answer = httpx.post(f"{here.base}/{prefix}/v1/completions", json=body, timeout=60)
        assert answer.json()["model"] == "org/big:8b", answer.text
    assert httpx.post(f"{here.url}/completions", json=body, timeout=60).status_code == 400  # which one?
    missing = here.chat("org/bigg")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert "org/big:8b" in missing.json()["error"]["message"]


ADMIN = ("/sleep", "/wake_up", "/collective_rpc", "/panel/gate", "/a/sleep", "/a/v1/../sleep", "/%73leep")


def test_odd_names_and_paths_keep_nobody_waiting(gated: MakeGated) -> None:
    here = gated({"org/big:8b": {"model": "sim/1GiB"}}, starts=False)
    for prefix in ("/org/big:8b", "/org%2Fbig%3A8b", "/org-big-8b"):
        assert httpx.post(f"{here.base}{prefix}/v1/completions", json={}, timeout=60).status_code == 503
    assert httpx.post(f"{here.base}/{'a/' * 30_000}v1/completions", json={}, timeout=60).status_code == 404
    refused = httpx.post(f"{here.url}/completions", json={"model": "big" * 10_000_000}, timeout=60)
    assert refused.status_code == 404
    assert len(refused.content) < 1000


def test_admin_paths_do_not_exist(gated: MakeGated) -> None:
    here = gated()
    for path in ADMIN:
        asked = post_raw(here.port, path)
        assert asked.startswith(b"HTTP/1.1 404 "), path


def post_raw(port: int, path: str) -> bytes:
    """The beginning of the answer to a path that no client library would send as it is."""
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 2\r\n\r\n{{}}".encode())
        return raw.recv(4096)


def test_a_head_without_an_end_is_hung_up_on(gated: MakeGated) -> None:
    here = gated()
    with socket.create_connection(("127.0.0.1", here.port), timeout=30) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
        answer = b""
        with contextlib.suppress(OSError):
            for _ in range(1000):
                raw.sendall(b"x" * 10_000)
        with contextlib.suppress(OSError):
            answer = raw.recv(100)
    assert not answer or answer.startswith(b"HTTP/1.1 431 ")
    assert here.answers()


def test_idle_connections_leave_the_rest_of_the_process_its_files(gated: MakeGated) -> None:
    here = gated(begins=False)
    process = here.serve()
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (600, 600))
    here.until(here.answers)
    address = ("127.0.0.1", here.port)
    with contextlib.ExitStack() as idle:
        for _ in range(250):
            idle.enter_context(socket.create_connection(address, timeout=30))
        with socket.create_connection(address, timeout=30) as one_more:
            assert one_more.recv(100).startswith(b"HTTP/1.1 503 ")
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 400
    here.until(here.answers)


def test_a_body_that_comes_in_large_pieces_is_no_head(gated: MakeGated) -> None:
    here = gated(starts=False)
    body = json.dumps({"model": "a", "prompt": "x" * 1_000_000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n" % len(body)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", here.port), timeout=30) as raw:
            raw.sendall(head + body)
            assert raw.recv(100).startswith(b"HTTP/1.1 503 ")


def test_a_page_of_another_site_is_refused(gated: MakeGated) -> None:
    here = gated()
    for name, value in (
        ("origin", "http://evil.example"),
        ("host", "evil.example"),
        ("sec-fetch-site", "cross-site"),
    ):
        headers = {name: value}
        for path in ("/v1/models", "/running", "/health"):
            assert httpx.get(f"{here.base}{path}", headers=headers, timeout=60).status_code == 403
        assert httpx.post(f"{here.url}/completions", headers=headers, json={}, timeout=60).status_code == 403


def test_keys_have_models_and_limits(gated: MakeGated, tmp_path: Path) -> None:
    (tmp_path / "editor.key").write_text("sekret-one\n")
    (tmp_path / "agent.key").write_text("sekret-two\n")
    keys = [
        {"name": "editor", "api_key_file": str(tmp_path / "editor.key"), "models": ["a"]},
        {"name": "agent", "api_key_file": str(tmp_path / "agent.key")},
    ]
    here = gated(keys=keys)
    body = {"model": "b", "prompt": "x", "max_tokens": 2}

    def ask(**headers: str) -> httpx.Response:
        return httpx.post(f"{here.url}/completions", json=body, headers=headers, timeout=60)

    assert ask().status_code == 401
    assert ask(authorization="Bearer nobody").status_code == 401
    assert ask(authorization="Bearer sekret-one").status_code == 403
    assert ask(**{"x-api-key": "sekret-two"}).status_code == 200
    listed = httpx.get(
        f"{here.url}/models", headers={"authorization": "Bearer sekret-one"}, timeout=60
    ).json()
    assert [entry["id"] for entry in listed["data"]] == ["a"]
    assert "sekret" not in here.log.read_text()


def test_an_alias_of_a_reloaded_config_is_one_of_a_server_that_was_launched_before(gated: MakeGated) -> None:
    here = gated()
    assert here.chat("a").status_code == 200
    content = json.loads(here.config.read_text())
    content["models"]["a"]["aliases"] = ["new name"]
    here.config.write_text(json.dumps(content))
    here.processes[0].send_signal(signal.SIGHUP)
    here.until(lambda: "new name" in here.states())
    for name in ("new name", "new-name", "new name"):
        answer = here.chat(name)
        assert (answer.status_code, answer.json().get("model")) == (200, "a"), answer.text
    assert here.chat("nobody").status_code == 404


def test_what_is_not_carried_says_what_to_do_instead(gated: MakeGated) -> None:
    here = gated()
    stored = httpx.get(f"{here.url}/responses/resp_1", timeout=60)
    assert stored.status_code == 404
    assert "/MODEL/v1/responses/resp_1" in stored.json()["error"]["message"]
    here.verb("start", "a")
    assert (
        "not served here" not in httpx.get(f"{here.base}/a/v1/responses/resp_1", timeout=60).text
    )  # the server's own answer
    assert httpx.head(f"{here.base}/a/v1/responses/resp_1", timeout=60).status_code == 404
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-key": "x",
        "sec-websocket-version": "13",
    }
    for headers in ({}, upgrade):
        speech = httpx.get(f"{here.url}/realtime", headers=headers, timeout=60)
        assert speech.status_code == 501
        assert "own port" in speech.json()["error"]["message"]


def test_a_longer_body_than_allowed_is_refused(gated: MakeGated) -> None:
    here = gated(max_body="1MiB")
    whole = here.chat("a", "x" * 2_000_000)
    assert whole.status_code == 413

    def parts() -> object:
        yield b'{"model": "a", "prompt": "'
        for _ in range(40):
            yield b"x" * 65536

    assert httpx.post(f"{here.url}/completions", content=parts(), timeout=60).status_code == 413  # type: ignore[arg-type]
    assert here.states()["a"] == "stopped"


def test_who_leaves_while_waiting_leaves_the_queue(gated: MakeGated) -> None:
    here = gated(speed="20", queue=1)
    body = b'{"model": "a", "prompt": "x"}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", here.port)) as leaves:
        leaves.sendall(head.encode() + body)
        here.until(lambda: [ask["state"] for ask in here.requests()] == ["waiting"])
    here.until(lambda: not here.requests())
    here.until(lambda: 'status="499"' in httpx.get(f"{here.base}/metrics", timeout=60).text)


def test_a_full_queue_says_when_to_come_back(gated: MakeGated) -> None:
    here = gated(speed="10", queue=1)

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"model": "a", "prompt": "x", "max_tokens": 2}
            asks = [client.post(f"{here.url}/completions", json=body) for _ in range(3)]
            return await asyncio.gather(*asks)

    answers = sorted(asyncio.run(both()), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 503, 503]
    assert int(answers[1].headers["retry-after"]) >= 1
    assert answers[1].json()["error"]["type"] == "overloaded_error"


def test_a_failed_start_is_told_in_the_shape_of_the_path(gated: MakeGated) -> None:
    here = gated(
        {"a": {"model": "sim/1GiB", "env": {"VLLM_SIM_FAULTS": "fail_start"}}, "b": {"model": "sim/80GiB"}}
    )
    too_large = here.chat("b")
    assert too_large.status_code == 503, too_large.text
    assert "b" in too_large.json()["error"]["message"]
    message = httpx.post(f"{here.url}/messages", json={"model": "b", "messages": []}, timeout=60)
    assert message.json()["type"] == "error"
    assert message.json()["error"]["type"] == "overloaded_error"


def test_what_requests_may_not_start_stays_stopped(gated: MakeGated) -> None:
    here = gated(starts=False)
    refused = here.chat("a")
    assert refused.status_code == 503
    assert "starts" in refused.json()["error"]["message"]
    assert here.states()["a"] == "stopped"


def test_a_model_that_a_person_put_to_sleep_wakes_for_a_request(gated: MakeGated) -> None:
    here = gated()
    assert here.chat("a").status_code == 200
    here.verb("sleep", "a")
    assert here.chat("a").status_code == 200


def test_a_killed_server_is_started_again_for_the_next_request(gated: MakeGated) -> None:
    here = gated({"a": {"model": "sim/1GiB", "restart": "never"}})
    assert here.chat("a").status_code == 200
    pid = next(m["pid"] for m in json.loads(here.verb("status", "--json"))["models"] if m["name"] == "a")
    os.kill(pid, signal.SIGKILL)
    again = here.chat("a")
    assert again.status_code == 200, again.text


def test_the_next_serve_takes_over_when_the_first_is_killed(gated: MakeGated) -> None:
    here = gated()
    first = here.processes[0]
    here.serve()
    here.until_said("gateway: another process has it")
    first.kill()
    first.wait()
    here.until(here.answers)
    assert here.chat("a").status_code == 200


def test_a_taken_port_is_said_and_tried_again(gated: MakeGated) -> None:
    here = gated(begins=False)
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", here.port))
        squatter.listen()
        here.serve()
        here.until_said(f"Port {here.port} of 127.0.0.1 is not to be had")
    here.until(here.answers)


def test_large_images_pass_and_a_cancelled_stream_ends_at_the_server(gated: MakeGated) -> None:
    here = gated({"a": {"model": "sim/1GiB", "args": {"max-model-len": 40_000}}}, speed="20")
    here.verb("start", "a")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3_000_000}}
    content = [{"type": "text", "text": "what is this"}, image]
    body = {"model": "a", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    whole = httpx.post(f"{here.url}/chat/completions", json=body, timeout=60)
    assert whole.status_code in (200, 400), whole.text
    endless = {"model": "a", "prompt": "x", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{here.url}/completions", json=endless, timeout=60) as answer:
        parts = answer.iter_raw()  # with it, the answer would end
        first = next(parts)
        assert [ask["state"] for ask in here.requests()] == ["running"], first
    here.until(lambda: not here.requests())
    port = next(m["port"] for m in json.loads(here.verb("status", "--json"))["models"] if m["name"] == "a")
    running = "vllm:num_requests_running"

    def count() -> float:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(running))

    here.until(lambda: count() == 0)


def test_a_body_is_let_go_when_its_answer_begins(gated: MakeGated) -> None:
    here = gated(speed="20", max_body="1MiB")
    here.verb("start", "a")
    endless = {"model": "a", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as streams:
        for _ in range(12):  # of which no more than eight may be held together
            whole = endless | {"user": "x" * 1_000_000}
            asked = httpx.stream("POST", f"{here.url}/completions", json=whole, timeout=60)
            assert streams.enter_context(asked).status_code == 200


def test_the_model_to_return_to_leaves_one_in_use_beside_the_gateway_alone(gated: MakeGated) -> None:
    large = {"model": "sim/14GiB", "args": {"max-model-len": 16_000}}
    models = {"a": dict(large), "b": dict(large)}
    here = gated(models, speed="20", return_to="a", return_after="3s")
    here.verb("start", "a", "b")
    port = next(m["port"] for m in json.loads(here.verb("status", "--json"))["models"] if m["name"] == "b")
    assert here.chat("b").status_code == 200
    said = len(here.log.read_text())
    endless = {"model": "b", "prompt": "x", "max_tokens": 15_000, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=endless, timeout=60) as answer:
        for _ in answer.iter_raw():
            if time.monotonic() > began + 6:  # twice what it waits
                break
        assert "switches to a" not in here.log.read_text()[said:]
    here.until(lambda: "switches to a" in here.log.read_text()[said:])


def test_a_waiting_stream_hears_that_it_is_waited(gated: MakeGated) -> None:
    here = gated(speed="3")
    body = {"model": "a", "prompt": "x", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{here.url}/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        content = b"".join(answer.iter_raw())
    assert content.startswith(b": waits for ")
    assert content.endswith(b"data: [DONE]\n\n")


class Shy(BaseHTTPRequestHandler):
    """An attached server that looks awake and has its gate closed for the first five questions."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self) -> None:
        self.say(200, b'{"is_sleeping": false, "version": "0.32.0", "data": [{"id": "far"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        Shy.asked += 1
        if Shy.asked <= 5:
            self.say(503, b"{}", **{endpoints.GATE_CLOSED.decode(): "1"})
        else:
            self.say(200, b"data: [DONE]\n\n", **{"content-type": "text/event-stream"})

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_stream_that_is_turned_away_again_and_again_hears_that_it_is_waited(gated: MakeGated) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shy) as shy:
        serving = threading.Thread(target=shy.serve_forever)
        serving.start()
        try:
            here = gated({"far": {"url": f"http://127.0.0.1:{shy.server_address[1]}"}})
            here.until(lambda: here.states()["far"] == "awake")
            body = {"model": "far", "prompt": "x", "stream": True}
            answer = httpx.post(f"{here.url}/completions", json=body, timeout=60)
            assert answer.text.startswith(": waits for "), answer.text
            assert answer.text.endswith("data: [DONE]\n\n")
        finally:
            shy.shutdown()
            serving.join()
