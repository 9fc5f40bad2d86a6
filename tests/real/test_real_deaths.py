"""What dies on real vLLM is seen within 2 s, with a cause, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import CommandLine, session_of, title, wait_until

pytestmark = pytest.mark.real
SEEN_SECONDS = 2.0
"""A server that dies is failed within this, whoever looks."""


def has_failed(panel: CommandLine, name: str) -> bool:
    """Whether anyone who looks now sees the model failed."""
    return panel.look(name).state == "failed"


def server_of(panel: CommandLine, name: str) -> psutil.Process:
    """The API server of an awake model, started if need be."""
    panel("switch", name)
    return psutil.Process(panel.status()[name]["pid"])


def test_a_killed_engine_is_a_failed_model_within_two_seconds(two_models: CommandLine) -> None:
    server_of(two_models, "tiny")
    os.kill(two_models.engine("tiny").pid, signal.SIGKILL)
    wait_until(lambda: has_failed(two_models, "tiny"), seconds=SEEN_SECONDS, what="failed")
    model = two_models.status()["tiny"]
    assert "engine" in model["reason"].lower()
    assert model["cure"]


def test_a_killed_api_server_takes_its_engine_along(two_models: CommandLine) -> None:
    server = server_of(two_models, "tiny")
    family = [server, *server.children(recursive=True)]
    assert len(family) >= 3  # the server, the engine and, on the CPU, a worker
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: has_failed(two_models, "tiny"), seconds=SEEN_SECONDS, what="failed")
    assert two_models.status()["tiny"]["reason"]
    wait_until(lambda: not any(is_there(one) for one in family), seconds=5, what="the whole group is gone")


def test_a_killed_worker_is_a_failed_model_within_two_seconds(two_models: CommandLine) -> None:
    server = server_of(two_models, "tiny")
    family = [server, *server.children(recursive=True)]
    worker = next(one for one in family if "Worker" in title(one))
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: has_failed(two_models, "tiny"), seconds=SEEN_SECONDS, what="failed")
    two_models("stop", "tiny")
    wait_until(lambda: not any(is_there(one) for one in family), seconds=5, what="the whole group is gone")


def test_a_killed_leader_leaves_its_servers_to_the_next(two_models: CommandLine, tmp_path: Path) -> None:
    server = server_of(two_models, "tiny")
    leader = two_models.begin("serve", to=tmp_path / "said")
    wait_until(lambda: "serve: leads" in (tmp_path / "said").read_text(), seconds=30, what="a leader")
    leader.kill()
    leader.wait()
    assert two_models.status()["tiny"]["pid"] == server.pid
    two_models("sleep", "tiny")
    two_models("wake", "tiny")
    assert two_models.look("tiny").proof == "proven"


def test_a_killed_keeper_leaves_no_engine_once_the_model_is_stopped(two_models: CommandLine) -> None:
    server = server_of(two_models, "tiny")
    family = [server, *server.children(recursive=True)]
    os.kill(server.ppid(), signal.SIGKILL)
    wait_until(lambda: has_failed(two_models, "tiny"), seconds=SEEN_SECONDS, what="failed")
    two_models("stop", "tiny")
    wait_until(lambda: not any(is_there(one) for one in family), seconds=5, what="the whole group is gone")


def is_there(process: psutil.Process) -> bool:
    """Whether a process lives and has not only to be reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def starting(two_models: CommandLine, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`start tiny` under way, its engine process just begun: now vLLM swallows one SIGTERM (0.32)."""
    two_models("stop", "tiny")
    process = two_models.begin("start", "tiny", to=tmp_path / "said")

    def engine_is_there() -> bool:
        pid = two_models.look("tiny").pid
        return pid is not None and any(
            "EngineC" in title(child) for child in psutil.Process(pid).children(recursive=True)
        )

    wait_until(engine_is_there, seconds=120, what="an engine process")
    pid = two_models.look("tiny").pid
    yield process
    assert process.poll() is not None, "start went on although its server was stopped"
    wait_until(lambda: not members_of(pid), seconds=5, what="no process in the server's session")


def members_of(session: int | None) -> list[int]:
    """The living processes of a session."""
    return [pid for pid in psutil.pids() if session_of(pid) == session]


def test_a_stop_during_start_up_leaves_nothing(
    two_models: CommandLine, starting: subprocess.Popen[str]
) -> None:
    two_models("stop", "tiny")
    assert starting.wait(timeout=30) in (1, 130)
    assert two_models.status()["tiny"]["state"] == "stopped"


def test_a_start_whose_verb_is_killed_is_carried_on_by_the_next(
    two_models: CommandLine, starting: subprocess.Popen[str]
) -> None:
    pid = two_models.look("tiny").pid
    starting.kill()
    starting.wait()
    two_models("switch", "tiny")
    model = two_models.look("tiny")
    assert (model.state, model.pid) == ("awake", pid)
    two_models("stop", "tiny")


def test_ctrl_c_during_start_up_leaves_nothing(
    two_models: CommandLine, starting: subprocess.Popen[str]
) -> None:
    starting.send_signal(signal.SIGINT)
    assert starting.wait(timeout=60) == 130
    assert two_models.status()["tiny"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"args": {"enforce-eager": True, "kv-cache-memory-bytes": "64M", "max-model-len": 8192}},
            "max-model-len",
            id="a KV cache too small for the context",
        ),
        pytest.param({"model": "/nowhere/at-all"}, "/nowhere/at-all", id="a folder that is not there"),
        pytest.param({"args": {"no-such-flag": True}}, "no-such-flag", id="a flag that vLLM does not know"),
    ],
)
def test_a_start_that_cannot_work_fails_with_its_own_cause(
    broken: Any, changes: dict[str, Any], says: str
) -> None:
    panel: CommandLine = broken(changes)
    failed = panel.run("start", "smollm2")
    assert failed.returncode in (1, 2)
    assert says in failed.stderr
    assert "Engine core initialization failed" not in failed.stderr
    assert panel.status()["smollm2"]["state"] in ("failed", "stopped")
    assert not panel.processes()
