"""Two real models on one GPU: `pytest -m gpu tests/gpu`, with these set:

VLLM_GPU_COMMAND   how vLLM is run there, such as "vllm" or "python3 -m vllm.entrypoints.cli.main"
VLLM_GPU_MODEL_A   a small model: a hub name or a folder
VLLM_GPU_MODEL_B   another one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest
from command_line import CommandLine
from gpu_config import missing, write_pair


@pytest.fixture(scope="session")
def gpu_zero_used() -> Iterator[Callable[[], int]]:
    """Bytes used on GPU 0, asked of NVML; fails with one sentence where these tests cannot run."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.fail(f"These tests need an NVIDIA GPU, and NVML says: {error}.", pytrace=False)
    if absent := missing():
        pytest.fail(f"Not set: {'; '.join(absent)}.", pytrace=False)
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    yield lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    pynvml.nvmlShutdown()


@pytest.fixture(scope="module", params=[1, 2], ids=["level 1", "level 2"])
def level(request: pytest.FixtureRequest) -> int:
    """The sleep level of both models."""
    return int(request.param)


@pytest.fixture(scope="module")
def pair(
    gpu_zero_used: Callable[[], int], level: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CommandLine]:
    """Both models started at one level, which cannot be awake together."""
    folder: Path = tmp_path_factory.mktemp("pair")
    panel = CommandLine(config=write_pair(folder, level), state_home=folder / "state")
    try:
        panel("start", "--all")
        yield panel
    finally:
        panel.close()
