"""Measures the fast sleep mode beside vLLM's own: four servers on one GPU, in turn, in one run.

    python tests/gpu/measure_fast_switch.py --out DIR [--rounds 3] [--verbs] [--wakes 0] [--kills] [--keep]

The environment names vLLM and the two models (`gpu_config.py`). `sa` and `sb` run on vLLM's own sleep mode,
`oa` and `ob` on the fast one, and `oc` where VLLM_GPU_MODEL_MOE names a third model. A round is three
switches each way: by hand and by the panel on vLLM's own, by the panel at level 1 and at level 0 on the fast
one; with `--verbs` two each way by `switch` on the command line as well, whose times are without the start of
its process (with it: `process`). After that `--wakes` is the number of proven switches at each level, with
garbage three times for each model, and `--kills` ends the pool's holder, an engine and a keeper, each once.
With `--dummy` vLLM makes up the weights, so that the models' folders need none; garbage is not tried then.
With `--keep` the servers run on, and the same command goes on with them. The result is
DIR/fast-switch.jsonl, a line as each thing is known; times in seconds, memory in bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure_proof
import msgspec
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import write_config
from gpu_config import PASSED_ON, missing
from raw_server import RawServer

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.pool import pools_here
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.paths import APP
from vllm_sleep_tui.sizing.footprints import FootprintStore

STOCK = {"sb": "VLLM_GPU_MODEL_B", "sa": "VLLM_GPU_MODEL_A"}
FAST = {"ob": "VLLM_GPU_MODEL_B", "oc": "VLLM_GPU_MODEL_MOE", "oa": "VLLM_GPU_MODEL_A"}
MODELS = {name: variable for name, variable in (STOCK | FAST).items() if variable in os.environ}
TURN = [name for name in FAST if name in MODELS]
"""The fast ones as they take turns; there may be a third one."""
SWITCHES = 3
REST_SECONDS = 0.1
"""Before each switch of whatever kind: what the last one left to be written is written by then."""
LOOK_SECONDS = 1.5


def write_fleet(options: argparse.Namespace, level: int) -> Path:
    """The config of the four, the fast ones at this level; all of them asleep beside one awake must fit."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    args = {"max-model-len": 4096, "gpu-memory-utilization": options.share}
    if options.gpus > 1:
        args["tensor-parallel-size"] = options.gpus
    if options.dummy:
        args["load-format"] = "dummy"
    if options.eager:
        args["enforce-eager"] = True
    if options.quantization:
        args["quantization"] = options.quantization
    models = {
        name: {
            "model": os.environ[variable],
            "gpus": list(range(options.first_gpu, options.first_gpu + options.gpus)),
            "level": level if name in FAST else 1,
            "sleep_backend": "auto" if name in FAST else "stock",
            "args": args,
            "env": passed,
        }
        for name, variable in MODELS.items()
    }
    simulated = [{"name": "Simulated", "memory": options.simulated}] * (options.first_gpu + options.gpus)
    more = {"simulated_gpus": simulated} if options.simulated else {}
    command = shlex.split(os.environ["VLLM_GPU_COMMAND"])
    return write_config(options.out / "fast-switch.yaml", command, models, **more)


