"""The verbs on real processes of the simulator: results on stdout, progress on stderr, exit codes, Ctrl-C."""

from __future__ import annotations

import itertools
import json
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT_SECONDS = 60.0
PHASES = "drain sleep settle wake weights reload kv_cache reset prove"


class Shell:
    """A config of two models on one simulated GPU, and the command on it."""

    def __init__(self, folder: Path, *, speed: float = 100.0, faults: str = "") -> None:
        model = {
            "gpus": [0],
            "args": {"max-model-len": 2048},
            "env": {"VLLM_SIM_SPEED": f"{speed:g}", "VLLM_SIM_FAULTS": faults},
        }
        self.config = folder / "c.yaml"
        self.config.write_text(
            json.dumps(
                {
                    "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
                    "simulated_gpus": [{"name": "Small", "memory": "24GiB"}],
                    "models": {name: {"model": "sim/1GiB", **model} for name in ("qwen", "phi")},
                }
            )
        )
        self.command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.config)]

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )

    def done(self, *arguments: str, stdin: str = "") -> str:
        result = self.run(*arguments, stdin=stdin)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def json(self, *arguments: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.done(*arguments, "--json"))
        return shown

    def states(self) -> dict[str, str]:
        return {model["name"]: model["state"] for model in self.json("status")["models"]}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Two models; whatever a test leaves running is stopped."""
    used = Shell(tmp_path)
    yield used
    used.run("stop", "--all", "--force")


def test_start_switch_sleep_wake_and_stop_from_a_shell(shell: Shell) -> None:
    started = shell.run("start", "--all", "--json")
    assert started.returncode == 0, started.stderr
    assert "qwen  loading" in started.stderr
    models = json.loads(started.stdout)["models"]
    assert [(model["model"], model["state"]) for model in models] == [("qwen", "awake"), ("phi", "asleep")]
    switched = shell.json("switch", "phi")
    assert list(switched)[:3] == ["version", "model", "state"]
    assert (switched["model"], switched["state"]) == ("phi", "awake")
    assert " ".join(switched["last_switch"]["phases"]) == PHASES
    assert switched["last_switch"]["total"] > 0
    assert shell.states() == {"qwen": "asleep", "phi": "awake"}
    assert shell.json("sleep", "phi", "--level", "2")["level"] == 2
    assert shell.done("wake", "phi").startswith("phi  awake  VRAM ")
    assert shell.done("stop", "--all") == "qwen  stopped  VRAM 0.0 GiB\nphi  stopped  VRAM 0.0 GiB\n"


def test_chat_answers_on_stdout_and_tells_the_times_on_stderr(shell: Shell) -> None:
    asked = shell.run("chat", "qwen", "Why is the sky blue?")
    assert asked.returncode == 0, asked.stderr
    assert "I am qwen, simulated." in asked.stdout
    assert "started in" in asked.stderr
    assert "TTFT" in asked.stderr
    shell.done("sleep", "qwen")
    assert "woke in" in shell.run("chat", "qwen", "Are you there?").stderr
    assert "Why, again?" in shell.done("chat", "qwen", stdin="Why, again?")
    answer = shell.json("chat", "qwen", "hi")
    assert answer["text"].startswith("I am qwen")
    assert answer["completion_tokens"] > 1
    assert answer["ttft"] < answer["seconds"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_leaves_nothing_half_started(tmp_path: Path, number: int) -> None:
    shell = Shell(tmp_path, speed=1)
    process = subprocess.Popen([*shell.command, "start", "qwen"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "qwen  loading\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert shell.states()["qwen"] == "stopped"


def test_a_start_that_fails_says_why_in_two_lines_and_exits_1(tmp_path: Path) -> None:
    shell = Shell(tmp_path, faults="gated")
    failed = shell.run("start", "qwen")
    assert failed.returncode == 1
    what, cure = [line for line in failed.stderr.splitlines() if not line.startswith("qwen  ")]
    assert "gated" in what
    assert cure
    assert shell.states()["qwen"] == "failed"
    assert "gated" in shell.done("logs", "qwen", "-n", "200")
    shell.done("stop", "qwen")


def test_logs_shows_the_last_lines_and_follows_what_comes(shell: Shell) -> None:
    shell.done("start", "qwen")
    last = shell.done("logs", "qwen", "-n", "3").splitlines()
    assert len(last) == 3
    assert shell.done("logs", "qwen", "-n", "500").splitlines()[-3:] == last
    follower = subprocess.Popen(
        [*shell.command, "logs", "qwen", "-f", "-n", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    # What is said before it listens is not new to it.
    verbs = itertools.cycle(("sleep", "wake"))
    while not select.select([follower.stdout], [], [], 1.0)[0]:
        shell.done(next(verbs), "qwen")
    assert follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=LIMIT_SECONDS)
    assert (follower.returncode, said.strip()) == (130, "Interrupted.")
