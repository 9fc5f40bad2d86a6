"""Everything that only a GPU box can tell, as one command that goes on where it was: see README.md here.

    python tests/gpu/box.py --out DIR [--seconds 570] [--only STEP …]

The environment names vLLM and the models (`gpu_config.py`). DIR/results has what is worth keeping, written
after every step of every step; DIR/state-home has the servers' records and logs. Started again with the same
DIR it does what is missing, with the servers that still run; after --seconds it ends as a kill would end it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import box_report
import measure_bench
import measure_estimates
import measure_memory
import measure_proof
from command_line import CommandLine
from gpu_config import BOX_NEEDED, PAIR, missing, write_box
from measure_bench import plan_of
from notes import Notes

from vllm_sleep_tui.bench.plan import Mode, Override, Plan
from vllm_sleep_tui.bench.results import read
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.fleet.states import StartPhase, State
from vllm_sleep_tui.fleet.store.records import RecordStore

HERE = Path(__file__).parent
LEFT_EXIT = 75
"""Something is left: start it again (EX_TEMPFAIL)."""
TRIES = 2
"""Of a part that needs servers which run now: to start them again for it would take minutes."""
FP8 = (Override(model="*", argument="quantization", value="fp8"),)


@dataclass(frozen=True)
class Last:
    """What is measured of the benchmark's servers before they are stopped."""

    parts: tuple[str, ...]
    work: Callable[[LoadedConfig], None]

    def is_done(self, box: Box) -> bool:
        """Whether there is nothing left of it."""
        return all(part in box.done for part in self.parts)