class Run:
    """One measurement; what is known is written at once."""

    def __init__(self, fleet: Fleet, configs: Mapping[int, LoadedConfig], state: Path, out: Path) -> None:
        self.fleet, self.configs, self.state, self.out = fleet, configs, state, out
        self.store = RecordStore(state, configs[1].path)
        self.rows: list[dict[str, Any]] = []

    @contextlib.asynccontextmanager
    async def at_level(self, level: int) -> AsyncIterator[None]:
        """The same servers with the fast ones' level changed, as an edit of the config does."""
        before = self.fleet
        for name in TURN:  # as a start with that level would have written it
            record = self.store.read(name)
            self.store.write(msgspec.structs.replace(record, resolved_level=str(level)))
        async with Fleet(self.configs[level], self.state) as self.fleet:
            yield
        self.fleet = before
        if level == 0:
            await self.fleet.switch("oa")
            for name in TURN[:-1]:
                await self.fleet.sleep(name, level=1)
            for name in TURN:
                self.store.write(msgspec.structs.replace(self.store.read(name), resolved_level="1"))

    def note(self, **line: Any) -> None:
        """Write one line."""
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def took(self, how: str, to: str, began: float, **phases: float) -> None:
        """Write one switch."""
        row = {"how": how, "to": to[1], "total": time.perf_counter() - began, "phases": phases}
        self.rows.append(row)
        self.note(**row)

    async def by_hand(self, leaving: str, target: str) -> None:
        """The same calls without the panel."""
        await asyncio.sleep(REST_SECONDS)
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
        await asyncio.sleep(REST_SECONDS)
        began = time.perf_counter()
        ledger = await self.fleet.switch(target)
        known = {name: seconds for name, seconds in ledger.phases.items() if seconds is not None}
        self.took(how, target, began, **known)

    async def by_verb(self, how: str, target: str) -> None:
        """One switch by a command of its own."""
        await asyncio.sleep(REST_SECONDS)
        began = time.perf_counter()
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.configs[1].path)]
        environment = os.environ | {"XDG_STATE_HOME": str(self.state.parent)}
        process = await asyncio.create_subprocess_exec(
            *command, "switch", target, cwd=Path(__file__).parents[2], env=environment
        )
        assert await process.wait() == 0
        seconds = time.perf_counter() - began
        ledger = self.store.read(target).last_switch
        assert ledger is not None
        known = {name: part for name, part in ledger.phases.items() if part is not None}
        row = {"how": how, "to": target[1], "total": ledger.total, "process": seconds, "phases": known}
        self.rows.append(row)
        self.note(**row)

    async def round(self, *, verbs: bool) -> None:
        """Three switches each way of every kind."""
        by_verb = ("ob", "oa") * 2 if verbs else ()
        await self.fleet.switch("sa")
        for _ in range(SWITCHES):
            await self.by_hand("sa", "sb")
            await self.by_hand("sb", "sa")
        for target in ("sb", "sa") * SWITCHES:
            await self.by_panel("vLLM's own", target)
        await self.fleet.switch("oa")
        for target in ("ob", "oa") * SWITCHES:
            await self.by_panel("fast, level 1", target)
        for target in by_verb:
            await self.by_verb("fast, level 1, a verb", target)
        async with self.at_level(0):
            for target in ("ob", "oa") * (SWITCHES + 1):
                await self.by_panel("fast, level 0", target)
            for target in by_verb:
                await self.by_verb("fast, level 0, a verb", target)

    async def prove(self, wakes: int, *, garbage: bool) -> None:
        """So many switches at each level; memory before and after. Then garbage, which level 2 makes."""
        for level in (0, 1):
            await self.fleet.switch("oa")
            async with self.at_level(level):
                for target in TURN * 2:
                    await self.fleet.switch(target)
                await self.memory(f"before {wakes} wakes at level {level}")
                for turn in range(wakes):
                    target = TURN[turn % len(TURN)]
                    await self.by_panel(f"proof, level {level}", target)
                    proof = self.store.read(target).proof
                    assert proof == "proven", f"{target} is {proof} at level {level}"
                await self.memory(f"after {wakes} wakes at level {level}")
        for name in TURN if garbage else ():
            await self.fleet.switch(name)
            found = await measure_proof.measure_running(self.store.read(name), 4)
            self.note(proof_of=name, **found)
        self.note(proven=wakes)

    async def memory(self, when: str) -> None:
        """VRAM of the device, RAM of the host and of the engines, once the sampler has looked again."""
        await asyncio.sleep(LOOK_SECONDS)
        gpus = self.fleet.snapshot().gpus
        models = [self.fleet.snapshot().model(name) for name in MODELS]
        self.note(
            memory=when,
            gpu_used=[gpu.used_bytes for gpu in gpus],
            pool=[gpu.pool_bytes for gpu in gpus],
            vram={model.name: model.vram_bytes for model in models},
            pinned={model.name: model.pinned_bytes for model in models},
            ram=psutil.virtual_memory().available,
        )

    async def kills(self) -> None:
        """The holder, an engine, a keeper: what the screen says, and what of the GPU stays taken."""
        await self.fleet.switch("oa")
        await self.memory("before the kills")
        for pool in pools_here():
            holder = pool.holder()
            assert holder is not None
            os.kill(holder.pid, signal.SIGKILL)
        for turn in range(4):
            await self.by_panel("after the holder was killed", ("ob", "oa")[turn % 2])
        await self.memory("after the holder was killed")
        await self.kill("an engine", "oa", lambda record: engine_of(record.server.pid))
        await self.kill("a keeper", "ob", lambda record: record.keeper.pid)

    async def kill(self, what: str, name: str, whom: Callable[[Any], int]) -> None:
        """Kill one process of an awake model, see it failed, and another one awake."""
        began = time.perf_counter()
        os.kill(whom(self.store.read(name)), signal.SIGKILL)
        while (model := self.fleet.snapshot().model(name)).state not in ("failed", "stopped"):
            await asyncio.sleep(0.02)
        self.note(killed=what, of=name, state=model.state, why=model.reason, seen=time.perf_counter() - began)
        await self.memory(f"{what} of {name} killed")
        other = "ob" if name == "oa" else "sa"
        if self.fleet.snapshot().model(other).state == "asleep":  # vLLM's own are not started by --fast-only
            await self.by_panel(f"after {what} was killed", other)
            await self.memory(f"after {what} was killed")

    def first_sleeps(self, names: Sequence[str]) -> None:
        """What the sleep at the end of each start took, which has the RAM pinned."""
        for name in names:
            record = self.store.read(name)
            assert record.digest is not None
            known = FootprintStore(self.state).get(record.digest, record.vllm_version)
            self.note(first_sleep=name, took=known.times.get("sleep1-first"))

    def summary(self) -> None:
        """Medians against the calls by hand; the first of each kind is left out."""
        by_kind: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            by_kind.setdefault((row["how"], row["to"]), []).append(row["total"])
        medians = {kind: statistics.median(totals[1:] or totals) for kind, totals in by_kind.items()}
        for (how, to), median in medians.items():
            by_hand = medians.get(("by hand", to))
            self.note(summary=how, to=to, median=median, ratio=by_hand and median / by_hand)


