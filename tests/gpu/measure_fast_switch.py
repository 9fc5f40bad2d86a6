"""Measures the fast sleep mode beside vLLM's own: four servers on one GPU, in turn, in one run.

    python tests/gpu/measure_fast_switch.py --out DIR [--rounds 3] [--wakes 0]

The environment names vLLM and the two models (`gpu_config.py`). `sa` and `sb` run on vLLM's own sleep mode,
`oa` and `ob` on the fast one. A round is three switches each way: by hand and by the panel on vLLM's own, by
the panel at level 1 and at level 0 on the fast one. `--wakes` is the number of proven wakes from each level
after that. The result is DIR/fast-switch.jsonl, a line as each thing is known; times in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import write_config
from gpu_config import PASSED_ON, missing
from raw_server import RawServer

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.store.records import RecordStore

MODELS = {
    "sb": ("VLLM_GPU_MODEL_B", "stock"),
    "sa": ("VLLM_GPU_MODEL_A", "stock"),
    "ob": ("VLLM_GPU_MODEL_B", "auto"),
    "oa": ("VLLM_GPU_MODEL_A", "auto"),
}
SWITCHES = 3


def write_fleet(folder: Path, share: float, simulated: str | None) -> Path:
    """The config of the four; all of them asleep beside one awake must fit."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    args = {"max-model-len": 4096, "gpu-memory-utilization": share}
    models = {
        name: {
            "model": os.environ[variable],
            "level": 1,
            "sleep_backend": backend,
            "args": args,
            "env": passed,
        }
        for name, (variable, backend) in MODELS.items()
    }
    more = {"simulated_gpus": [{"name": "Simulated", "memory": simulated}]} if simulated else {}
    command = shlex.split(os.environ["VLLM_GPU_COMMAND"])
    return write_config(folder / "fast-switch.yaml", command, models, **more)


class Run:
    """One measurement; what is known is written at once."""

    def __init__(self, fleet: Fleet, store: RecordStore, out: Path) -> None:
        self.fleet, self.store, self.out = fleet, store, out
        self.rows: list[dict[str, Any]] = []

    def note(self, **line: Any) -> None:
        """Write one line."""
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def took(self, how: str, to: str, began: float, **phases: float) -> None:
        """Write one switch."""
        row = {"how": how, "to": to[1], "total": time.perf_counter() - began, "phases": phases}
        self.rows.append(row)
        self.note(**row)

    def by_hand(self, leaving: str, target: str) -> None:
        """The same calls without the panel."""
        old, new = RawServer(self.store.read(leaving)), RawServer(self.store.read(target))
        try:
            began = time.perf_counter()
            phases = {"sleep": old.sleep(1), "wake": new.wake(1), "prove": new.first_token()}
            self.took("by hand", target, began, **phases)
        finally:
            old.close()
            new.close()

    async def by_panel(self, how: str, target: str) -> None:
        """One switch."""
        began = time.perf_counter()
        ledger = await self.fleet.switch(target)
        known = {name: seconds for name, seconds in ledger.phases.items() if seconds is not None}
        self.took(how, target, began, **known)

    async def at_level(self, level: int, leaving: str, target: str) -> None:
        """One sleep at a level and one wake, proven."""
        began = time.perf_counter()
        await self.fleet.sleep(leaving, level=level)
        await self.fleet.wake(target)
        assert self.store.read(target).proof == "proven", f"{target} is not proven at level {level}"
        self.took(f"fast, level {level}", target, began)

    async def round(self) -> None:
        """Three switches each way of every kind."""
        await self.fleet.switch("sa")
        for _ in range(SWITCHES):
            self.by_hand("sa", "sb")
            self.by_hand("sb", "sa")
        for target in ("sb", "sa") * SWITCHES:
            await self.by_panel("vLLM's own", target)
        await self.fleet.switch("oa")
        for target in ("ob", "oa") * SWITCHES:
            await self.by_panel("fast, level 1", target)
        await self.resident()
        for leaving, target in (("oa", "ob"), ("ob", "oa")) * SWITCHES:
            await self.at_level(0, leaving, target)
        await self.fleet.sleep("ob", level=1)

    async def resident(self) -> None:
        """`ob` at level 0, `oa` awake."""
        await self.fleet.switch("ob")
        await self.fleet.sleep("ob", level=0)
        await self.fleet.wake("oa")

    async def prove(self, wakes: int) -> None:
        """So many wakes from each level."""
        for level in (1, 0):
            if level == 0:
                await self.resident()
            for turn in range(wakes):
                pair = ("oa", "ob") if turn % 2 == 0 else ("ob", "oa")
                await self.at_level(level, *pair)
            if self.store.read("oa").state != "awake":
                await self.fleet.switch("oa")
        self.note(proven=wakes)

    def summary(self) -> None:
        """Medians against the calls by hand; the first of each kind is left out."""
        by_kind: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            by_kind.setdefault((row["how"], row["to"]), []).append(row["total"])
        medians = {kind: statistics.median(totals[1:] or totals) for kind, totals in by_kind.items()}
        for (how, to), median in medians.items():
            self.note(summary=how, to=to, median=median, ratio=median / medians["by hand", to])


async def main() -> None:
    """Start, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wakes", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.75, help="gpu-memory-utilization of each.")
    parser.add_argument("--simulated", help="Try it without a GPU: the memory of one, such as 80GiB.")
    options = parser.parse_args()
    if lacks := missing():
        sys.exit(f"Not set: {'; '.join(lacks)}")
    state = options.out / "state"
    state.mkdir(parents=True, exist_ok=True)
    loaded = load(write_fleet(options.out, options.share, options.simulated))
    async with Fleet(loaded, state) as fleet:
        run = Run(fleet, RecordStore(state, loaded.path), options.out / "fast-switch.jsonl")
        for name in MODELS:
            await fleet.start([name])
            model = fleet.snapshot().model(name)
            run.note(started=name, sleep_backend=model.sleep_backend, why=model.sleep_backend_why)
        for _ in range(options.rounds):
            await run.round()
        await run.prove(options.wakes)
        run.summary()
        await fleet.stop(list(MODELS), force=True)


if __name__ == "__main__":
    asyncio.run(main())
