"""Measures switches by the panel and the same HTTP calls by hand, in turn, in one run on one GPU.

    python tests/gpu/measure.py --out DIR [--levels 1 2] [--rounds 10]

The environment names vLLM and the two models (`gpu_config.py`). The result is DIR/measure.json, written after
each step: started again with the same DIR it goes on where it was, with the servers that still run.
A round is two switches by the panel, a → b and b → a, and two by hand. A raw switch is /sleep, /wake_up (at
level 2 with the calls that it needs) and the one-token request that proves the wake; the panel's is all that
it does. Times in seconds, memory in bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_config import missing, write_pair
from notes import Notes
from raw_server import RawServer

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Progress, SwitchTimes
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.fleet.survey import read_once

PAIR = ("a", "b")


def part_of(notes: Notes, level: int) -> dict[str, Any]:
    """The part of one sleep level."""
    empty: dict[str, Any] = {"start": {}, "memory": {}, "switches": []}
    part: dict[str, Any] = notes.known.setdefault("levels", {}).setdefault(str(level), empty)
    return part


def raw_switch(store: RecordStore, leaving: str, target: str, level: int) -> dict[str, Any]:
    """One switch by hand; the connections are open before the clock runs."""
    old, new = RawServer(store.read(leaving)), RawServer(store.read(target))
    try:
        began = time.perf_counter()
        phases = {"sleep": old.sleep(level), "wake": new.wake(level), "prove": new.first_token()}
        return {"how": "raw", "to": target, "total": time.perf_counter() - began, "phases": phases}
    finally:
        old.close()
        new.close()


async def panel_switch(fleet: Fleet, leaving: str, target: str, level: int) -> dict[str, Any]:
    """One switch by the panel, then a chat for the time to its first token.

    The models' own level is 1, so a switch at level 2 is a sleep at that level and a wake.
    """
    began = time.perf_counter()
    phases: dict[str, float | None] = {}
    if level == 1:
        ledger = await fleet.switch(target)
    else:
        await fleet.sleep(leaving, level=level)
        phases["sleep"] = time.perf_counter() - began
        await fleet.wake(target)
        ledger = fleet.snapshot().model(target).last_switch or SwitchTimes(phases={}, total=0.0)
    total = time.perf_counter() - began
    phases = {phase: took for phase, took in ledger.phases.items() if took is not None} | phases
    first = None
    question = [{"role": "user", "content": "Say something."}]
    async for event in fleet.chat(target, question, params={"max_tokens": 4, "temperature": 0}):
        first = event.ttft if event.ttft is not None else first
    return {"how": "panel", "to": target, "total": total, "phases": phases, "first_token": first}


def tell(progress: Progress) -> None:
    """Progress of a start, one line a step."""
    print(" ".join((progress.model, progress.phase, progress.detail)), file=sys.stderr, flush=True)


def memory_now(loaded: LoadedConfig, state: Path, name: str) -> dict[str, Any]:
    """What the model holds: VRAM, RAM, and of that the pinned pool."""
    model = read_once(loaded, state).model(name)
    return {
        "vram": model.vram_bytes,
        "ram": model.ram_bytes,
        "pinned": model.pinned_bytes,
        "level": model.level,
    }


class Run:
    """The measurement of one level."""

    def __init__(self, notes: Notes, loaded: LoadedConfig, state: Path, level: int) -> None:
        self.notes, self.loaded, self.state, self.level = notes, loaded, state, level
        self.part = part_of(notes, level)
        self.store = RecordStore(state, loaded.path)

    async def measure(self, rounds: int, *, keep: bool) -> None:
        """Start what does not run, then do the rounds that are missing, then stop unless told to `keep`."""
        async with Fleet(self.loaded, self.state) as fleet:
            for name in reversed(PAIR):
                await self.start(fleet, name)
            await self.align(fleet)
            if PAIR[0] not in self.part["memory"]:
                await self.measure_memory(fleet)
            while len(self.part["switches"]) < 4 * rounds:
                await self.round(fleet)
            if not keep:
                await fleet.stop(PAIR, force=True)
        self.part["summary"] = summary(self.part["switches"])
        self.notes.save()

    async def align(self, fleet: Fleet) -> None:
        """The first model awake, the other asleep at this level, which another level goes to by a wake."""
        if fleet.snapshot().model(PAIR[1]).level != self.level:
            await fleet.switch(PAIR[1])
            await fleet.sleep(PAIR[1], level=self.level)
        await fleet.switch(PAIR[0])

    async def start(self, fleet: Fleet, name: str) -> None:
        """Start a model unless it runs already; its time is kept."""
        if fleet.snapshot().model(name).state in ("awake", "asleep"):
            return
        began = time.perf_counter()
        await fleet.start([name], report=tell)
        self.part["start"][name] = time.perf_counter() - began
        self.notes.known["vllm"] = self.store.read(name).vllm_version
        self.notes.save()

    async def measure_memory(self, fleet: Fleet) -> None:
        """What each model holds awake and asleep."""
        found: dict[str, Any] = {}
        firsts = []
        for target, other in (PAIR, PAIR[::-1]):
            if fleet.snapshot().model(target).state != "awake":
                firsts.append(await panel_switch(fleet, other, target, self.level))
            found.setdefault(target, {})["awake"] = memory_now(self.loaded, self.state, target)
            found.setdefault(other, {})["asleep"] = memory_now(self.loaded, self.state, other)
        firsts.append(await panel_switch(fleet, PAIR[1], PAIR[0], self.level))
        self.part["memory"] = found
        self.part["first_switches"] = firsts
        self.notes.save()

    async def round(self, fleet: Fleet) -> None:
        """Two switches by the panel and two by hand; `a` is awake before and after."""
        a, b = PAIR
        done = [await panel_switch(fleet, a, b, self.level), await panel_switch(fleet, b, a, self.level)]
        for leaving, target in ((a, b), (b, a)):
            done.append(await asyncio.to_thread(raw_switch, self.store, leaving, target, self.level))
        self.part["switches"] += done
        self.notes.save()


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, lowest and highest; None without values."""
    known = sorted(value for value in values if value is not None)
    return {"median": statistics.median(known), "low": known[0], "high": known[-1]} if known else None


