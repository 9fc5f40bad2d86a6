"""How soon a death is on the screen, written down, and its memory free: simulated servers, killed one by one.

    python benchmarks/deaths.py [--rounds 20]

The snapshot is looked at every 0.25 s, as the dashboard does. Seconds from the SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record, RecordStore
from vllm_sleep_tui.tui.screens.dashboard import TICK_SECONDS

KINDS = ("API server", "engine", "worker", "keeper")
STEPS = ("on the screen", "written down", "memory free")


def write_config(folder: Path) -> Path:
    """One model over two GPUs, so that it has workers."""
    model = {
        "model": "sim/4GiB",
        "gpus": [0, 1],
        "args": {"tensor-parallel-size": 2},
        "env": {"VLLM_SIM_TIMES": "instant"},
        "restart": "never",
    }
    content = {
        "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
        "simulated_gpus": [{"name": "Bench", "memory": "24GiB"}] * 2,
        "models": {"a": model},
    }
    path = folder / "vllm-sleep-tui.yaml"
    path.write_text(json.dumps(content))
    return path


def pid_of(record: Record, kind: str) -> int:
    """The process to kill; of the engines the first is the core, the last a worker."""
    process = {
        "API server": record.server,
        "engine": record.engines[0],
        "worker": record.engines[-1],
        "keeper": record.keeper,
    }[kind]
    assert process is not None
    return process.pid


async def one_death(fleet: Fleet, records: RecordStore, kind: str) -> dict[str, float]:
    """Start, kill, and watch what follows."""
    await fleet.start(["a"])
    seen: dict[str, float] = {}
    began = time.perf_counter()
    os.kill(pid_of(records.read("a"), kind), signal.SIGKILL)
    while len(seen) < len(STEPS):
        await asyncio.sleep(TICK_SECONDS)
        snapshot = fleet.snapshot()
        now = time.perf_counter() - began
        if snapshot.model("a").state is State.FAILED:
            seen.setdefault("on the screen", now)
        if records.read("a").state is State.FAILED:
            seen.setdefault("written down", now)
        if not any(gpu.used_bytes for gpu in snapshot.gpus):
            seen.setdefault("memory free", now)
    return seen


async def measure(folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every kind of process, in turn."""
    loaded = load(write_config(folder))
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    async with Fleet(loaded, folder) as fleet:
        records = RecordStore(folder, loaded.path)
        for _ in range(rounds):
            for kind in KINDS:
                found[kind].append(await one_death(fleet, records, kind))
        await fleet.stop(["a"])
    return found


def main() -> None:
    """Measure and print medians with the longest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), arguments.rounds))
    print("| killed |", " | ".join(STEPS), "|\n" + "|---" * (1 + len(STEPS)) + "|")
    for kind, deaths in found.items():
        cells = []
        for step in STEPS:
            seconds = [death[step] for death in deaths]
            cells.append(f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f}")
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
