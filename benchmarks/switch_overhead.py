"""What a switch costs beyond the HTTP calls it must make, on simulated servers that take no time.

Raw calls by hand and the product's switch take turns in one run:

    python benchmarks/switch_overhead.py [--rounds 100] [--level stock|1|0] [--verbs 5] [--profile FILE]

Raw is sleep + wake_up + one completion of one token, on kept connections; at level 0 the workers are told
first that the weights stay, as they must be. CPU is what the process used during one switch, which other
work on the machine changes less than times. Before each switch of either kind nothing is done for a moment,
so that what the last one left to be written (history, measurements) is written. `--level stock` is vLLM's own
sleep mode, 1 and 0 are ours. `--verbs` also makes so many switches there and back by the command line, a
process each. `--profile` writes the CPU of the loop's thread in 60 more switches, for `python -m pstats`;
`--json` prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.store.records import RecordStore

REST_SECONDS = 0.05
STOCK = "stock"
PROFILED_ROUNDS = 30
Samples = dict[str, list[float]]


def write_config(folder: Path, level: str) -> Path:
    """Two models of which one GPU holds one awake."""
    version = {} if level == STOCK else {"VLLM_SIM_VERSION": "0.26.0"}
    model: dict[str, Any] = {
        # By hand nobody has the KV pool give up memory for weights that come back: these have room beside it.
        "args": {"max-model-len": 2048, "gpu-memory-utilization": 0.6},
        "env": {"VLLM_SIM_TIMES": "instant", **version},
        "level": 1 if level == STOCK else int(level),
        "sleep_backend": STOCK if level == STOCK else "auto",
    }
    content = {
        "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
        "simulated_gpus": [{"name": "Bench", "memory": "24GiB"}],
        "models": {"a": {"model": "sim/1GiB", **model}, "b": {"model": "sim/4GiB", **model}},
    }
    path = folder / "vllm-sleep-tui.yaml"
    path.write_text(json.dumps(content))
    return path


class Box:
    """A fleet of the two models, and connections to their servers by hand."""

    def __init__(self, config: Path, state_dir: Path, level: str) -> None:
        self.config = config
        self.state_dir = state_dir
        self.level = level
        self.loaded = load(config)
        self.took: Samples = {}

    def add(self, kind: str, seconds: float) -> None:
        """Keep one more time, in milliseconds."""
        self.took.setdefault(kind, []).append(1e3 * seconds)

    async def connect(self, stack: contextlib.AsyncExitStack) -> None:
        """Start the servers, connect to them."""
        self.fleet = await stack.enter_async_context(Fleet(self.loaded, self.state_dir))
        await self.fleet.start(["a", "b"])
        stack.push_async_callback(self.fleet.stop, ["a", "b"])
        self.clients = {}
        for name in ("a", "b"):
            uds = RecordStore(self.state_dir, self.loaded.path).read(name).socket
            # Below the server's own 5 s, so that it never hangs up first.
            transport = httpx.AsyncHTTPTransport(uds=uds, limits=httpx.Limits(keepalive_expiry=3.0))
            client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", trust_env=False)
            self.clients[name] = await stack.enter_async_context(client)

    async def by_hand(self, leaving: str, coming: str) -> None:
        """Sleep one, wake the other, ask it for one token."""
        went, came = self.clients[leaving], self.clients[coming]
        question = {"model": coming, "prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0}
        began = time.perf_counter()
        if self.level == "0":
            (await went.post("/collective_rpc", json={"method": "panel_keep_weights"})).raise_for_status()
        (await went.post("/sleep?level=1")).raise_for_status()
        (await came.post("/wake_up")).raise_for_status()
        (await came.post("/v1/completions", json=question)).raise_for_status()
        self.add("raw", time.perf_counter() - began)

    async def ours(self, coming: str) -> None:
        """The panel's own switch, with its phases."""
        began, loops, whole = time.perf_counter(), time.thread_time(), time.process_time()
        ledger = await self.fleet.switch(coming)
        self.add("ours", time.perf_counter() - began)
        self.add("CPU, loop", time.thread_time() - loops)
        self.add("CPU, all", time.process_time() - whole)
        self.add_phases("", ledger)

    def add_phases(self, prefix: str, ledger: SwitchTimes) -> None:
        """Each phase of a switch that passed any, and what it spent between them."""
        known = {phase: seconds for phase, seconds in ledger.phases.items() if seconds is not None}
        for phase, seconds in known.items():
            self.add(f"{prefix}{phase}", seconds)
        self.add(f"{prefix}itself", ledger.total - sum(known.values()))

    async def verb(self, coming: str) -> None:
        """`switch` by the command line: the whole process, and what it says of its switch."""
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.config), "switch", coming]
        began, cpu = time.perf_counter(), cpu_of_children()
        process = await asyncio.create_subprocess_exec(
            *command,
            "--json",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "XDG_STATE_HOME": str(self.state_dir.parent)},
        )
        said, _ = await process.communicate()
        self.add("verb process", time.perf_counter() - began)
        self.add("verb CPU", cpu_of_children() - cpu)
        told = json.loads(said)["last_switch"]
        self.add("verb switch", told["total"])
        self.add_phases("verb ", SwitchTimes(phases=told["phases"], total=told["total"]))

    async def there_and_back(self, kinds: Sequence[str]) -> None:
        """One switch of each kind to each model, so that the records stay true after those by hand."""
        for kind in kinds:
            for leaving, coming in (("a", "b"), ("b", "a")):
                await asyncio.sleep(REST_SECONDS)
                if kind == "raw":
                    await self.by_hand(leaving, coming)
                elif kind == "verb":
                    await self.verb(coming)
                else:
                    await self.ours(coming)


