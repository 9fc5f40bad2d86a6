"""A seeded storm of SIGKILLs over simulated servers; after each, what must hold is looked at."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos.actors import Actors
from tests.chaos.invariants import POOL_HOLDS, violations
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.operations.reconcile import is_unfinished
from vllm_sleep_tui.fleet.pool import LINGER_SECONDS
from vllm_sleep_tui.fleet.states import SETTLED, State
from vllm_sleep_tui.fleet.store.locks import hold, holder
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, signal_process, start_ticks

SPEED = "60"
SETTLE_LIMIT = 60.0
DEATH_SECONDS = 10.0
"""Within which a death must have been noticed, on a machine that has other work too."""
POOL_SECONDS = LINGER_SECONDS + DEATH_SECONDS
"""Within which a pool must be empty: the storm's own looks keep the locks from whoever would empty it."""
VERBS = {"switch": 6, "start": 3, "sleep": 4, "wake": 3, "stop": 2}
"""How often each verb is begun."""
VICTIMS = {"verb": 5, "leader": 2, "standby": 1, "keeper": 2, "server": 2, "engine": 2, "holder": 3}
"""How often each kind of process is killed."""


@dataclass
class Tally:
    """What the storm did and found."""

    kills: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    """What the model was doing when something was killed."""
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    """Seconds of the longest reconciliation."""

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def summary(self, seed: int, seconds: float) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kills.items()))
        states = ", ".join(f"{state} {count}" for state, count in sorted(self.states.items()))
        return (
            f"seed {seed}: {self.total} kills in {seconds:.0f} s ({kinds}; while {states}); "
            f"slowest reconciliation {self.slowest:.1f} s; {len(self.problems)} problems"
        )


