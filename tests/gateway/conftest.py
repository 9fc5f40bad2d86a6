"""A `serve` with a gateway over simulated servers: real processes, real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

SIMULATOR = [sys.executable, "-m", "vllm_sleep_tui.simulator"]
TWO: dict[str, dict[str, Any]] = {"a": {"model": "sim/1GiB"}, "b": {"model": "sim/4GiB"}}


class Gated:
    """One config with a gateway, and the `serve` processes over it."""

    def __init__(
        self,
        folder: Path,
        port: int,
        models: dict[str, dict[str, Any]],
        gateway: dict[str, Any],
        gpus: list[str],
        speed: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port
        self.base = f"http://127.0.0.1:{port}"
        self.url = f"{self.base}/v1"
        self.config = folder / "vllm-sleep-tui.yaml"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
        timing = {"VLLM_SIM_TIMES": "instant"} if speed == "instant" else {"VLLM_SIM_SPEED": speed}
        filled = {}
        for name, model in models.items():
            own = {"args": {"max-model-len": 2048}, **model}
            filled[name] = model if "url" in model else {**own, "env": {**timing, **model.get("env", {})}}
        content = {
            "vllm_command": SIMULATOR,
            "simulated_gpus": [{"name": "Test", "memory": size} for size in gpus],
            "models": filled,
            "gateway": {"port": port, **gateway},
        }
        self.config.write_text(json.dumps(content))

    def serve(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a serve."""
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.config), "serve", *words]
        with self.log.open("ab") as file:
            process = subprocess.Popen(command, env=self.env, stdout=file, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.folder / "serve.log"

    def verb(self, *words: str) -> str:
        """Run a verb to its end; what it says."""
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.config), *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout

    def until(self, condition: Callable[[], object], limit: float = 60.0) -> None:
        """Wait for a condition; the log tells why it never came."""
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def until_said(self, text: str) -> None:
        """Wait until the log holds a text."""
        self.until(lambda: text in self.log.read_text())

    def answers(self) -> bool:
        """Whether somebody listens."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.base}/health", timeout=20).status_code == 200
        return False

    def states(self) -> dict[str, str]:
        """The state of each model, as the gateway lists it."""
        listed = httpx.get(f"{self.url}/models", timeout=60).json()["data"]
        return {entry["id"]: entry["state"] for entry in listed}

    def requests(self) -> list[dict[str, Any]]:
        """The requests under way."""
        found: list[dict[str, Any]] = httpx.get(f"{self.base}/running", timeout=60).json()["requests"]
        return found

    def chat(self, model: str, text: str = "hello", **more: Any) -> httpx.Response:
        """One question, not streamed."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 4} | more
        return httpx.post(f"{self.url}/chat/completions", json=body, timeout=60)

    def close(self) -> None:
        """Stop the models through the product and end every serve."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.verb("stop", "--all", "--force")
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with contextlib.suppress(subprocess.CalledProcessError):
            self.verb("stop", "--all", "--force")


MakeGated = Callable[..., Gated]


@pytest.fixture
def gated(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[MakeGated]:
    """Makes one; with `serve` at once unless told otherwise."""
    made: list[Gated] = []

    def make(
        models: dict[str, dict[str, Any]] | None = None,
        *,
        gpus: list[str] | None = None,
        speed: str = "instant",
        begins: bool = True,
        **gateway: Any,
    ) -> Gated:
        folder = tmp_path / f"gated{len(made)}"
        made.append(Gated(folder, free_port(), models or TWO, gateway, gpus or ["24GiB"], speed))
        if begins:
            made[-1].serve()
            made[-1].until(made[-1].answers)
        return made[-1]

    yield make
    for each in made:
        each.close()
