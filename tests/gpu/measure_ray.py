"""One model over two GPUs by ray: start, both levels, a chat, stop; left out in words where that cannot be.

    python tests/gpu/measure_ray.py --out DIR [--backend ray] [--simulated SIZE …]

The environment names vLLM and the model (`gpu_config.py`). The result is DIR/ray.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pynvml
from command_line import CommandLine, write_config
from gpu_config import PASSED_ON

LIFE = (
    ("start", "over-two"),
    ("sleep", "over-two", "--level", "1"),
    ("wake", "over-two"),
    ("sleep", "over-two", "--level", "2"),
    ("wake", "over-two"),
    ("chat", "over-two", "What is the capital of France?"),
    ("stop", "over-two"),
)


def can_import(backend: str) -> bool:
    """Whether vLLM's own Python has the package of this backend; `mp` needs none."""
    if backend != "ray":
        return True
    program = Path(shutil.which(shlex.split(os.environ["VLLM_GPU_COMMAND"])[0]) or "python3")
    python = program if program.name.startswith("python") else program.with_name("python")
    done = subprocess.run([python, "-c", "import ray"], capture_output=True, check=False)
    return done.returncode == 0


def config_of(out: Path, backend: str, simulated: Sequence[str]) -> Path:
    """One model on GPUs 0 and 1."""
    model = {
        "model": os.environ["VLLM_GPU_MODEL_A"],
        "gpus": [0, 1],
        "args": {
            "max-model-len": 2048,
            "gpu-memory-utilization": 0.4,
            "enforce-eager": True,
            "tensor-parallel-size": 2,
            "distributed-executor-backend": backend,
        },
        "env": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    gpus = [{"name": "Simulated", "memory": size} for size in simulated]
    more = {"simulated_gpus": gpus} if simulated else {}
    command = shlex.split(os.environ["VLLM_GPU_COMMAND"])
    return write_config(out / "ray.yaml", command, {"over-two": model}, **more)


def why_not(gpus: int, backend: str) -> str | None:
    """Why there is nothing to measure here; None if there is."""
    if gpus < 2:
        return f"Left out: it takes two GPUs, and this machine has {gpus}."
    if not can_import(backend):
        return f"Left out: vLLM's Python cannot import {backend}."
    return None


def gpus_here() -> int:
    """How many GPUs NVML lists."""
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetCount())


def measure(out: Path, backend: str, simulated: Sequence[str]) -> dict[str, Any]:
    """The whole life, step by step, or why not."""
    if reason := why_not(len(simulated) or gpus_here(), backend):
        return {"left out": reason}
    state_home = out / "ray-state"
    state_home.mkdir(exist_ok=True)
    panel = CommandLine(config=config_of(out, backend, simulated), state_home=state_home)
    steps: list[dict[str, Any]] = []
    for words in LIFE:
        began = time.perf_counter()
        done = panel.run(*words)
        model = panel.status()["over-two"]
        kept = {key: model[key] for key in ("state", "level", "vram_by_gpu", "pinned_bytes", "reason")}
        said = (done.stdout + done.stderr).strip()
        seconds = time.perf_counter() - began
        steps.append(
            {"verb": " ".join(words), "exit": done.returncode, "seconds": seconds, **kept, "said": said}
        )
        if done.returncode != 0:
            panel.run("stop", "--all", "--force")
            break
    return {"backend": backend, "steps": steps}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", default="ray")
    parser.add_argument(
        "--simulated", metavar="SIZE", nargs="+", default=(), help="simulated GPUs to try it on"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = measure(given.out.absolute(), given.backend, given.simulated)
    (given.out / "ray.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
