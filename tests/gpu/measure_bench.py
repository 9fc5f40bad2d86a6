"""The benchmark of a pair, and in turns with it the same protocol by hand, on the same servers.

`box.py` runs it. After each pass that sleeps come six switches by raw HTTP calls: the sleep, the calls of the
wake, the whole answer to the same question; no proof, which is the panel's own. So drift hits both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_config import PAIR
from notes import Notes
from raw_server import RawServer

from vllm_sleep_tui.bench import run as experiment
from vllm_sleep_tui.bench.bench_fleet import write_config
from vllm_sleep_tui.bench.plan import MAX_TOKENS, STEPS, Mode, PassKey, Plan
from vllm_sleep_tui.bench.results import Run, Step, read
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import CancelledByUser
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.fleet.store.records import RecordStore


def plan_of(*passes: tuple[Mode, int], **more: Any) -> Plan:
    """The pair's plan with these repeats of these modes, in this order: starts are what takes the time."""
    keys = tuple(PassKey(mode, repeat) for mode, repeats in passes for repeat in range(1, repeats + 1))
    return Plan(a=PAIR[0], b=PAIR[1], passes=keys, **more)


def bed_of(loaded: LoadedConfig, plan: Plan) -> LoadedConfig:
    """The config that the pair runs from in this plan."""
    return load(write_config(loaded, plan)) if plan.overrides else loaded


def sleeps_are_done(run: Run) -> bool:
    """Whether nothing but cold passes is left."""
    key = run.next_key()
    return key is None or key.mode.level is None


class SleepsDone(CancelledByUser):
    """What was wanted of this part of the run is there."""


class Turns:
    """Called after each step of the benchmark, with the servers as the step left them."""

    def __init__(self, store: RecordStore, raw: Notes | None, last: Callable[[], None]) -> None:
        self.store, self.raw, self.last = store, raw, last

    def __call__(self, run: Run, key: PassKey, step: Step) -> None:
        """By hand after each whole pass; after the last that sleeps, what needs both servers; then out."""
        print(
            f"{key.mode} {key.repeat}: {step.target} {step.switch:.3f} s + {step.inference:.3f} s", flush=True
        )
        if step.number != STEPS - 1 or key.mode.level is None:
            return
        if self.raw is not None:
            self.raw.known[f"{key.mode} {key.repeat}"] = raw_pass(self.store, run.plan, key)
            self.raw.save()
        if sleeps_are_done(run):
            self.last()
            raise SleepsDone("Every pass that sleeps is measured.")


def raw_pass(store: RecordStore, plan: Plan, key: PassKey) -> dict[str, Any]:
    """One pass by hand, from both asleep; it ends as the benchmark's own does, with the second awake."""
    level = key.mode.level
    assert level is not None
    servers = {name: RawServer(store.read(name)) for name in plan.pair}
    try:
        servers[plan.b].sleep(level)
        steps: list[dict[str, Any]] = []
        leaving = None
        for number, target in enumerate(plan.targets()):
            steps.append(raw_step(servers, leaving, target, level, plan.question(key, number)))
            leaving = target
    finally:
        for server in servers.values():
            server.close()
    return {"total": sum(step["switch"] + step["inference"] for step in steps), "steps": steps}


def raw_step(
    servers: Mapping[str, RawServer], leaving: str | None, target: str, level: int, question: str
) -> dict[str, Any]:
    """One switch and one whole answer."""
    began = time.perf_counter()
    slept = None if leaving is None else servers[leaving].sleep(level)
    woke = servers[target].wake(level)
    switch = time.perf_counter() - began
    inference, tokens = servers[target].chat(question, MAX_TOKENS)
    return {
        "target": target,
        "sleep": slept,
        "wake": woke,
        "switch": switch,
        "inference": inference,
        "tokens": tokens,
    }


async def measure(
    loaded: LoadedConfig, state: Path, out: Path, plan: Plan, turns: Turns | None, report: Report
) -> Run:
    """Do what is left of the plan, with `turns` only up to its cold passes."""
    async with Fleet(loaded, state) as fleet:
        before = read(out) if out.exists() else None
        try:
            return await experiment.run(fleet, plan, turns or said, out=out, resume=before, report=report)
        except SleepsDone:
            return read(out)


Report = Callable[[Progress], None]


def said(_: Run, key: PassKey, step: Step) -> None:
    """One line a step."""
    print(f"{key.mode} {key.repeat}: {step.target} {step.switch:.3f} s + {step.inference:.3f} s", flush=True)


def beside_by_hand(run: Run, raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By level: the panel's totals, those without its proofs, and the totals by hand; seconds and ratios."""
    found = []
    for mode in (Mode.LEVEL1, Mode.LEVEL2):
        passes = [each for each in run.of_mode(mode) if each.total is not None]
        by_hand = [each["total"] for name, each in raw.items() if name.startswith(f"{mode} ")]
        if not passes or not by_hand:
            continue
        proofs = [sum(step.phases.get("prove", 0.0) for step in each.steps) for each in passes]
        panel = [each.total or 0.0 for each in passes]
        bare = [total - proof for total, proof in zip(panel, proofs, strict=True)]
        hand = statistics.median(by_hand)
        found.append(
            {
                "mode": str(mode),
                "panel": panel,
                "without proofs": bare,
                "by hand": by_hand,
                "ratio": statistics.median(panel) / hand,
                "ratio without proofs": statistics.median(bare) / hand,
            }
        )
    return found


def hand_table(rows: list[dict[str, Any]]) -> str:
    """The same as Markdown."""
    lines = [
        "| mode | the panel | … without its proofs | by hand | panel / by hand | without proofs |",
        "|---|---|---|---|---|---|",
    ]
    for each in rows:
        totals = [spread(each[kind]) for kind in ("panel", "without proofs", "by hand")]
        ratios = f"{each['ratio']:.3f} | {each['ratio without proofs']:.3f}"
        lines.append(f"| {each['mode']} | {' | '.join(totals)} | {ratios} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Median, lowest, highest and how many."""
    middle = statistics.median(values)
    return f"{middle:.2f} s ({min(values):.2f} to {max(values):.2f}, n={len(values)})"
