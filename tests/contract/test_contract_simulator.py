"""What only the simulator can be made to show: other versions, memory that runs out, faults."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from contract_backends import CHAT, COMPLETIONS, FIXED_IDS, GIB, QUESTION, Server, title, wait_for

from vllm_sleep_tui.simulator import devices

Simulate = Callable[..., Server]
INSTANT = {"VLLM_SIM_TIMES": "instant"}


def held(gpus: Path, server: Server) -> dict[int, int]:
    pids = {child.pid for child in server.children()}
    found: dict[int, int] = {}
    for allocation in devices.allocations(gpus):
        if allocation.pid in pids:
            for index, amount in allocation.vram.items():
                found[index] = found.get(index, 0) + amount
    return found


def pinned(gpus: Path) -> int:
    return sum(allocation.pinned_bytes for allocation in devices.allocations(gpus))


def end_of_log(server: Server) -> str:
    return server.log.read_text()[-4000:]


def set_faults(server: Server, *names: str) -> None:
    assert server.post("/simulator/faults", {"faults": names}).status_code == 200


def test_sleep_frees_the_memory_and_wake_takes_it_back(simulate: Simulate, gpus: Path) -> None:
    server = simulate(**INSTANT).wait_ready()
    awake = held(gpus, server)
    assert awake[0] == pytest.approx(0.5 * 24 * GIB, rel=0.1)
    server.post("/sleep?level=1")
    assert held(gpus, server)[0] == pytest.approx(0.9 * GIB, rel=0.05)
    server.post("/wake_up")
    assert held(gpus, server) == awake


def test_level_1_pins_memory_for_good_and_level_2_none(simulate: Simulate, gpus: Path) -> None:
    server = simulate(**INSTANT).wait_ready()
    server.post("/sleep?level=2")
    assert pinned(gpus) == 0
    server.post("/wake_up")
    server.post("/sleep?level=1")
    assert pinned(gpus) == pytest.approx(1.12 * 2.6 * GIB, rel=0.01)
    server.post("/wake_up")
    assert pinned(gpus) == pytest.approx(1.12 * 2.6 * GIB, rel=0.01)


def test_two_gpus_are_held_by_workers_of_the_engine(simulate: Simulate, gpus: Path) -> None:
    server = simulate("--tensor-parallel-size", "2", **INSTANT).wait_ready()
    workers = [title(child) for child in server.engine().children()]
    assert sorted(workers) == ["VLLM::Worker_TP0", "VLLM::Worker_TP1"]
    assert set(held(gpus, server)) == {0, 1}
    server.post("/sleep?level=1")
    assert held(gpus, server)[1] == pytest.approx(1.6 * GIB, rel=0.05)
    assert server.post("/collective_rpc", {"method": "check_health"}).json() == {"results": [None, None]}


def test_a_killed_worker_ends_the_server_with_0(simulate: Simulate) -> None:
    server = simulate("--tensor-parallel-size", "2", **INSTANT).wait_ready()
    server.engine().children()[0].kill()
    assert server.wait_exit() == 0


def test_the_visible_gpu_is_the_one_held(simulate: Simulate, gpus: Path) -> None:
    server = simulate(CUDA_VISIBLE_DEVICES="1", **INSTANT).wait_ready()
    assert set(held(gpus, server)) == {1}


def test_a_second_server_without_room_fails_with_the_numbers(simulate: Simulate) -> None:
    simulate("--gpu-memory-utilization", "0.7", **INSTANT).wait_ready()
    second = simulate("--gpu-memory-utilization", "0.7", **INSTANT)
    assert second.wait_exit() == 1
    log = end_of_log(second)
    assert "EngineCore failed to start." in log
    assert "ValueError: Free memory on device cuda:0 (" in log
    assert log.rstrip().endswith(
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    )


def test_a_wake_without_room_is_a_500_that_can_be_retried(simulate: Simulate, gpus: Path) -> None:
    first = simulate("--gpu-memory-utilization", "0.8", **INSTANT).wait_ready()
    first.post("/sleep?level=1")
    second = simulate("--gpu-memory-utilization", "0.8", **INSTANT).wait_ready()
    answer = first.post("/wake_up")
    assert answer.status_code == 500
    assert "CUDA Error: out of memory" in answer.json()["error"]["message"]
    assert first.is_sleeping()
    second.close()
    assert first.post("/wake_up").status_code == 200
    assert not first.is_sleeping()


def test_a_wake_without_room_wedges_0_24(simulate: Simulate) -> None:
    old = {"VLLM_SIM_VERSION": "0.24.0", **INSTANT}
    first = simulate("--gpu-memory-utilization", "0.8", **old).wait_ready()
    first.post("/sleep?level=1")
    second = simulate("--gpu-memory-utilization", "0.8", **old).wait_ready()
    assert "out of memory" in first.post("/wake_up").json()["error"]["message"]
    second.close()
    answer = first.post("/wake_up")
    assert (answer.status_code, "invalid argument" in answer.text) == (500, True)


def test_0_24_answers_sleep_with_nothing_and_takes_level_3(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_VERSION="0.24.0", **INSTANT).wait_ready()
    answer = server.post("/sleep?level=3")
    assert (answer.status_code, answer.content) == (200, b"")
    server.post("/wake_up")
    server.post("/collective_rpc", {"method": "reload_weights"})
    assert server.post(CHAT, QUESTION).json()["choices"][0]["message"]["content"] == ""


def test_0_32_refuses_level_3(simulate: Simulate) -> None:
    server = simulate(**INSTANT).wait_ready()
    assert server.post("/sleep?level=3").status_code == 400
    assert not server.is_sleeping()


def test_a_neighbour_that_grows_during_a_sleep_kills_the_sleeper(simulate: Simulate, gpus: Path) -> None:
    sleeper = simulate("--gpu-memory-utilization", "0.4", VLLM_SIM_FAULTS="sleep_slow").wait_ready()
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(sleeper.post, "/sleep?level=1")
        wait_for(lambda: "setting pause state" in sleeper.log.read_text())
        devices.claim(gpus, vram={0: GIB}, pinned_bytes=0, private_bytes=0, title="neighbour")
        answer = answering.result(timeout=30)
    assert "Memory usage increased after sleeping." in answer.json()["error"]["message"]
    assert sleeper.wait_exit() == 0


def test_without_dev_mode_there_is_no_sleep(simulate: Simulate) -> None:
    server = simulate(VLLM_SERVER_DEV_MODE="0", **INSTANT).wait_ready()
    assert server.post("/sleep").json() == {"detail": "Not Found"}


def test_the_api_key_guards_v1_and_nothing_else(simulate: Simulate) -> None:
    server = simulate(VLLM_API_KEY="secret", **INSTANT).wait_ready()
    assert (server.get("/v1/models").status_code, server.get("/v1/models").json()) == (
        401,
        {"error": "Unauthorized"},
    )
    assert server.post("/sleep").status_code == 200
    url = f"http://127.0.0.1:{server.port}/v1/models"
    assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert "secret" not in server.log.read_text()


def test_a_middleware_from_the_python_path_wraps_every_route(simulate: Simulate, tmp_path: Path) -> None:
    (tmp_path / "wall.py").write_text(
        "class Wall:\n"
        "    def __init__(self, app):\n"
        "        self.app = app\n"
        "    async def __call__(self, scope, receive, send):\n"
        "        if scope['type'] == 'http' and scope['path'] == '/sleep':\n"
        "            await send({'type': 'http.response.start', 'status': 418, 'headers': []})\n"
        "            await send({'type': 'http.response.body', 'body': b''})\n"
        "        else:\n"
        "            await self.app(scope, receive, send)\n"
    )
    server = simulate("--middleware", "wall.Wall", PYTHONPATH=str(tmp_path), **INSTANT).wait_ready()
    assert server.post("/sleep").status_code == 418
    assert server.get("/health").status_code == 200


def test_polled_paths_can_be_kept_out_of_the_log(simulate: Simulate) -> None:
    server = simulate("--disable-access-log-for-endpoints", "/health,/metrics", **INSTANT).wait_ready()
    server.get("/metrics")
    server.get("/version")
    wait_for(lambda: '"GET /version HTTP/1.1" 200 OK' in server.log.read_text())
    assert "GET /health" not in server.log.read_text()
    assert "GET /metrics" not in server.log.read_text()


def test_the_loser_of_a_port_race_says_ready_and_never_listens(simulate: Simulate) -> None:
    loser = simulate("--served-model-name", "loser", CUDA_VISIBLE_DEVICES="1", VLLM_SIM_SPEED="12")
    wait_for(lambda: "Resolved architecture" in loser.log.read_text())  # it has bound its port
    loser.process.send_signal(signal.SIGSTOP)  # however slow the other is, it is the first to listen
    winner = simulate("--port", str(loser.port), "--served-model-name", "winner", **INSTANT)
    loser.wait_ready()  # which is the other's answer, on the port that both have
    loser.process.send_signal(signal.SIGCONT)
    wait_for(lambda: "Application startup complete." in loser.log.read_text())
    assert loser.get("/v1/models").json()["data"][0]["id"] == "winner"
    assert loser.engine().is_running()
    loser.process.send_signal(signal.SIGTERM)
    assert loser.wait_exit() == 0
    assert winner.process.poll() is None


def test_a_taken_port_fails_at_once(simulate: Simulate) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = simulate("--port", str(taken.getsockname()[1]), **INSTANT)
        assert server.wait_exit() == 1
    assert end_of_log(server).rstrip().endswith("OSError: [Errno 98] Address already in use")


def test_a_first_sigterm_during_the_start_is_lost_and_a_second_ends_it(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_FAULTS="start_hangs", **INSTANT)
    wait_for(lambda: "Initializing a V1 LLM engine" in server.log.read_text())
    engine = server.engine()
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait_exit(0.5)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == -signal.SIGINT
    assert end_of_log(server).rstrip().endswith("KeyboardInterrupt: terminated")
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gated", "403 Client Error"),
        ("unauthorized", "401 Client Error"),
        ("offline", "LocalEntryNotFoundError"),
        ("disk_full", "[Errno 28] No space left on device"),
        ("trust_remote_code", "trust_remote_code=True"),
        ("cuda_oom", "torch.OutOfMemoryError: CUDA out of memory."),
        ("kv_cache_too_small", "larger than the available KV cache memory"),
    ],
)
def test_a_start_can_be_made_to_fail(simulate: Simulate, fault: str, said: str) -> None:
    server = simulate(VLLM_SIM_FAULTS=fault, **INSTANT)
    assert server.wait_exit() == 1
    assert said in server.log.read_text()


def test_a_missing_folder_is_taken_for_a_hub_name() -> None:
    command = [sys.executable, "-m", "vllm_sleep_tui.simulator", "serve", "./no-such-dir"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={"VLLM_SIM_TIMES": "instant"}, timeout=120
    )
    assert run.returncode == 1
    assert "HFValidationError: Repo id must use alphanumeric chars" in run.stderr


def test_without_gpus_sleep_mode_is_refused() -> None:
    command = [sys.executable, "-m", "vllm_sleep_tui.simulator", "serve", "sim/1GiB", "--enable-sleep-mode"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={"VLLM_SIM_TIMES": "instant"}, timeout=120
    )
    assert run.returncode == 1
    assert "Sleep mode is not supported on current platform." in run.stderr


def test_an_unknown_flag_is_exit_2_in_vllms_words() -> None:
    command = [sys.executable, "-m", "vllm_sleep_tui.simulator", "serve", "sim/1GiB", "--no-such-flag"]
    run = subprocess.run(command, capture_output=True, text=True, env={}, timeout=120)
    assert run.returncode == 2
    assert run.stderr.rstrip().endswith("vllm: error: unrecognized arguments: --no-such-flag")


def test_the_version_is_the_one_asked_for() -> None:
    command = [sys.executable, "-m", "vllm_sleep_tui.simulator", "--version"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={"VLLM_SIM_VERSION": "0.24.0"}, timeout=120
    )
    assert run.stdout == "0.24.0\n"


def test_a_fault_with_a_count_happens_so_often(simulate: Simulate) -> None:
    server = simulate(**INSTANT).wait_ready()
    server.post("/sleep?level=1")
    set_faults(server, "wake_500:1")
    assert server.post("/wake_up").status_code == 500
    assert server.is_sleeping()
    assert server.post("/wake_up").status_code == 200


def test_a_failed_sleep_leaves_a_server_that_dies_on_use(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_FAULTS="sleep_500", **INSTANT).wait_ready()
    assert server.post("/sleep?level=1").status_code == 500
    server.post("/wake_up")
    answer = server.post(CHAT, QUESTION)
    assert "EngineCore encountered an issue" in answer.text
    assert server.wait_exit() == 0


def test_a_sleep_can_free_nothing(simulate: Simulate, gpus: Path) -> None:
    server = simulate(VLLM_SIM_FAULTS="sleep_frees_nothing", **INSTANT).wait_ready()
    before = held(gpus, server)
    assert server.post("/sleep?level=1").status_code == 200
    assert held(gpus, server) == before
    assert "sleep freed 0.00 GiB" in server.log.read_text()


def test_a_timed_out_sleep_is_carried_out(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_FAULTS="sleep_slow", **INSTANT).wait_ready()
    begun = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        server.post("/sleep?level=1", timeout=1.0)
    assert server.is_sleeping()
    assert time.monotonic() - begun > 2.9


@pytest.mark.parametrize(("fault", "path"), [("sleep_hangs", "/sleep"), ("wake_hangs", "/wake_up")])
def test_an_operation_can_hang_while_health_is_fine(simulate: Simulate, fault: str, path: str) -> None:
    server = simulate(**INSTANT).wait_ready()
    if path == "/wake_up":
        server.post("/sleep")
    set_faults(server, fault)
    for call in (path, "/reset_prefix_cache"):
        with pytest.raises(httpx.ReadTimeout):
            server.post(call, timeout=0.4)
    assert server.get("/health").status_code == 200


def test_an_engine_can_die_in_an_answer_or_in_an_operation(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_SPEED="25").wait_ready()
    set_faults(server, "engine_dies")
    body = {**QUESTION, "max_tokens": server.backend.endless_tokens, "ignore_eos": True, "stream": True}
    assert 'data: {"error"' in server.post(CHAT, body).text
    assert server.wait_exit() == 0
    other = simulate(VLLM_SIM_FAULTS="engine_dies_on_sleep", **INSTANT).wait_ready()
    assert other.post("/sleep").status_code == 500
    assert other.wait_exit() == 0


def test_garbage_after_a_wake_shows_in_the_log_probabilities(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_FAULTS="garbage_after_wake:1", **INSTANT).wait_ready()
    proof = {"prompt": FIXED_IDS, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    before = server.post(COMPLETIONS, proof).json()["choices"][0]["prompt_logprobs"]
    server.post("/sleep?level=1")
    server.post("/wake_up")
    assert server.post(COMPLETIONS, proof).json()["choices"][0]["prompt_logprobs"] != before
    server.post("/collective_rpc", {"method": "reload_weights"})
    assert server.post(COMPLETIONS, proof).json()["choices"][0]["prompt_logprobs"] == before


def test_a_hang_is_healthy_and_silent(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_FAULTS="hang", **INSTANT).wait_ready()
    with pytest.raises(httpx.ReadTimeout):
        server.post(CHAT, QUESTION, timeout=0.5)
    assert server.get("/health").status_code == 200
    assert not server.is_sleeping()


def test_sigterm_can_wait_for_the_client_of_a_stream(simulate: Simulate) -> None:
    server = simulate(VLLM_SIM_FAULTS="sigterm_waits_for_client", VLLM_SIM_SPEED="25").wait_ready()
    body = {**QUESTION, "max_tokens": server.backend.endless_tokens, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{server.port}{CHAT}"
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as answer:
        lines = answer.iter_lines()  # held: the end of this generator would close the connection
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait_exit(1.0)
    assert server.wait_exit() == 0


def test_an_unknown_fault_is_refused_with_the_known_ones(simulate: Simulate) -> None:
    server = simulate(**INSTANT).wait_ready()
    answer = server.post("/simulator/faults", {"faults": ["nonsense"]})
    assert answer.status_code == 400
    assert "wake_500" in answer.text
