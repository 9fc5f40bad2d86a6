"""The product's own command line as the tests on real servers drive it, and what they check of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot
from vllm_sleep_tui.fleet.survey import read_once

SERVER_SECONDS = 300.0
"""Limit of one command: a real server starts in 30 to 100 s on two busy cores (vLLM 0.32)."""


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str, every: float = 0.05) -> float:
    """Seconds until the condition holds; fails with `what` if it does not within the limit."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(every)
    return time.monotonic() - began


@dataclass
class CommandLine:
    """One config over a state folder of its own."""

    config: Path
    state_home: Path
    sessions: set[int] = field(default_factory=set)
    """Of the servers seen so far: a server leads a session, and its engines stay in it."""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    """As it is when this is made: its servers outlive the test that happens to start them."""

    def begin(self, *arguments: str, to: Path | None = None) -> subprocess.Popen[str]:
        """Start a command without waiting; what it says goes into the file `to`, else to pipes."""
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.config), *arguments]
        env = self.environment | {"XDG_STATE_HOME": str(self.state_home)}
        if to is None:
            pipe = subprocess.PIPE
            return subprocess.Popen(
                command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
            )
        with to.open("w") as file:
            return subprocess.Popen(
                command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def run(self, *arguments: str, seconds: float = SERVER_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        process = self.begin(*arguments)
        out, err = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def __call__(self, *arguments: str) -> str:
        """Run a command that must succeed; its stdout."""
        done = self.run(*arguments)
        assert done.returncode == 0, (
            f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def status(self) -> dict[str, dict[str, Any]]:
        """The models of `status --json` by name."""
        models = {model["name"]: model for model in json.loads(self("status", "--json"))["models"]}
        self.sessions |= {model["pid"] for model in models.values() if model["pid"]}
        return models

    def look(self, name: str) -> ModelSnapshot:
        """The model as any process sees it now, without the cost of a command."""
        model = read_once(load(self.config), self.state_home / "vllm-sleep-tui").model(name)
        self.sessions |= {model.pid} if model.pid else set()
        return model

    def processes(self) -> list[psutil.Process]:
        """Everything alive in the sessions of the servers seen so far."""
        return [process for process in psutil.process_iter() if session_of(process.pid) in self.sessions]

    def engine(self, name: str) -> psutil.Process:
        """The model's engine process."""
        server = psutil.Process(self.status()[name]["pid"])
        (engine,) = (child for child in server.children(recursive=True) if "VLLM::EngineC" in title(child))
        return engine

    def close(self) -> None:
        """Stop every model; fails if a process is left."""
        self("stop", "--all", "--force")
        wait_until(
            lambda: not self.processes(), seconds=60, what=f"no process left of {sorted(self.sessions)}"
        )


def title(process: psutil.Process) -> str:
    """How a process calls itself; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def session_of(pid: int) -> int | None:
    """The session of a living process; None if it is gone or only waits to be reaped."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(session)


def write_config(
    path: Path, command: list[str], models: Mapping[str, Mapping[str, Any]], **more: Any
) -> Path:
    """Write a config file; JSON is YAML too."""
    path.write_text(json.dumps({"vllm_command": command, "models": models, **more}, indent=2))
    return path