class Box:
    """The one output folder, and what is done of the plan."""

    def __init__(self, out: Path, simulated: str | None, wakes: int, repeats: int) -> None:
        self.results, self.state_home = out / "results", out / "state-home"
        for folder in (self.results, self.state_home):
            folder.mkdir(parents=True, exist_ok=True)
        self.state = self.state_home / "vllm-sleep-tui"
        self.loaded = load(write_box(out, simulated=simulated))
        shutil.copyfile(self.loaded.path, self.results / "box.yaml")
        self.notes = Notes(self.results / "box.json")
        self.done: dict[str, Any] = self.notes.known.setdefault("done", {})
        self.simulated, self.wakes, self.repeats = simulated, wakes, repeats

    @property
    def has_moe(self) -> bool:
        """Whether the small mixture of experts is here."""
        return "moe" in self.loaded.config.models

    def once(self, what: str, work: Callable[[], object]) -> None:
        """Do it unless it is done; seconds and moment are written down."""
        if what in self.done:
            return
        print(f"── {what}", flush=True)
        began = time.time()
        work()
        self.done[what] = {"began": began, "seconds": time.time() - began}
        self.notes.save()
        footprints = self.state / "footprints.json"
        if footprints.exists():
            shutil.copyfile(footprints, self.results / footprints.name)

    def part(self, what: str, work: Callable[[], object]) -> None:
        """As `once`; what fails twice is left with its fault written down."""

        def tries() -> None:
            for _ in range(TRIES):
                if self.survives(what, work):
                    return

        self.once(what, tries)

    def survives(self, what: str, work: Callable[[], object]) -> bool:
        """Do it; False if it failed, with the fault written down."""
        try:
            work()
        except Exception:  # whatever it is, the rest of the plan may work
            self.notes.known.setdefault("faults", {})[what] = traceback.format_exc()
            self.notes.save()
            traceback.print_exc()
            return False
        return True

    def panel(self, loaded: LoadedConfig | None = None) -> CommandLine:
        """The command line on this config."""
        return CommandLine(config=(loaded or self.loaded).path, state_home=self.state_home)

    def ruler(self, loaded: LoadedConfig | None = None) -> measure_memory.Ruler:
        """Takes rows of memory."""
        suffix = "" if loaded in (None, self.loaded) else " FP8"
        rows = self.results / "memory.jsonl"
        return measure_memory.Ruler(loaded or self.loaded, self.state, rows, suffix)

    # ── what is measured of a model that runs ────────────────────────────────────────────────────────────

    def live(self, name: str, loaded: LoadedConfig | None = None) -> None:
        """Its memory through both levels, then its proof; it runs and is awake at the end."""
        ruler = self.ruler(loaded)
        shown = name + ruler.suffix
        panel = self.panel(loaded)
        self.part(f"memory of {shown}", lambda: measure_memory.live(panel, name, ruler))
        self.part(f"proof of {shown}", lambda: self.prove(name, shown, loaded or self.loaded))

    def prove(self, name: str, shown: str, loaded: LoadedConfig) -> None:
        """How far its answers are from its reference after wakes, and how far garbage is."""
        self.panel(loaded)("switch", name)
        record = RecordStore(self.state, loaded.path).read(name)
        found = in_thread(measure_proof.measure_running(record, self.wakes))
        notes = Notes(self.results / "proof.json")
        notes.known[shown] = found
        notes.save()
        print(f"{shown}\n{measure_proof.summary(found)}", flush=True)

    def start(self, name: str) -> None:
        """Start a model with its memory sampled all the while; one that runs is left as it is."""
        ruler = self.ruler()
        with measure_memory.Watch(ruler, State.STARTING):
            self.panel()("start", name)
        self.panel()("wake", name)
        ruler.take([name], "awake")

    # ── the pair ─────────────────────────────────────────────────────────────────────────────────────────

    def bench(self, file: str, plan: Plan, last: Last | None = None, raw: bool = False) -> None:
        """What is left of one run of the benchmark; `last` comes before its servers are stopped."""
        out, bed = self.results / f"{file}.json", measure_bench.bed_of(self.loaded, plan)
        turns = None
        if last is not None:
            if out.exists() and measure_bench.sleeps_are_done(read(out)) and not last.is_done(self):
                self.revive(bed)
                last.work(bed)
            by_hand = Notes(self.results / f"{file}-by-hand.json") if raw else None
            store = RecordStore(self.state, bed.path)
            turns = measure_bench.Turns(store, by_hand, lambda: last.work(bed))
        with measure_memory.Watch(self.ruler(bed), State.STARTING):
            asyncio.run(measure_bench.measure(self.loaded, self.state, out, plan, turns, tell))

    def revive(self, bed: LoadedConfig) -> None:
        """Both of the pair running, the second awake, whatever an earlier call left of them."""

        async def up() -> None:
            async with Fleet(bed, self.state) as fleet:
                await fleet.start(PAIR[::-1], report=tell)
                await fleet.switch(PAIR[1], report=tell)

        asyncio.run(up())

    def pair_plan(self) -> Plan:
        """Both levels, then cold."""
        return plan_of((Mode.LEVEL1, self.repeats), (Mode.LEVEL2, self.repeats), (Mode.COLD, 1))

    def pair(self) -> None:
        """The passes that sleep, by the panel and by hand; then memory and proof of `phi`; the pictures."""

        def work(bed: LoadedConfig) -> None:
            self.live("phi", bed)
            self.part("pictures", self.picture)

        last = Last(("memory of phi", "proof of phi", "pictures"), work)
        self.bench("pair", self.pair_plan(), last, raw=True)

    def picture(self) -> None:
        """The panel itself, in a process of its own, with the chat's real weights."""
        command = [sys.executable, str(HERE / "picture.py"), "--config", str(self.loaded.path)]
        command += ["--state", str(self.state), "--into", str(self.results), "--chat", "smol", "--other"]
        subprocess.run([*command, "phi"], check=True, env=self.panel().environment | self.home)

    @property
    def home(self) -> dict[str, str]:
        """Where a child finds the state."""
        return {"XDG_STATE_HOME": str(self.state_home)}

    def quantised(self) -> None:
        """The pair in FP8, both levels; then memory and proof of `phi`."""
        plan = plan_of((Mode.LEVEL1, self.repeats), (Mode.LEVEL2, self.repeats), overrides=FP8)
        last = Last(("memory of phi FP8", "proof of phi FP8"), lambda bed: self.live("phi", bed))
        self.bench("fp8", plan, last)

    def cold(self) -> None:
        """The cold pass of the pair's run, six starts."""
        self.bench("pair", self.pair_plan())

    def no_warm_up(self) -> None:
        """Level 1 without a request before the first inference."""
        self.bench("no-warmup", plan_of((Mode.LEVEL1, self.repeats), warm_up=False))

    # ── the others ───────────────────────────────────────────────────────────────────────────────────────

    def estimates(self) -> None:
        """What the estimates are made from, before anything is launched."""
        measure_estimates.keep_headers(self.loaded, self.results / "checkpoints")
        measure_estimates.keep_machine(self.loaded, self.state, self.results / "machine.json")

    def smol(self) -> None:
        """The small model with real weights: its start, its memory, its proof with real garbage."""
        self.once("start of smol", lambda: self.start("smol"))
        self.panel()("switch", "smol")
        self.live("smol")
        self.panel()("sleep", "smol")

    def moe(self) -> None:
        """A small mixture of experts, for one more estimate."""
        self.once("start of moe", lambda: self.start("moe"))
        self.live("moe")

    def ray(self) -> None:
        """Two GPUs by ray, or why not."""
        extra = ["--simulated", self.simulated] if self.simulated else []
        command = [sys.executable, str(HERE / "measure_ray.py"), "--out", str(self.results.parent / "ray")]
        subprocess.run([*command, *extra], check=True)
        shutil.copyfile(self.results.parent / "ray" / "ray.json", self.results / "ray.json")

    def stop(self) -> None:
        """Stop what runs, with its memory seen gone."""
        ruler = self.ruler()
        names = list(self.loaded.config.models)
        ruler.take(names, "before the stop")
        with measure_memory.Watch(ruler, State.STOPPING):
            self.panel()("stop", "--all")
        ruler.take(names, "stopped")