class Storm:
    """One run: a config, two `serve`s, verbs, and their deaths."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.folder = folder
        self.config = folder / "vllm-sleep-tui.yaml"
        self.state_dir = folder / "vllm-sleep-tui"
        self.state_dir.mkdir()
        self.tally = Tally()
        self.launches: set[str] = set()
        self.spans = dict.fromkeys(VERBS, 1.0)
        self.serves: list[ProcessId] = []
        self.write_config()
        self.core = Core(load(self.config), self.state_dir)
        self.names = list(self.core.config.models)
        self.actors = Actors(os.environ | {"XDG_STATE_HOME": str(folder)})

    def write_config(self) -> None:
        env = {"VLLM_SIM_SPEED": SPEED, "VLLM_SIM_VERSION": "0.26.0"}  # with which our own sleep mode fits
        content = {
            "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
            "simulated_gpus": [{"name": "Storm", "memory": "24GiB"}] * 2,
            "models": {
                "a": {"model": "sim/1GiB", "gpus": [0], "level": 0, "env": env},
                "b": {"model": "sim/2GiB", "gpus": [0], "level": 2, "env": env},
                "wide": {
                    "model": "sim/4GiB",
                    "gpus": [0, 1],
                    "env": env,
                    "args": {"tensor-parallel-size": 2},
                },
            },
        }
        self.config.write_text(json.dumps(content))

    def begin(self, *arguments: str) -> ProcessId:
        pid = self.actors.begin(self.folder / "verbs.log", "--config", str(self.config), *arguments)
        return ProcessId(pid, start_ticks(pid) or 0)

    async def run(self, kills: int) -> Tally:
        """Kill so many times; ends with everything stopped."""
        while self.tally.total < kills and not self.tally.problems:
            self.serves = [serve for serve in self.serves if is_alive(serve)]
            while len(self.serves) < 2:
                self.serves.append(self.begin("serve"))
            await self.round()
        return self.tally

    async def round(self) -> None:
        verb = self.random.choices(list(VERBS), list(VERBS.values()))[0]
        name = self.random.choice(self.names)
        if verb == "sleep" and self.random.random() < 0.2:
            await self.slow_down(name)
        what = f"round {self.tally.total}: {verb} {name}"
        began = time.monotonic()
        process = self.begin(verb, name)
        running = [process]
        if self.random.random() < 0.3:
            running.append(self.begin(self.random.choice(list(VERBS)), self.random.choice(self.names)))
        delay = self.random.uniform(0, self.spans[verb])
        while time.monotonic() - began < delay and is_alive(process):
            await asyncio.sleep(0.005)
            self.see()
        killed = self.kill(process, name)
        for each in running:
            await self.wait_for(each, what)
        if killed is None:
            self.spans[verb] = 0.7 * self.spans[verb] + 0.3 * (time.monotonic() - began)
        await self.reconcile(f"{what}, killed {killed}")

    async def slow_down(self, name: str) -> None:
        """The next sleep of a model takes 3 s more."""
        record = self.core.records.read(name)
        if record.state is State.AWAKE:
            with suppress(httpx.HTTPError):
                transport = httpx.AsyncHTTPTransport(uds=record.socket)
                async with httpx.AsyncClient(transport=transport) as client:
                    await client.post("http://127.0.0.1/simulator/faults", json={"faults": ["sleep_slow:1"]})
            self.spans["sleep"] = max(self.spans["sleep"], 2.0)

    def see(self) -> None:
        """Remember every launch, so that none can hide."""
        found = (self.core.records.read(name).launch for name in self.names)
        self.launches |= {launch for launch in found if launch}

    def kill(self, verb: ProcessId, name: str) -> str | None:
        """SIGKILL to one process, chosen by chance; its kind, None if it was not there."""
        kind = self.random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        share = self.random.random()  # whether somebody is there or not: what comes next is the seed's alone
        record = self.core.records.read(name)
        candidates: dict[str, list[ProcessId | None]] = {
            "verb": [verb],
            "leader": self.serves[:1],
            "standby": self.serves[1:],
            "keeper": [record.keeper],
            "server": [record.server],
            "engine": list(record.engines),
            "holder": [pool.holder() for pool in self.core.pools({0, 1}).values()],
        }
        victims = [victim for victim in candidates[kind] if victim is not None]
        if not victims or not signal_process(victims[int(share * len(victims))], signal.SIGKILL):
            return None
        self.tally.kills[kind] += 1
        self.tally.states[record.state] += 1
        return kind

    async def wait_for(self, process: ProcessId, what: str) -> None:
        deadline = time.monotonic() + SETTLE_LIMIT
        while is_alive(process):
            if time.monotonic() > deadline:
                self.tally.problems.append(f"{what}: the verb does not end")
                return
            await asyncio.sleep(0.01)

    def settled(self) -> bool:
        for name in self.names:
            record = self.core.records.read(name)
            if record.state not in SETTLED or record.intent or is_unfinished(self.core.model(name)):
                return False
        return True

    async def reconcile(self, what: str) -> None:
        """Open a fleet, as the next panel would; once all is settled, look at what must hold."""
        began, suspected = time.monotonic(), 0.0
        async with Fleet(self.core.loaded, self.state_dir):
            while time.monotonic() - began < SETTLE_LIMIT:
                await asyncio.sleep(0.01)
                self.see()
                if not self.settled():
                    suspected = 0.0
                    continue
                async with self.everything_held():
                    if self.settled():
                        found = await violations(self.core, self.launches)
                        if not found:
                            break
                        # A death takes a moment to be seen: what was killed last may look alive still.
                        suspected = suspected or time.monotonic()
                        lies_there = all(POOL_HOLDS in problem for problem in found)
                        if time.monotonic() - suspected > (POOL_SECONDS if lies_there else DEATH_SECONDS):
                            self.tally.problems += [f"{what}: {problem}" for problem in found]
                            break
            else:
                states = {name: repr(self.core.records.read(name).intent) for name in self.names}
                self.tally.problems.append(f"{what}: not settled after {SETTLE_LIMIT:.0f} s: {states}")
        self.tally.slowest = max(self.tally.slowest, time.monotonic() - began)

    @asynccontextmanager
    async def everything_held(self) -> AsyncIterator[None]:
        """Every lock, so that nobody acts meanwhile."""
        paths = [*self.core.gpu_locks({0, 1}), *(self.core.model(name).lock for name in sorted(self.names))]
        async with hold(paths, holder("looking", "everything"), limit=SETTLE_LIMIT):
            yield

    async def close(self) -> None:
        """End the `serve`s, stop the models, through the product."""
        for serve in self.serves:
            signal_process(serve, signal.SIGKILL)
        async with Fleet(self.core.loaded, self.state_dir) as fleet:
            await fleet.stop(self.names, force=True)
        await self.core.close()
        self.actors.close()