def summary(switches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By target and by way: the spread of the whole, of its phases, and of the first token."""
    found: dict[str, Any] = {}
    for target in PAIR:
        for how in ("panel", "raw"):
            these = [switch for switch in switches if switch["to"] == target and switch["how"] == how]
            phases = {phase: spread(s["phases"].get(phase) for s in these) for phase in these[0]["phases"]}
            found[f"to {target}, {how}"] = {
                "count": len(these),
                "total": spread(s["total"] for s in these),
                "phases": {phase: seen for phase, seen in phases.items() if seen},
                "first_token": spread(s.get("first_token") for s in these),
            }
    return found


def print_tables(known: Mapping[str, Any]) -> None:
    """What is measured, as Markdown."""
    print(
        "| level | switch | n | median | lowest to highest | sleep | wake | first token |\n"
        + "|---" * 8
        + "|"
    )
    for level, part in known["levels"].items():
        for name, row in part.get("summary", {}).items():
            total, phases = row["total"], row["phases"]
            cells = [f"{1000 * phases[phase]['median']:.0f} ms" for phase in ("sleep", "wake", "prove")]
            whole = f"{total['median']:.3f} s | {total['low']:.3f} to {total['high']:.3f} s"
            print(f"| {level} | {name} | {row['count']} | {whole} | {' | '.join(cells)} |")
    print("\n| level | model | state | VRAM | RAM | of it pinned | start |\n" + "|---" * 7 + "|")
    for level, part in known["levels"].items():
        for name, states in part["memory"].items():
            for state, held in states.items():
                sizes = " | ".join(in_gib(held[kind]) for kind in ("vram", "ram", "pinned"))
                print(f"| {level} | {name} | {state} | {sizes} | {part['start'].get(name, 0):.0f} s |")


def in_gib(size: int | None) -> str:
    """Bytes as GiB, a dash for what is not known."""
    return "–" if size is None else f"{size / 2**30:.2f} GiB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the result, the state and the logs"
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--rounds", type=int, default=10, help="four switches each")
    parser.add_argument(
        "--simulated", metavar="SIZE", help="a simulated GPU, such as 80GiB, to try this script"
    )
    parser.add_argument("--keep", action="store_true", help="leave the servers running, to look at them")
    given = parser.parse_args()
    if absent := missing():
        parser.error("not set: " + "; ".join(absent))
    given.out.mkdir(parents=True, exist_ok=True)
    notes = Notes(given.out / "measure.json")
    notes.known["host"] = {"kernel": platform.release(), "python": platform.python_version()}
    for level in given.levels:
        if "summary" in part_of(notes, level):
            continue
        loaded = load(write_pair(given.out.absolute(), "auto", simulated=given.simulated))
        state = given.out.absolute() / "state"
        notes.known["gpus"] = [gpu.name for gpu in read_once(loaded, state).gpus]
        try:
            asyncio.run(
                Run(notes, loaded, state, level).measure(
                    given.rounds, keep=given.keep or level != given.levels[-1]
                )
            )
        except PanelError as error:
            raise SystemExit(f"{error.what}\n{error.cure}") from error
    print_tables(notes.known)


if __name__ == "__main__":
    main()
