"""The experiment itself: A→B→A→B→A→B, pass after pass, each step written down before the next begins.

`run` is what both the command line and the panel call.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui import __version__
from vllm_sleep_tui.bench import machine, restore
from vllm_sleep_tui.bench.bench_fleet import check_changes, open_bed, recorded_models
from vllm_sleep_tui.bench.figures import FIRST_ANSWER
from vllm_sleep_tui.bench.plan import MAX_TOKENS, Mode, PassKey, Plan
from vllm_sleep_tui.bench.results import Load, Memory, Pass, Run, Step, write
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import CancelledByUser, OperationError, RefusedError, UsageError
from vllm_sleep_tui.fleet.fleet import Fleet, to_its_end
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, Progress, Report
from vllm_sleep_tui.fleet.states import RUNNING, StartPhase, State


class LimitReached(CancelledByUser):
    """The seconds that the person gave are over."""


OnSample = Callable[[Run, PassKey, Step], None]
"""Called after each step with all that is measured so far."""
LOAD_QUESTION = "What can you help me with?"
OPENING = "opening"
"""What vLLM's log calls a warm-up: the engine is ready and the port opens. Ours has no detail."""
AS_VLLM_ALONE = frozenset({StartPhase.WARMING, StartPhase.PRIMING})
"""A cold start leaves both out, as in the post: what `vllm serve` does, and nothing of ours."""


async def run(
    fleet: Fleet,
    plan: Plan,
    on_sample: OnSample,
    *,
    out: Path,
    resume: Run | None = None,
    limit: float | None = None,
    report: Report | None = None,
) -> Run:
    """Do what is left of the plan and keep it in `out`; the models end as they were found.

    Raises PanelError as the fleet does, CancelledByUser when cancelled, LimitReached after `limit` seconds
    of measuring; `out` has all that was done, and as `resume` goes on at the next unfinished pass.
    """
    if resume is not None and resume.is_done and resume.restored:
        return resume
    check_pair(fleet, plan)
    seen = await fleet.measured()
    state = _begin(fleet, plan, seen) if resume is None else _continue(fleet, resume, seen)
    write(out, state)
    keeper = _Keeper(state, out, on_sample)
    try:
        await restore.put_aside(fleet, restore.neighbours(fleet, plan.pair)[2:], report)
        async with open_bed(fleet, plan, report) as bed:
            bench = _Bench(bed, plan, keeper, report)
            await _within(limit, bench.passes(fresh=resume is None or resume.restored))
    finally:
        await to_its_end(restore.put_back(fleet, state.found, report))
        keeper.change(restored=True)
    return keeper.run


async def _within(limit: float | None, work: Coroutine[Any, Any, None]) -> None:
    """Await it, to its next safe point after the limit; raises LimitReached then."""
    timer = asyncio.timeout(limit)
    try:
        async with timer:
            await work
    except (TimeoutError, CancelledByUser) as error:
        if not timer.expired():
            raise
        raise LimitReached(f"The limit of {limit:g} s was reached.") from error


def check_pair(fleet: Fleet, plan: Plan) -> None:
    """Raises UsageError if these two cannot be compared at all."""
    for name in plan.pair:
        if fleet.loaded.model(name).is_attached:
            raise UsageError(
                f"{name} is attached by `url:` and cannot be stopped here.", "Name another model."
            )
    if plan.a == plan.b:
        raise UsageError(f"{plan.a} is named twice.", "Name two different models.")
    check_changes(fleet.loaded, plan)


def _begin(fleet: Fleet, plan: Plan, seen: FleetSnapshot) -> Run:
    loaded = fleet.loaded
    gpus = {gpu for name in plan.pair for gpu in loaded.model(name).gpus}
    return Run(
        program=__version__,
        began=time.time(),
        plan=plan,
        machine=machine.describe(seen, gpus, commands_of(loaded, plan.pair)),
        models=recorded_models(loaded, plan),
        found=restore.look(fleet, restore.neighbours(fleet, plan.pair)),
    )


def commands_of(loaded: LoadedConfig, names: Iterable[str]) -> list[tuple[str, ...]]:
    """What each of these models is started with."""
    return [loaded.model(name).vllm_command or loaded.config.vllm_command for name in names]


def _continue(fleet: Fleet, before: Run, seen: FleetSnapshot) -> Run:
    """The run so far, checked against this config; raises UsageError if it was measured on another."""
    if recorded_models(fleet.loaded, before.plan) != before.models:
        raise UsageError(
            f"The config of {' or '.join(before.plan.pair)} has changed since this run began.",
            "Put it back as it was, or begin a new run.",
        )
    commands = commands_of(fleet.loaded, before.plan.pair)
    here = machine.describe(seen, {gpu.index for gpu in before.machine.gpus}, commands)
    if [gpu.name for gpu in here.gpus] != [gpu.name for gpu in before.machine.gpus]:
        raise UsageError("This run began on another machine: its GPUs differ.", "Begin a new run here.")
    if before.restored:  # what runs now is what the person wants back this time
        names = restore.neighbours(fleet, before.plan.pair)
        return msgspec.structs.replace(before, found=restore.look(fleet, names), restored=False)
    return before


