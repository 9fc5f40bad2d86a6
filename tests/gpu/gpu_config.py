"""The config of the two models on GPU 0 that the GPU tests and `measure.py` use."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from command_line import write_config

NEEDED = {
    "VLLM_GPU_COMMAND": 'how vLLM is run, such as "vllm" or "python3 -m vllm.entrypoints.cli.main"',
    "VLLM_GPU_MODEL_A": "a small model, a hub name or a folder",
    "VLLM_GPU_MODEL_B": "another one",
}
PASSED_ON = ("PYTHONPATH", "VLLM_USE_FLASHINFER_SAMPLER")
"""Where vLLM is found and what its build lacks: the panel hands its own PYTHONPATH to no server."""


def missing() -> list[str]:
    """The variables that are not set."""
    return [name for name in NEEDED if not os.environ.get(name)]


def write_pair(folder: Path, level: int | str, *, simulated: str | None = None) -> Path:
    """Write a config of models `a` and `b` at this level; `simulated` is the size of a simulated GPU 0.

    Without a `gpu-memory-utilization` of their own each gets nearly the whole GPU, so only one fits awake.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {
        "gpus": [0],
        "level": level,
        "args": {"max-model-len": 2048},
        "env": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    models = {
        "a": shared | {"model": os.environ["VLLM_GPU_MODEL_A"]},
        "b": shared | {"model": os.environ["VLLM_GPU_MODEL_B"]},
    }
    command = shlex.split(os.environ["VLLM_GPU_COMMAND"])
    more = {"simulated_gpus": [{"name": "Simulated", "memory": simulated}]} if simulated else {}
    return write_config(folder / f"level-{level}.yaml", command, models, **more)