async def measure(folder: Path, arguments: argparse.Namespace) -> Samples:
    """Milliseconds of each switch, raw and ours in turn."""
    state_dir = folder / "vllm-sleep-tui"
    state_dir.mkdir(mode=0o700)
    box = Box(write_config(folder, arguments.level), state_dir, arguments.level)
    async with contextlib.AsyncExitStack() as stack:
        await box.connect(stack)
        await box.there_and_back(["ours"])  # at level 0 the first one is from RAM
        box.took.clear()
        for _ in range(arguments.rounds):
            await box.there_and_back(["raw", "ours"])
        for _ in range(arguments.verbs):
            await box.there_and_back(["verb"])
        if arguments.profile is not None:
            took, box.took = box.took, {}
            with cProfile.Profile(time.thread_time) as profile:
                for _ in range(PROFILED_ROUNDS):
                    await box.there_and_back(["ours"])
            profile.dump_stats(arguments.profile)
            box.took = took
    return box.took


def cpu_of_children() -> float:
    """Seconds of processor time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(samples: Sequence[float]) -> dict[str, float]:
    """Percentiles of these."""
    if len(samples) < 2:
        return dict.fromkeys(("p10", "p50", "p90", "p99"), samples[0])
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {f"p{percent}": cuts[percent - 1] for percent in (10, 50, 90, 99)}


def main() -> None:
    """Measure and print medians with their spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--level", choices=[STOCK, "1", "0"], default=STOCK)
    parser.add_argument("--verbs", type=int, default=0)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        took = asyncio.run(measure(Path(folder), arguments))
    summary = {kind: figures(samples) for kind, samples in took.items()}
    if arguments.json:
        print(json.dumps({"milliseconds": summary, "rounds": arguments.rounds, "level": arguments.level}))
        return
    for kind, each in summary.items():
        print(f"{kind:13}", "  ".join(f"{key} {value:7.2f} ms" for key, value in each.items()))
    if {"ours", "raw"} <= summary.keys():
        print(f"ours - raw, p50: {summary['ours']['p50'] - summary['raw']['p50']:.2f} ms")


if __name__ == "__main__":
    main()
