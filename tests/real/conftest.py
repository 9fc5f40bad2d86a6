"""Two real models on real vLLM on the CPU, started once for each file of tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine, write_config

CHEAP = {"enforce-eager": True, "kv-cache-memory-bytes": "128M", "max-model-len": 2048}
"""Without compilation a server starts in 30 s instead of 145; the rest keeps it small (vLLM 0.32)."""
SAME_ANSWER = {"dtype": "float32", "override-generation-config": {"temperature": 0}}
"""A model of 135 million parameters knows Paris, but at vLLM's default temperature says so only mostly; and
in BF16, on processors with AMX, it says something else (vLLM 0.32, measured; transformers says Paris)."""
SHARED_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""By default every server takes core 0 for itself (vLLM 0.32); and two threads that wait for each other at
every operator take seven times as long as one where others use the cores too (measured at a load of 3)."""


def from_environment(name: str) -> Path:
    """A path that `.ci/run` hands over; the tests cannot do without it."""
    value = os.environ.get(name)
    if not value:
        pytest.fail(
            f"{name} is not set: `.ci/run` installs vLLM, makes the models and sets it.", pytrace=False
        )
    return Path(value)


def model_config(name: str, **changes: Any) -> dict[str, Any]:
    """One model's part of the config: on the CPU, nothing compiled."""
    folder = from_environment("VLLM_CPU_MODELS") / name
    return {"model": str(folder), "gpus": [], "args": CHEAP | SAME_ANSWER, "env": SHARED_CORES} | changes


def command_line(folder: Path, models: dict[str, Any]) -> CommandLine:
    """The product's command line on a config of these models."""
    config = write_config(folder / "config.yaml", [str(from_environment("VLLM_CPU_COMMAND"))], models)
    return CommandLine(config=config, state_home=folder / "state")


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """smollm2, which knows things, and tiny, which is random; a test starts what it needs with `switch`."""
    panel = command_line(
        tmp_path_factory.mktemp("two"), {name: model_config(name) for name in ("smollm2", "tiny")}
    )
    yield panel
    panel.close()


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[dict[str, Any]], CommandLine]:
    """A config of smollm2 alone, with changes that keep it from starting."""
    return lambda changes: command_line(tmp_path, {"smollm2": model_config("smollm2", **changes)})
