"""The servers that the contract is checked on, and how a test starts and ends one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.ports import PORTS

GIB = 1 << 30
NAME = "contract"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 8, "temperature": 0}
FIXED_IDS = [11, 48, 7, 100, 23, 64, 5, 90, 31, 77, 12, 8]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of server."""

    name: str
    command: Callable[[], Sequence[str]]
    flags: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_seconds: float = 300.0
    endless_tokens: int = 4000
    """So many take seconds, in which a test comes to its point."""
    frees_memory: bool = False


def _from_environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set: the contract needs a vllm binary and a model.", pytrace=False)
    return value


def _cpu_command() -> list[str]:
    models = os.environ.get("VLLM_CPU_MODELS")
    model = str(Path(models) / "tiny") if models else _from_environment("VLLM_CPU_MODEL")
    return [_from_environment("VLLM_CPU_COMMAND"), "serve", model]


SIMULATOR = Backend(
    name="simulator",
    command=lambda: [sys.executable, "-m", "vllm_sleep_tui.simulator", "serve", "Qwen/Qwen3-0.6B"],
    flags=["--enable-sleep-mode", "--gpu-memory-utilization", "0.5"],
    environment={"VLLM_SIM_SPEED": "25"},
    ready_seconds=120.0,
    endless_tokens=30_000,
    frees_memory=True,
)
CPU = Backend(
    name="cpu",
    command=_cpu_command,
    flags=["--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "4096"],
    environment={
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    },
)
GPU = Backend(
    name="gpu",
    command=lambda: [_from_environment("VLLM_GPU_COMMAND"), "serve", _from_environment("VLLM_GPU_MODEL")],
    flags=["--enable-sleep-mode", "--gpu-memory-utilization", "0.3", "--max-model-len", "8192"],
    environment={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    frees_memory=True,
)


class Server:
    """One running server: its process, its log, and requests to it."""

    def __init__(self, backend: Backend, folder: Path, *flags: str, **environment: str) -> None:
        self.backend = backend
        self.port = next(PORTS)
        self.log = folder / f"{self.port}.log"
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", NAME]
        common = [*address, "--enable-server-load-tracking"]
        self.command = [*backend.command(), *common, *backend.flags, *flags]
        given = {"VLLM_SERVER_DEV_MODE": "1", **backend.environment, **environment}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **given},
                start_new_session=True,
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30.0)

    def wait_ready(self) -> Server:
        """Until /health is 200; fails with the log's end if the process ends first."""
        wait_for(self._healthy_or_ended, self.backend.ready_seconds)
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return self

    def _healthy_or_ended(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200
        return self.process.poll() is not None

    def post(self, path: str, body: Any = None, *, timeout: float = 60.0) -> httpx.Response:
        """POST on a connection of its own: vLLM drops a kept one after a 500 without saying so.

        It is the answer that is waited for so long; the way there may take longer on a busy machine.
        """
        url = f"http://127.0.0.1:{self.port}{path}"
        limit = httpx.Timeout(60.0, read=timeout)
        return (
            httpx.post(url, json=body, timeout=limit) if body is not None else httpx.post(url, timeout=limit)
        )

    def get(self, path: str) -> httpx.Response:
        """GET on a connection of its own."""
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=30.0)

    def is_sleeping(self) -> bool:
        """What the engine says."""
        return bool(self.get("/is_sleeping").json()["is_sleeping"])

    def children(self) -> list[psutil.Process]:
        """All processes below `vllm serve`."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        """The EngineCore process."""
        return next(child for child in self.children() if title(child).startswith("VLLM::EngineCore"))

    def wait_exit(self, seconds: float = 60.0) -> int:
        """The exit code."""
        return self.process.wait(timeout=seconds)

    def close(self) -> None:
        """End the whole group, whatever state it is in."""
        self.http.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


def title(process: psutil.Process) -> str:
    """The title that vLLM gives a process, without its padding."""
    with contextlib.suppress(psutil.Error, IndexError):
        return process.cmdline()[0].strip()
    return ""


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until the condition holds; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@contextlib.contextmanager
def running(backend: Backend, folder: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server for the time of a block; not waited for."""
    server = Server(backend, folder, *flags, **environment)
    try:
        yield server
    finally:
        server.close()