async def main() -> None:
    """Start, measure, stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wakes", type=int, default=0)
    parser.add_argument("--verbs", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--fast-only", action="store_true", help="no rounds, and vLLM's own is not started")
    parser.add_argument("--quantization")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs: starts in half the time")
    parser.add_argument("--dummy", action="store_true", help="load-format dummy: no files of weights")
    parser.add_argument("--gpus", type=int, default=1, help="that each model spans, by tensor parallelism")
    parser.add_argument("--first-gpu", type=int, default=0, help="where others are measured on too")
    parser.add_argument("--share", type=float, default=0.75, help="gpu-memory-utilization of each.")
    parser.add_argument("--simulated", help="Try it without a GPU: the memory of one, such as 80GiB.")
    options = parser.parse_args()
    if lacks := missing():
        sys.exit(f"Not set: {'; '.join(lacks)}")
    state = options.out / "state" / APP
    state.mkdir(parents=True, exist_ok=True)
    configs = {}
    for level in (0, 1):  # the file itself is the last one's
        configs[level] = load(write_fleet(options, level))
    async with Fleet(configs[1], state) as fleet:
        run = Run(fleet, configs, state, options.out / "fast-switch.jsonl")
        names = TURN if options.fast_only else list(MODELS)
        for name in names:
            began = time.perf_counter()
            await fleet.start([name])
            took = time.perf_counter() - began
            model = fleet.snapshot().model(name)
            run.note(started=name, took=took, sleep_backend=model.sleep_backend, why=model.sleep_backend_why)
        for _ in range(0 if options.fast_only else options.rounds):
            await run.round(verbs=options.verbs)
        run.summary()
        await run.memory("after the rounds")
        if options.wakes:
            await run.prove(options.wakes, garbage=not options.dummy)
        if options.kills:
            await run.kills()
        run.first_sleeps(names)
        run.summary()
        if options.keep:
            return
        await fleet.stop(names, force=True)
        await run.memory("stopped")


def engine_of(server: int) -> int:
    """The engine below an API server: what renames itself so, and the server itself in the simulator."""
    below = psutil.Process(server).children(recursive=True)
    found = [child.pid for child in below if "EngineCore" in " ".join(child.cmdline())]
    return found[0] if found else server


if __name__ == "__main__":
    asyncio.run(main())
