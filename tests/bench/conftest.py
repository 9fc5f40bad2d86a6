"""Two models on one simulated GPU, stopped at the end through the product."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_pair import Bench
from command_line import write_config

SIMULATOR = [sys.executable, "-m", "vllm_sleep_tui.simulator"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes a fleet of `small` and `large`, and more models if wanted; all are stopped at the end."""
    made: list[Bench] = []

    def make(speed: float = 200.0, **more: dict[str, Any]) -> Bench:
        shared = {"args": {"max-model-len": 2048}, "env": {"VLLM_SIM_SPEED": f"{speed:g}"}}
        models = {
            "small": {"model": "sim/1GiB", **shared},
            "large": {"model": "sim/4GiB", **shared},
        }
        models |= {name: {**models.get(name, shared), **changes} for name, changes in more.items()}
        gpus = [{"name": "Test", "memory": "24GiB"}]
        config = write_config(tmp_path / "fleet.yaml", SIMULATOR, models, simulated_gpus=gpus)
        made.append(Bench(config, Path(os.environ["XDG_STATE_HOME"])))
        return made[-1]

    yield make
    for each in made:
        for hidden in each.config.parent.glob(".fleet.bench-*.yaml"):
            Bench(hidden, each.state_home).close()
        each.close()
