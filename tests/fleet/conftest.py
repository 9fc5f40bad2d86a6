"""Fleets of simulated servers: real processes, real sockets, memory that they share."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet import beside
from tests.fleet.beside import record_of
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, Progress
from vllm_sleep_tui.fleet.states import State

GIB = 2**30
LIMIT = 60.0
"""Seconds that a test waits for what must come; many, as it costs time only where it does not come."""
SIMULATOR = [sys.executable, "-m", "vllm_sleep_tui.simulator"]


class Box:
    """A machine with simulated GPUs and models; `open` gives a fleet, as often as there are panels."""

    def __init__(self, folder: Path, models: dict[str, dict[str, Any]], gpus: list[str], speed: str) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.state_dir.mkdir(exist_ok=True)
        self.config = folder / "vllm-sleep-tui.yaml"
        self.progress: list[Progress] = []
        self.speed = speed
        self.write(models, gpus)

    def write(self, models: dict[str, dict[str, Any]], gpus: list[str]) -> None:
        """Write the config; JSON is YAML."""
        timing = {"VLLM_SIM_TIMES": "instant"} if self.speed == "instant" else {"VLLM_SIM_SPEED": self.speed}
        for model in models.values():
            if "url" in model:
                continue
            model.setdefault("args", {}).setdefault("max-model-len", 2048)
            model["env"] = {**timing, **model.get("env", {})}
        content = {
            "vllm_command": SIMULATOR,
            "simulated_gpus": [{"name": "Test", "memory": size} for size in gpus],
            "models": models,
        }
        self.config.write_text(json.dumps(content))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Fleet]:
        """One panel's fleet."""
        async with Fleet(load(self.config), self.state_dir) as fleet:
            yield fleet

    def report(self, progress: Progress) -> None:
        """Remembers what an operation told."""
        self.progress.append(progress)

    @property
    def names(self) -> list[str]:
        """The models that it can start and stop."""
        return [name for name, model in load(self.config).config.models.items() if model.url is None]


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Callable[..., Box]]:
    """Makes a box; whatever runs in it at the end of the test is stopped through the product."""
    made: list[Box] = []

    def make(
        models: dict[str, dict[str, Any]] | None = None, gpus: list[str] | None = None, speed: str = "instant"
    ) -> Box:
        chosen = models or {"a": {"model": "sim/1GiB"}, "b": {"model": "sim/4GiB"}}
        folder = tmp_path / f"box{len(made)}"
        folder.mkdir()
        made.append(Box(folder, chosen, gpus if gpus is not None else ["24GiB"], speed))
        return made[-1]

    yield make
    await beside.close()
    for each in made:
        async with each.open() as fleet:
            await fleet.stop(each.names, force=True)


def seen(fleet: Fleet, name: str) -> ModelSnapshot:
    """The model now."""
    return fleet.snapshot().model(name)


async def until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def until_state(fleet: Fleet, name: str, state: State, limit: float = LIMIT) -> ModelSnapshot:
    """Wait until the model is in a state."""
    await until(lambda: seen(fleet, name).state is state, limit)
    return seen(fleet, name)


async def inject(fleet: Fleet, name: str, *faults: str) -> None:
    """Switch faults of a running simulated server on."""
    transport = httpx.AsyncHTTPTransport(uds=record_of(fleet, name).socket)
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.post("http://127.0.0.1/simulator/faults", json={"faults": list(faults)})
    assert answer.status_code == 200, answer.text
