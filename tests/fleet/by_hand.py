"""Servers that a person, or somebody else, started by hand beside ours."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fleet.conftest import SIMULATOR


def answers(port: int, path: str) -> int | None:
    """The status of a GET; None if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def wait_for(process: subprocess.Popen[bytes], port: int, path: str) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + 60
    while answers(port, path) != 200:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.02)


@contextmanager
def vllm(
    port: int,
    *flags: str,
    name: str = "theirs",
    model: str = "sim/1GiB",
    gpus: Path | None = None,
    **env: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """A `vllm serve` that is not ours; with `gpus` on the simulated GPUs of that folder."""
    given = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_SIM_TIMES": "instant", **env}
    if gpus is not None:
        given |= {"VLLM_SLEEP_TUI_SIMULATED_GPUS": str(gpus), "CUDA_VISIBLE_DEVICES": "0"}
    address = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    sleeps = ["--enable-sleep-mode"] if gpus is not None else []
    process = subprocess.Popen(
        [*SIMULATOR, "serve", model, *address, *sleeps, "--max-model-len", "2048", *flags],
        env=os.environ | given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(process, port, "/health")
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def web_server(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Any program that listens on the port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(process, port, "/")
        yield process
    finally:
        process.kill()
        process.wait(60)
