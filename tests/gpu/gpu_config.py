"""The configs of the models on GPU 0 that the GPU tests and the measuring scripts use."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command_line import write_config

NEEDED = {
    "VLLM_GPU_COMMAND": 'how vLLM is run, such as "vllm" or "python3 -m vllm.entrypoints.cli.main"',
    "VLLM_GPU_MODEL_A": "a small model, a hub name or a folder",
    "VLLM_GPU_MODEL_B": "another one",
}
BOX_NEEDED = NEEDED | {"VLLM_GPU_MODEL_CHAT": "a small model with real weights, for the chat and the proof"}
PAIR = ("qwen", "phi")
"""The small and the large model that are switched between."""
BOX_MODELS = {
    "smol": "VLLM_GPU_MODEL_CHAT",
    "qwen": "VLLM_GPU_MODEL_A",
    "phi": "VLLM_GPU_MODEL_B",
    "moe": "VLLM_GPU_MODEL_MOE",
}
"""What the models are called on the box; the last one, a small mixture of experts, may be left out."""
PASSED_ON = ("PYTHONPATH", "VLLM_USE_FLASHINFER_SAMPLER")
"""Where vLLM is found and what its build lacks: the panel hands its own PYTHONPATH to no server."""


def missing(needed: Mapping[str, str] = NEEDED) -> list[str]:
    """The variables that are not set, each with what it is for."""
    return [f"{name} ({meaning})" for name, meaning in needed.items() if not os.environ.get(name)]


def write_box(folder: Path, *, simulated: str | None = None) -> Path:
    """Write the config of the box: `qwen` and `phi` with CUDA graphs, `smol` and `moe` quick to start.

    Any two of which one is of the pair do not fit awake together. Folders of models are linked below
    `models/`, so that pictures and logs show no more of where they lie.
    """
    shared = {"gpus": [0], "env": {name: os.environ[name] for name in PASSED_ON if name in os.environ}}
    most = {"args": {"max-model-len": 2048, "gpu-memory-utilization": 0.85}}
    quick = {"args": {"max-model-len": 2048, "gpu-memory-utilization": 0.25, "enforce-eager": True}}
    models = {
        name: shared | (most if name in PAIR else quick) | {"model": link(folder, name, os.environ[variable])}
        for name, variable in BOX_MODELS.items()
        if variable in os.environ
    }
    more = {"simulated_gpus": [{"name": "Simulated", "memory": simulated}]} if simulated else {}
    return write_config(folder / "box.yaml", shlex.split(os.environ["VLLM_GPU_COMMAND"]), models, **more)


def link(folder: Path, name: str, model: str) -> str:
    """The model below `models/` if it is a folder here; a hub name as it is."""
    if not Path(model).is_dir():
        return model
    (folder / "models").mkdir(parents=True, exist_ok=True)
    path = folder / "models" / name
    path.unlink(missing_ok=True)
    path.symlink_to(Path(model).absolute())
    return f"models/{name}"


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
