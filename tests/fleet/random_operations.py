"""Random sequences of operations, faults, cancels and deaths over simulated servers.

`python -m tests.fleet.random_operations --sequences 1000 --seed 1` is the long run.

The generator is our own and not hypothesis's state machine: that one begins every example from nothing and
repeats it to shrink it, and five servers take seconds to start; here they run on from sequence to sequence.
A problem is printed with the steps of its sequence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos.invariants import violations
from tests.fleet.watch import Watch
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import CancelledByUser, PanelError
from vllm_sleep_tui.fleet.core import Core, OperationLimits
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.operations.reconcile import is_unfinished
from vllm_sleep_tui.fleet.states import SETTLED, State
from vllm_sleep_tui.fleet.store.locks import hold, holder
from vllm_sleep_tui.telemetry.processes import ProcessId, signal_process

LIMITS = OperationLimits(drain=0.3, settle=0.2, call=2.0, call_per_gib=0.0)
STEP_LIMIT = 60.0
"""Seconds within which the operations of a step end, and again until all is settled."""
DEATH_SECONDS = 10.0
"""Within which a death must have been noticed, on a machine that has other work too."""
VERBS = {
    "switch": 8, "sleep": 3, "sleep 0": 2, "sleep 1": 2, "sleep 2": 2, "wake": 3, "start": 2,
    "start all": 0.2, "stop": 1, "restart": 0.4, "chat": 3,
}  # fmt: skip
"""How often each verb is begun."""
FAULTS = {
    "sleep_500:1": 2, "wake_500:1": 2, "wake_500:2": 2, "reload_500:1": 2, "engine_dies_on_sleep:1": 2,
    "engine_dies_on_wake:1": 2, "engine_dies_later:1": 1, "engine_dies:1": 1, "garbage_after_wake:1": 4,
    "garbage_after_wake:9": 3, "sleep_frees_nothing:1": 3, "sleep_slow:1": 4, "sleep_hangs:1": 1,
    "wake_hangs:1": 1, "hang": 1,
}  # fmt: skip
"""How often each fault is switched on."""
FAULT_SHARE, KILL_SHARE, CANCEL_SHARE = 0.25, 0.06, 0.15
FAST = "0.26.0"
"""Of the servers that run on our own sleep mode."""
VICTIMS = ("server", "engine", "keeper")


@dataclass
class Tally:
    """What was done and found."""

    sequences: int = 0
    steps: int = 0
    verbs: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    """How operations ended: done, refused, failed, cancelled."""
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """Seconds of the longest step."""

    def summary(self, seed: int, seconds: float) -> str:
        def told(counter: Counter[str]) -> str:
            return ", ".join(f"{what} {count}" for what, count in sorted(counter.items()))

        return (
            f"seed {seed}: {self.sequences} sequences, {self.steps} steps in {seconds:.0f} s; "
            f"operations: {told(self.verbs)}; ends: {told(self.ends)}; faults: {told(self.faults)}; "
            f"kills: {told(self.kills)}; longest step {self.slowest:.1f} s; {len(self.problems)} problems"
        )


@dataclass(frozen=True)
class Act:
    """One operation of a step: by which fleet, after how long, cancelled after how long."""

    fleet: int
    verb: str
    name: str
    delay: float
    cancel: float | None

    def __str__(self) -> str:
        cancelled = "" if self.cancel is None else f", cancelled after {self.cancel:.3f} s"
        return f"fleet {self.fleet}: {self.verb} {self.name} at {self.delay:.3f} s{cancelled}"


class RandomOperations:
    """One run: a config, two fleets, and what happens to their models."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.state_dir = folder / "state"
        self.state_dir.mkdir()
        self.config = folder / "vllm-sleep-tui.yaml"
        self.write_config()
        self.loaded = load(self.config)
        self.names = list(self.loaded.config.models)
        self.core = Core(self.loaded, self.state_dir)
        self.watch = Watch(self.core)
        self.tally = Tally()
        self.fleets: tuple[Fleet, ...] = ()

    def write_config(self) -> None:
        env = {"VLLM_SIM_TIMES": "instant"}
        share = {"gpu-memory-utilization": 0.4}
        models: dict[str, dict[str, object]] = {
            "one": {"model": "sim/1GiB", "gpus": [0], "level": 1},
            "two": {"model": "sim/2GiB", "gpus": [0], "level": 2},
            "none": {"model": "sim/1GiB", "gpus": [1], "level": "none", "args": share},
            "old": {"model": "sim/1GiB", "gpus": [1], "level": 1, "args": share},
            "wide": {"model": "sim/4GiB", "gpus": [0, 1], "args": {"tensor-parallel-size": 2}},
        }
        for name, model in models.items():
            version = {"old": "0.24.0", "one": FAST, "wide": FAST}.get(name)
            model["env"] = env | ({"VLLM_SIM_VERSION": version} if version else {})
        content = {
            "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
            "simulated_gpus": [{"name": "Random", "memory": "24GiB"}] * 2,
            "models": models,
        }
        self.config.write_text(json.dumps(content))

    async def run(self, sequences: int) -> Tally:
        """So many sequences, or fewer if one finds a problem; ends with everything stopped."""
        try:
            async with (
                Fleet(self.loaded, self.state_dir, limits=LIMITS) as first,
                Fleet(self.loaded, self.state_dir, limits=LIMITS) as second,
                self.watch,
            ):
                self.fleets = (first, second)
                while self.tally.sequences < sequences and not self.tally.problems:
                    await self.sequence()
                await first.stop(self.names, force=True)
        finally:
            await self.core.close()
        return self.tally

    async def sequence(self) -> None:
        """A few steps in a row; the logs of a good one are emptied."""
        told: list[str] = []
        self.tally.sequences += 1
        for _ in range(self.random.randint(2, 5)):
            self.tally.steps += 1
            began = time.monotonic()
            found = await self.step(told)
            self.tally.slowest = max(self.tally.slowest, time.monotonic() - began)
            if found:
                trace = "; ".join(told)
                self.tally.problems += [f"sequence {self.tally.sequences}: {p} [{trace}]" for p in found]
                return
        for log in (self.state_dir / "logs").glob("*.log"):
            os.truncate(log, 0)

    async def step(self, told: list[str]) -> list[str]:
        """A fault perhaps, some operations at once, a death perhaps; then what does not hold."""
        if self.random.random() < FAULT_SHARE:
            told.append(await self.misbehave())
        acts = [self.choose() for _ in range(self.random.choice((1, 1, 1, 2, 2, 3)))]
        told.append(" beside ".join(map(str, acts)))
        tasks = [asyncio.create_task(self.perform(act)) for act in acts]
        if self.random.random() < KILL_SHARE:
            await asyncio.sleep(self.random.uniform(0, 0.3))
            told.append(self.kill())
        _, late = await asyncio.wait(tasks, timeout=STEP_LIMIT)
        if late:
            return [f"{len(late)} operations have not ended after {STEP_LIMIT:.0f} s"]
        ends = [task.result() for task in tasks]
        self.tally.ends.update(end.split(":")[0] for end in ends)
        told.append(f"ended {ends}")
        wrong = [end for end in ends if end.startswith("wrong")]
        return wrong + await self.reconcile()

    # ── what is done ─────────────────────────────────────────────────────────────────────────────────────

    def choose(self) -> Act:
        verb = self.random.choices(list(VERBS), list(VERBS.values()))[0]
        return Act(
            fleet=self.random.randrange(2),
            verb=verb,
            name=self.random.choice(self.names),
            delay=self.random.choice((0.0, self.random.uniform(0, 0.1))),
            cancel=self.random.expovariate(8) if self.random.random() < CANCEL_SHARE else None,
        )

    async def perform(self, act: Act) -> str:
        """How the operation ended, in a word and a sentence."""
        await asyncio.sleep(act.delay)
        self.tally.verbs[act.verb] += 1
        task = asyncio.create_task(self.operate(self.fleets[act.fleet], act.verb, act.name))
        if act.cancel is not None:
            await asyncio.wait({task}, timeout=act.cancel)
            task.cancel()
        try:
            await task
        except (CancelledByUser, asyncio.CancelledError):
            return "cancelled"
        except PanelError as error:
            return f"{type(error).__name__}: {error.what}"
        except Exception as error:
            return f"wrong end: {error!r}"
        return "done"

    async def operate(self, fleet: Fleet, verb: str, name: str) -> None:
        match verb.split():
            case ["switch"]:
                await fleet.switch(name)
            case ["sleep", *level]:
                await fleet.sleep(name, level=int(level[0]) if level else None)
            case ["wake"]:
                await fleet.wake(name)
            case ["start"]:
                await fleet.start([name])
            case ["start", "all"]:
                await fleet.start(self.names)
            case ["stop"]:
                await fleet.stop([name])
            case ["restart"]:
                await fleet.restart([name])
            case ["chat"]:
                async for _ in fleet.chat(name, [{"role": "user", "content": "hello"}]):
                    pass

    async def misbehave(self) -> str:
        """Switch a fault on in a running server, in place of those it had."""
        name = self.random.choice(self.names)
        fault = self.random.choices(list(FAULTS), list(FAULTS.values()))[0]
        record = self.core.records.read(name)
        if record.state in (State.AWAKE, State.ASLEEP):
            with suppress(httpx.HTTPError):
                transport = httpx.AsyncHTTPTransport(uds=record.socket)
                async with httpx.AsyncClient(transport=transport) as client:
                    answer = await client.post("http://127.0.0.1/simulator/faults", json={"faults": [fault]})
                self.tally.faults[fault] += answer.status_code == 200
                return f"{name}: {fault} {answer.status_code}"
        return f"{name}: {fault} not possible"

    def kill(self) -> str:
        """SIGKILL to a process of a model."""
        name, kind = self.random.choice(self.names), self.random.choice(VICTIMS)
        record = self.core.records.read(name)
        victims: dict[str, tuple[ProcessId | None, ...]] = {
            "server": (record.server,),
            "engine": record.engines,
            "keeper": (record.keeper,),
        }
        for victim in victims[kind][:1]:
            if victim is not None and signal_process(victim, signal.SIGKILL):
                self.tally.kills[kind] += 1
                return f"{name}: {kind} killed"
        return f"{name}: no {kind} to kill"

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────

    async def reconcile(self) -> list[str]:
        """Wait until all is settled; what does not hold then, or did not while the step ran."""
        began, suspected = time.monotonic(), 0.0
        while time.monotonic() - began < STEP_LIMIT:
            if self.settled():
                async with self.everything_held():
                    found = [*await violations(self.core, self.watch.launches), *self.snapshots()]
                    if not found:
                        return self.watch.take()
                # A death takes a moment to be seen: what was killed last may look alive still.
                suspected = suspected or time.monotonic()
                if time.monotonic() - suspected > DEATH_SECONDS:
                    return [*found, *self.watch.take()]
            await asyncio.sleep(0.01)
        records = [self.core.records.read(name) for name in self.names]
        return [f"not settled after {STEP_LIMIT:.0f} s: {[(r.name, r.state, r.intent) for r in records]}"]

    def settled(self) -> bool:
        for name in self.names:
            record = self.core.records.read(name)
            if record.state not in SETTLED or record.intent or is_unfinished(self.core.model(name)):
                return False
        return True

    def snapshots(self) -> list[str]:
        """Where what a fleet shows is not what the record says."""
        found = []
        for number, fleet in enumerate(self.fleets):
            for model in fleet.snapshot().models:
                record = self.core.records.read(model.name)
                if model.state is not record.state:
                    found.append(f"fleet {number} shows {model.name} {model.state}, it is {record.state}")
        return found

    @asynccontextmanager
    async def everything_held(self) -> AsyncIterator[None]:
        """Every lock, so that nobody acts meanwhile."""
        paths = [*self.core.gpu_locks({0, 1}), *(self.core.model(name).lock for name in sorted(self.names))]
        async with hold(paths, holder("looking", "everything"), limit=STEP_LIMIT):
            yield


async def run(sequences: int, seed: int, folder: Path) -> int:
    """Run it and say what came of it; the exit code."""
    running = RandomOperations(folder, seed)
    began = time.monotonic()
    tally = await running.run(sequences)
    print(tally.summary(seed, time.monotonic() - began))
    for problem in tally.problems:
        print(f"  {problem}")
    return 1 if tally.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fleet.random_operations", description=__doc__)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for records and logs, kept afterwards")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    if given.keep:
        given.keep.mkdir(parents=True)
        return asyncio.run(run(given.sequences, given.seed, given.keep))
    with tempfile.TemporaryDirectory(prefix="random-") as folder:
        return asyncio.run(run(given.sequences, given.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