@dataclass(frozen=True)
class Step:
    """A part of the plan that is begun only if the call has that many seconds left."""

    name: str
    least: float
    work: Callable[[Box], None]


STEPS: Sequence[Step] = (
    Step("estimates", 0, Box.estimates),
    Step("smol", 60, Box.smol),
    Step("pair", 150, Box.pair),
    Step("fp8", 150, Box.quantised),
    Step("cold", 70, Box.cold),
    Step("no-warmup", 120, Box.no_warm_up),
    Step("moe", 60, Box.moe),
    Step("ray", 60, Box.ray),
    Step("stop", 0, Box.stop),
)
"""By worth for the time; README.md has the arithmetic."""


def in_thread(work: Coroutine[Any, Any, Any]) -> Any:
    """Await it in a loop of its own, wherever the caller is."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def tell(progress: Progress) -> None:
    """What a start does, and not each time that it says so again."""
    if progress.phase in tuple(StartPhase) and not progress.detail:
        print(f"{progress.model}: {progress.phase}", flush=True)


def end_at(seconds: float) -> None:
    """End this process then, as a kill would: servers run on, everything measured is on disk."""

    def leave() -> None:
        print(f"{seconds:g} s are over; start it again with the same --out.", flush=True)
        os._exit(LEFT_EXIT)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


def work_off(box: Box, only: Sequence[str], until: float) -> list[str]:
    """Do the steps that are not done; the names of those that still are not."""
    left = []
    for step in STEPS:
        if step.name in box.done or (only and step.name not in only):
            continue
        if step.name == "moe" and not box.has_moe:
            continue
        if (step.name == "stop" and left) or until - time.monotonic() < step.least:
            left.append(step.name)
            continue
        if not box.survives(step.name, lambda step=step: box.once(step.name, lambda: step.work(box))):  # type: ignore[misc]
            left.append(step.name)
    return left


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the one folder of everything")
    parser.add_argument("--seconds", type=float, default=570.0, help="what this call may take")
    parser.add_argument("--only", nargs="*", default=[], choices=[step.name for step in STEPS])
    parser.add_argument(
        "--wakes", type=int, default=24, help="for the proof, from level 1; half as many from 2"
    )
    parser.add_argument("--repeats", type=int, default=3, help="passes of each level")
    parser.add_argument("--simulated", metavar="SIZE", help="a simulated GPU, such as 80GiB, to try this")
    parser.add_argument("--report", action="store_true", help="only write the tables again, on any machine")
    given = parser.parse_args()
    if given.report:
        print(box_report.write(given.out / "results"))
        return
    if absent := missing(BOX_NEEDED):
        parser.error("not set: " + "; ".join(absent))
    until = time.monotonic() + given.seconds
    end_at(given.seconds)
    box = Box(given.out.absolute(), given.simulated, given.wakes, given.repeats)
    left = work_off(box, given.only, until)
    print(box_report.write(box.results))
    if left:
        print(f"Left: {', '.join(left)}. Start it again with the same --out.")
        raise SystemExit(LEFT_EXIT)


if __name__ == "__main__":
    main()
