"""Servers for the contract: one for each file and backend, and more for tests that end theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contract_backends import CPU, GIB, GPU, SIMULATOR, Backend, Server, running

from vllm_sleep_tui.simulator import devices

BACKENDS = [
    pytest.param(SIMULATOR, id="simulator"),
    pytest.param(CPU, id="cpu", marks=pytest.mark.real),
    pytest.param(GPU, id="gpu", marks=pytest.mark.gpu),
]


def make_gpus(folder: Path, count: int = 2) -> Path:
    """Simulated cards of 24 GiB and 64 GiB of RAM."""
    devices.create(folder, [("Simulated", 24 * GIB)] * count, ram_total_bytes=64 * GIB)
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The kind of server."""
    chosen: Backend = request.param
    return chosen


@pytest.fixture(scope="module")
def server(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of the file; each leaves it awake."""
    folder = tmp_path_factory.mktemp(backend.name)
    gpus = make_gpus(folder / "gpus")
    with running(backend, folder, VLLM_SLEEP_TUI_SIMULATED_GPUS=str(gpus)) as started:
        yield started.wait_ready()


@pytest.fixture
def start(backend: Backend, tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """Starts a server of the test's own."""
    gpus = make_gpus(tmp_path / "gpus")
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(running(backend, tmp_path, VLLM_SLEEP_TUI_SIMULATED_GPUS=str(gpus)))


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    """A folder of simulated GPUs."""
    return make_gpus(tmp_path / "gpus")


@pytest.fixture
def simulate(gpus: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts simulated servers on one set of GPUs."""
    with contextlib.ExitStack() as stack:

        def begin(*flags: str, **environment: str) -> Server:
            given = {"VLLM_SLEEP_TUI_SIMULATED_GPUS": str(gpus), **environment}
            return stack.enter_context(running(SIMULATOR, tmp_path, *flags, **given))

        yield begin