class _Keeper:
    """The run as it grows, on disk after each change."""

    def __init__(self, run: Run, out: Path, on_sample: OnSample) -> None:
        self.run, self._out, self._on_sample = run, out, on_sample

    def change(self, **changes: object) -> None:
        self.run = msgspec.structs.replace(self.run, **changes)
        write(self._out, self.run)

    def keep_pass(self, changed: Pass) -> None:
        self.run = self.run.with_pass(changed)
        write(self._out, self.run)

    def keep_step(self, now: Pass, step: Step) -> Pass:
        now = msgspec.structs.replace(now, steps=(*now.steps, step))
        self.keep_pass(now)
        self._on_sample(self.run, now.key, step)
        return now


class _PhaseClock:
    """Times the phases of a start from what it tells, and passes that on."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._began = time.perf_counter()
        self._phase: str | None = None
        self.phases: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        phase = str(progress.phase)
        if phase == StartPhase.WARMING and progress.detail:
            phase = OPENING
        if phase in (*StartPhase, OPENING) and phase != self._phase:
            self.stop()
            self._phase = phase
        if self._report:
            self._report(progress)

    def stop(self) -> None:
        """End the phase under way; what came before the first one counts to it."""
        now = time.perf_counter()
        if self._phase is not None:
            self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._began
            self._began = now


class _Bench:
    """One part of a run on its bed."""

    def __init__(self, bed: Fleet, plan: Plan, keeper: _Keeper, report: Report | None) -> None:
        self.bed, self.plan, self.keeper, self.report = bed, plan, keeper, report

    async def passes(self, *, fresh: bool) -> None:
        """Every pass that is not done; `fresh`: whatever of the pair runs is started anew."""
        if fresh and not self.keeper.run.is_done:
            await self.stop_all_but(None)
        while (key := self.keeper.run.next_key()) is not None:
            await self.do(key)

    async def do(self, key: PassKey) -> None:
        """One pass, a cold one from its next step; a mode that this pair cannot have is noted and left."""
        now = self.begun(key) or Pass(key=key, began=time.time())
        leaving = now.steps[-1].target if now.steps else None
        if key.mode.level is None:
            await self.stop_all_but(leaving)
        else:
            try:
                await self.prepare(key.mode.level)
            except RefusedError as error:
                refused = f"{error.what} {error.cure}".strip()
                self.keeper.keep_pass(msgspec.structs.replace(now, refused=refused))
                return
        self.keeper.keep_pass(now)
        before = await self.memory()
        for number, target in list(enumerate(self.plan.targets()))[len(now.steps) :]:
            step = await self.step(key, number, leaving, target, before)
            now = self.keeper.keep_step(now, step)
            leaving, before = target, step.after

    def begun(self, key: PassKey) -> Pass | None:
        """The cold pass that was cut off; a pass of sleeps takes seconds and begins anew."""
        if key.mode.level is not None:
            return None
        return next((each for each in self.keeper.run.passes if each.key == key), None)

    # ── before a pass ────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self, level: int) -> None:
        """Both asleep at this level, loaded first if need be; raises RefusedError if they cannot be."""
        for name in self.plan.pair:
            if self.bed.loaded.model(name).level == "none":
                raise RefusedError(
                    f"{name} has `level: none` and starts without sleep mode.",
                    f"Add --set {name}.level=auto.",
                )
        snapshot = self.bed.snapshot()
        awake_first = sorted(self.plan.pair, key=lambda name: snapshot.model(name).state is not State.AWAKE)
        for name in awake_first:
            await self.put_asleep(name, level)

    async def put_asleep(self, name: str, level: int) -> None:
        """From wherever the model is, to asleep at this level."""
        if not self.is_loaded(name):
            await self.load(name)
        await restore.put_asleep(self.bed, name, level, self.report)

    def is_loaded(self, name: str) -> bool:
        """Whether the model runs from a load of this run, and not from a cold start since."""
        if self.bed.snapshot().model(name).state not in RUNNING:
            return False
        run = self.keeper.run
        cold = max((each.began for each in run.of_mode(Mode.COLD)), default=0.0)
        return any(load.model == name and load.began > cold for load in run.loads)

    async def load(self, name: str) -> None:
        """Start a model as the program does, and let it answer once; without warm-up, neither of the two."""
        skip = frozenset() if self.plan.warm_up else frozenset({StartPhase.WARMING})
        await self.bed.stop([name], report=self.report)
        clock, began, moment = _PhaseClock(self.report), time.perf_counter(), time.time()
        await self.bed.start([name], skip=skip, report=clock)
        clock.stop()
        if self.plan.warm_up:
            _, seconds, _ = await self.ask(name, LOAD_QUESTION)
            clock.phases[FIRST_ANSWER] = seconds
        load = Load(model=name, began=moment, seconds=time.perf_counter() - began, phases=clock.phases)
        self.keeper.change(loads=(*self.keeper.run.loads, load))
        self.note_versions()

    async def stop_all_but(self, kept: str | None) -> None:
        """Both stopped, or the other one, and this one awake as a cold step leaves it."""
        await self.bed.stop([name for name in self.plan.pair if name != kept], report=self.report)
        if kept is not None and self.bed.snapshot().model(kept).state is not State.AWAKE:
            await self.bed.stop([kept], report=self.report)
            await self.bed.start([kept], skip=AS_VLLM_ALONE, report=self.report)

    def note_versions(self) -> None:
        """Keep the pair's version of vLLM, or both, which are known once a server of them runs."""
        known = self.keeper.run.machine
        version = machine.each(self.bed.vllm_version(name) for name in self.plan.pair)
        if known.vllm != version:
            self.keeper.change(machine=msgspec.structs.replace(known, vllm=version))

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────

    async def step(self, key: PassKey, number: int, leaving: str | None, target: str, before: Memory) -> Step:
        """One switch and one inference; memory is read outside of what is timed."""
        question = self.plan.question(key, number)
        moment, began = time.time(), time.perf_counter()
        if key.mode.level is None:
            phases = await self.restart_as(leaving, target)
        else:
            phases = await self.sleep_and_wake(leaving, target, key.mode.level)
        switch = time.perf_counter() - began
        ttft, inference, tokens = await self.ask(target, question)
        self.note_versions()
        return Step(
            number=number,
            leaving=leaving,
            target=target,
            began=moment,
            switch=switch,
            phases=phases,
            question=question,
            ttft=ttft,
            inference=inference,
            tokens=tokens,
            before=before,
            after=await self.memory(),
        )

    async def sleep_and_wake(self, leaving: str | None, target: str, level: int) -> dict[str, float]:
        """The leaving one sleeps even where both fit; the ledgers of both operations."""
        phases: dict[str, float] = {}
        if leaving is not None:
            slept = await self.bed.sleep(leaving, level=level, report=self.report)
            phases |= {phase: seconds for phase, seconds in slept.phases.items() if seconds is not None}
        woke = await self.bed.switch(target, report=self.report)
        return phases | {phase: seconds for phase, seconds in woke.phases.items() if seconds is not None}

    async def restart_as(self, leaving: str | None, target: str) -> dict[str, float]:
        """The leaving one is stopped, the target started; seconds of both ends."""
        phases: dict[str, float] = {}
        if leaving is not None:
            began = time.perf_counter()
            await self.bed.stop([leaving], report=self.report)
            phases["stop"] = time.perf_counter() - began
        clock = _PhaseClock(self.report)
        await self.bed.start([target], skip=AS_VLLM_ALONE, report=clock)
        clock.stop()
        return phases | clock.phases

    async def ask(self, name: str, question: str) -> tuple[float | None, float, int | None]:
        """One answer: seconds to its first text and to its end, and its tokens; raises OperationError."""
        ttft, tokens = None, None
        began = time.perf_counter()
        answer = self.bed.chat(
            name,
            [{"role": "user", "content": question}],
            params={"max_tokens": MAX_TOKENS, "temperature": 0},
        )
        async with contextlib.aclosing(answer) as events:  # type: ignore[type-var]
            async for event in events:
                if event.error:
                    raise OperationError(f"{name} did not answer: {event.error}", "Look at its log.")
                ttft = event.ttft if event.ttft is not None else ttft
                tokens = event.completion_tokens if event.completion_tokens is not None else tokens
        return ttft, time.perf_counter() - began, tokens

    async def memory(self) -> Memory:
        """What the pair holds now."""
        snapshot = await self.bed.measured()
        models = [snapshot.model(name) for name in self.plan.pair]
        gpus = {gpu for model in models for gpu in model.gpus}
        return Memory(
            vram={model.name: model.vram_bytes for model in models},
            ram={model.name: model.ram_bytes for model in models},
            gpu_used={str(gpu.index): gpu.used_bytes for gpu in snapshot.gpus if gpu.index in gpus},
            ram_available=snapshot.host.ram_available_bytes,
        )
