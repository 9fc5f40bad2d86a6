"""A stand-in for servers: a fleet whose snapshots and answers a test writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.config.changes import Change, changes
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import PanelError, RefusedError
from vllm_sleep_tui.fleet.advice import Advice, apply_text
from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.pictures import Picture
from vllm_sleep_tui.fleet.server_log import ServerLog, earlier_at, earlier_of
from vllm_sleep_tui.fleet.snapshot import (
    ChatEvent,
    FleetSnapshot,
    GpuSnapshot,
    HeldProcess,
    HostSnapshot,
    ModelSnapshot,
    OperationSnapshot,
    Prediction,
    Progress,
    SwitchTimes,
)
from vllm_sleep_tui.fleet.states import StartPhase, State
from vllm_sleep_tui.fleet.store.history import History

GIB = 1024**3
NOW = 1_764_000_000.0
TIMES = SwitchTimes(
    phases={
        "drain": 0.004,
        "sleep": 0.067,
        "settle": 0.004,
        "wake": 0.360,
        "weights": None,
        "reload": None,
        "kv_cache": None,
        "reset": None,
        "prove": 0.026,
    },
    total=0.461,
)


def gib(value: float) -> int:
    return int(value * GIB)


def model(name: str, state: State, vram: float, ram: float, pinned: float, **more: Any) -> ModelSnapshot:
    running = state not in {State.STOPPED, State.FAILED}
    fields: dict[str, Any] = {
        "gpus": (0,),
        "pid": 4000 + len(name) if running else None,
        "port": 8000 + len(name) if running else None,
        "vram_bytes": gib(vram),
        "vram_by_gpu": {"0": gib(vram)} if vram else {},
        "ram_bytes": gib(ram),
        "pinned_bytes": gib(pinned),
        "since": NOW - 3,
        "source": f"example/{name}",
        "configured_level": "auto",
        "resolved_level": "1",
    }
    return ModelSnapshot(name=name, state=state, **(fields | more))


def four_models() -> FleetSnapshot:
    """One H100: one model awake, two asleep, one stopped."""
    return FleetSnapshot(
        time=NOW,
        models=(
            model("qwen", State.AWAKE, 69.2, 4.9, 3.0, last_switch=TIMES, proof="proven"),
            model("phi", State.ASLEEP, 1.6, 12.0, 10.1, level=1, since=NOW - 252, last_switch=TIMES),
            model("coder", State.ASLEEP, 1.4, 7.5, 5.6, level=1, since=NOW - 1900),
            model("vision", State.STOPPED, 0, 0, 0),
        ),
        gpus=(
            GpuSnapshot(
                index=0,
                uuid="GPU-1",
                name="NVIDIA H100 80GB HBM3",
                used_bytes=gib(72.9),
                total_bytes=gib(79.6),
                utilization=87,
                power_watts=412,
                temperature=61,
                simulated=True,
            ),
        ),
        host=HostSnapshot(ram_available_bytes=gib(92), ram_total_bytes=gib(125)),
    )


def prediction_for(snapshot: FleetSnapshot, name: str) -> Prediction:
    target = snapshot.model(name)
    if target.state is State.AWAKE:
        return Prediction(target=name, action="nothing", sentence=f"{name} is awake already.")
    if target.state is State.STOPPED:
        return Prediction(
            target=name,
            action="start",
            seconds=52,
            sleeps=("qwen",),
            sentence=f"Starts {name}; sleeps qwen first.",
        )
    return Prediction(
        target=name,
        action="switch",
        sleeps=("qwen",),
        seconds=0.53,
        needs_bytes={"0": gib(66.6)},
        free_bytes={"0": gib(75.2)},
        used_after={"0": gib(71.0)},
        sentence=f"Sleeps qwen (level 1; its pool in RAM is kept), then wakes {name}.",
    )


def write_config(folder: Path) -> Path:
    """A config of the four models."""
    path = folder / "scripted.yaml"
    models = "".join(
        f"  {name}:\n    model: example/{name}  # {name}'s own\n    gpus: [0]\n"
        for name in ("qwen", "phi", "coder", "vision")
    )
    path.write_text(f"vllm_command: [vllm]\nmodels:\n{models}", encoding="utf-8")
    return path


class ScriptedFleet:
    """Plays what the test sets; operations end as `outcome` says, after `gate` unless `is_gated` is off."""

    def __init__(self, snapshot: FleetSnapshot | None = None, *, logs: Path = Path("/nonexistent")) -> None:
        self.now = snapshot or four_models()
        self.calls: list[tuple[Any, ...]] = []
        self.happened: asyncio.Queue[FleetEvent] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.is_gated = True
        self.waits_for: str | None = None
        self.history = History(logs)
        self.takes = {"phi": {"wake1": 0.46}}
        self.held: tuple[HeldProcess, ...] = ()
        self.asked_processes = 0
        self.loaded = load(write_config(logs)) if logs.is_dir() else None
        self.state_dir = logs
        self.advised: Advice | None = None
        self.outcome: Callable[[], object] = lambda: TIMES
        self.steps: list[Progress] = []
        self.cancelled: list[str] = []
        self.blind: set[str] = set()
        self.answers: dict[str, list[ChatEvent | float | PanelError]] = {}
        self.asked: list[tuple[str, list[dict[str, Any]]]] = []
        self.asked_with: list[dict[str, Any] | None] = []
        self.logs = logs

    def snapshot(self) -> FleetSnapshot:
        return self.now

    def predict(self, name: str) -> Prediction:
        return prediction_for(self.now, name)

    def look_less(self, less: bool) -> None:
        """Its figures are those of the script."""

    def waits(self, name: str) -> str | None:
        return self.waits_for

    async def past(self, window: float) -> Past:
        names = [one.name for one in self.now.models]
        past = await asyncio.to_thread(self.history.past, names, window)
        return msgspec.structs.replace(past, takes=self.takes)

    async def recent_events(self, count: int, *, only_failures: bool = False) -> list[FleetEvent]:
        return await asyncio.to_thread(self.history.latest_events, count, only_failures=only_failures)

    async def events(self, after: int | None = None) -> AsyncGenerator[FleetEvent, None]:
        """From the test's own queue, or out of the history after an event."""
        while after is None:
            yield await self.happened.get()
        last = after
        while True:
            happened, last = await asyncio.to_thread(self.history.events_after, last)
            for event in happened:
                yield event
            await asyncio.sleep(0.05)

    def log(self, name: str) -> ServerLog:
        async def forget() -> None:
            self.change(name, last_failure=None)

        died = {one.name: one.last_failure for one in self.now.models}.get(name)
        earlier = None if died is None else earlier_of(died)
        return ServerLog(self.logs / f"{name}.log", earlier, None if died is None else forget)

    async def log_at(self, name: str, event: FleetEvent) -> ServerLog:
        log = self.log(name)
        launches = await asyncio.to_thread(self.history.launches_around, name, event.time)
        earlier = earlier_at(log.path, event, *launches)
        return log if earlier is None else ServerLog(log.path, earlier)

    def change(self, name: str, **fields: Any) -> None:
        """Another snapshot, with one model changed."""
        models = tuple(
            msgspec.structs.replace(one, **fields) if one.name == name else one for one in self.now.models
        )
        self.now = msgspec.structs.replace(self.now, models=models)

    def reload(self, loaded: LoadedConfig) -> list[Change]:
        found = changes(self.loaded.config, loaded.config, {})
        self.loaded = loaded
        return found

    async def apply(self, text: str) -> None:
        self.reload(await asyncio.to_thread(apply_text, self.loaded, text, self.state_dir))

    async def advice(self) -> Advice:
        assert self.advised is not None
        return self.advised

    async def processes(self) -> tuple[HeldProcess, ...]:
        self.asked_processes += 1
        return self.held

    def settle_at(self, now: float) -> None:
        """The same, at another moment."""
        self.now = msgspec.structs.replace(self.now, time=now)

    async def _operate(self, *call: Any, report: Callable[[Progress], None] | None) -> object:
        self.calls.append(call)
        for step in self.steps:
            if report is not None:
                report(step)
        if not self.is_gated:
            return self.outcome()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(call[0])
            raise
        return self.outcome()

    async def start(self, names: Sequence[str], *, report: Any = None) -> object:
        return await self._operate("start", *names, report=report)

    async def stop(self, names: Sequence[str], *, force: bool = False, report: Any = None) -> object:
        return await self._operate("stop", *names, report=report)

    async def restart(self, names: Sequence[str], *, force: bool = False, report: Any = None) -> object:
        return await self._operate("restart", *names, report=report)

    async def sleep(
        self, name: str, *, level: int | None = None, force: bool = False, report: Any = None
    ) -> object:
        return await self._operate("sleep", name, level, report=report)

    async def wake(self, name: str, *, report: Any = None) -> object:
        return await self._operate("wake", name, report=report)

    async def switch(self, name: str, *, force: bool = False, report: Any = None) -> SwitchTimes:
        await self._operate("switch", name, report=report)
        return TIMES

    async def check_sees(self, name: str, pictures: Sequence[Picture]) -> None:
        if pictures and name in self.blind:
            raise RefusedError(f"{name} reads text alone.", "Ask a model that sees.")

    async def chat(
        self, name: str, messages: list[dict[str, Any]], *, params: Any = None, report: Any = None
    ) -> AsyncIterator[ChatEvent]:
        self.asked.append((name, messages))
        self.asked_with.append(params)
        for step in self.steps:
            report(step)
        for piece in self.answers.get(name, []):
            if isinstance(piece, PanelError):
                raise piece
            if isinstance(piece, float):
                await asyncio.wait_for(self.gate.wait(), None)
            else:
                await asyncio.sleep(0)
                yield piece


def starting(snapshot: FleetSnapshot) -> FleetSnapshot:
    """The same, with `vision` half started."""
    models = tuple(
        msgspec.structs.replace(
            one,
            state=State.STARTING,
            phase=StartPhase.COMPILING,
            progress="torch.compile",
            since=NOW - 21,
            operation=OperationSnapshot(name="start", since=NOW - 21, eta=52),
        )
        if one.name == "vision"
        else one
        for one in snapshot.models
    )
    return msgspec.structs.replace(snapshot, models=models)
