"""What is known now, read without asking anybody: records, keepers, telemetry. Nothing is written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.causes import Diagnosis
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.attached.probe import QUICK, look_at, snapshot_of
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.keeper_client import is_kept, read_word
from vllm_sleep_tui.fleet.operations.end import RECORD_LOST, SERVER_GONE, cause_in_log
from vllm_sleep_tui.fleet.snapshot import (
    FleetSnapshot,
    GpuProcess,
    GpuSnapshot,
    HostSnapshot,
    ModelSnapshot,
    OperationSnapshot,
    Serving,
)
from vllm_sleep_tui.fleet.states import RUNNING, SETTLED, State
from vllm_sleep_tui.fleet.store.records import Intent, Record
from vllm_sleep_tui.telemetry.attribution import ModelMemory
from vllm_sleep_tui.telemetry.processes import is_alive
from vllm_sleep_tui.telemetry.sampler import Sample, Sampler

NOT_ASKED: Mapping[str, Serving] = MappingProxyType({})


class Viewer:
    """Turns records and a sample into a snapshot."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._causes: dict[tuple[str | None, bool], Diagnosis] = {}

    def roots(self) -> dict[str, int]:
        """The keeper's pid of each model that has one: its processes are below it."""
        found = {}
        for name in self._core.config.models:
            try:
                record = self._core.records.read(name)
                word = read_word(self._core.keeper_file(name))
            except OperationError:
                continue  # the snapshot tells of it
            if record.state in (State.STOPPED, State.FAILED) or word.keeper is None:
                continue
            if word.launch == record.launch and word.exit is None:
                found[name] = word.keeper.pid
        return found

    def snapshot(
        self,
        sample: Sample,
        notes: tuple[str, ...] = (),
        serving: Mapping[str, Serving] = NOT_ASKED,
    ) -> FleetSnapshot:
        """Everything, with the memory of `sample`, further `notes`, and how awake models serve."""
        models = tuple(
            self._model(name, sample.models.get(name), serving.get(name)) for name in self._core.config.models
        )
        return FleetSnapshot(
            models=models,
            gpus=tuple(self._gpu(sample, index) for index in range(len(sample.gpus))),
            host=HostSnapshot(
                ram_available_bytes=sample.host.available_bytes, ram_total_bytes=sample.host.total_bytes
            ),
            time=time.time(),
            notes=(*sample.notes, *notes),
        )

    def _model(self, name: str, memory: ModelMemory | None, serving: Serving | None) -> ModelSnapshot:
        model = self._core.config.models[name]
        try:
            record = self._core.records.read(name)
            state, cause = self.observe(record)
        except OperationError as error:
            return unreadable(name, model, error)
        if model.url is not None:
            return snapshot_of(record, model, self._core.sightings.get(name))
        settled = state in SETTLED
        intent = None if settled and state is not record.state else record.intent
        holds_nothing = state is State.STOPPED or record.state is State.FAILED
        vram = {} if not model.gpus or holds_nothing else vram_of(memory, model.gpus)
        return ModelSnapshot(
            name=name,
            state=state,
            level=record.level if state in (State.ASLEEP, State.FALLING_ASLEEP, State.WAKING) else None,
            phase=intent.phase if intent and not settled else None,
            operation=operation_of(intent),
            pid=record.server.pid if record.server and state not in (State.STOPPED, State.FAILED) else None,
            port=record.port if state not in (State.STOPPED, State.FAILED) else model.port,
            gpus=model.gpus,
            vram_bytes=None if vram is None else sum(vram.values()),
            vram_by_gpu=vram,
            ram_bytes=0 if holds_nothing else (memory.ram_bytes if memory else None),
            pinned_bytes=0 if holds_nothing else (memory.pinned_bytes if memory else None),
            since=record.since or None,
            reason=cause.reason if cause else record.reason,
            cure=cause.cure if cause else record.cure,
            last_switch=record.last_switch,
            last_failure=record.last_failure,
            progress=intent.detail if intent else None,
            configured_level=str(model.level),
            resolved_level=record.resolved_level,
            sleep_backend=None if holds_nothing else record.sleep_backend,
            sleep_backend_why=None if holds_nothing else record.sleep_backend_why,
            proof=record.proof,
            frees_memory=bool(model.gpus),
            source=model.model or "",
            serving=serving if state is State.AWAKE else None,
        )

    def observe(self, record: Record) -> tuple[State, Diagnosis | None]:
        """The state as it is, and why, where the record does not know yet: servers die without asking."""
        path = self._core.keeper_file(record.name)
        if record.state in (State.STOPPED, State.FAILED):
            return (State.FAILED, RECORD_LOST) if is_kept(path) else (record.state, None)
        word = read_word(path)
        if word.launch != record.launch:  # its keeper is about to be started
            return (record.state, None) if record.intent else (State.FAILED, SERVER_GONE)
        if not is_kept(path):
            if record.state is State.STOPPING or (word.exit is not None and word.exit.asked):
                return State.STOPPED, None
            return State.FAILED, self._cause(record)
        if record.state in RUNNING and not all(is_alive(engine) for engine in record.engines):
            return State.FAILED, self._cause(record)
        return record.state, None

    def _cause(self, record: Record) -> Diagnosis:
        """What the log says, read once when the engine is gone and once when the server is."""
        word = read_word(self._core.keeper_file(record.name))
        key = (record.launch, word.exit is not None)
        if key not in self._causes:
            self._causes[key] = cause_in_log(self._core, record, word) or SERVER_GONE
        return self._causes[key]

    def _gpu(self, sample: Sample, position: int) -> GpuSnapshot:
        reading = sample.gpus[position]
        others = sample.strangers.get(reading.index, ())
        return GpuSnapshot(
            index=reading.index,
            uuid=reading.uuid,
            name=reading.name,
            used_bytes=reading.used_bytes,
            total_bytes=reading.total_bytes,
            utilization=reading.utilization,
            simulated=reading.simulated,
            power_watts=reading.power_watts,
            temperature=reading.temperature,
            power_limit_watts=reading.power_limit_watts,
            sm_clock_mhz=reading.sm_clock_mhz,
            throttle=reading.throttle,
            others=tuple(
                GpuProcess(pid=other.pid, user=other.user, command=other.command, bytes=other.bytes)
                for other in others
            ),
        )


def unreadable(name: str, model: ModelConfig, error: OperationError) -> ModelSnapshot:
    """A model of which nothing is known, because its record cannot be read."""
    return ModelSnapshot(
        name=name,
        state=State.FAILED,
        gpus=model.gpus,
        reason=error.what,
        cure=error.cure,
        configured_level=str(model.level),
        source=model.url or model.model or "",
        is_external=model.url is not None,
    )


def operation_of(intent: Intent | None) -> OperationSnapshot | None:
    """What is under way, for whoever looks."""
    if intent is None:
        return None
    return OperationSnapshot(name=intent.operation, since=intent.since, eta=intent.eta)


def vram_of(memory: ModelMemory | None, gpus: tuple[int, ...]) -> dict[str, int] | None:
    """VRAM by GPU index as JSON keys; None unless it is known for each of the model's GPUs."""
    if memory is None or memory.vram_by_gpu is None or not set(gpus) <= set(memory.vram_by_gpu):
        return None
    return {str(gpu): memory.vram_by_gpu[gpu] for gpu in gpus}


@contextlib.contextmanager
def looking(loaded: LoadedConfig, state_dir: Path) -> Iterator[Callable[[], FleetSnapshot]]:
    """Each call of what this yields is one snapshot: HTTP to attached servers alone, at most QUICK."""
    core = Core(loaded, state_dir)
    viewer = Viewer(core)
    sampler = Sampler(core.reader, core.simulated)

    def look() -> FleetSnapshot:
        core.sightings.update(look_at(core.config.models, QUICK))
        sampler.set_roots(viewer.roots())
        return viewer.snapshot(sampler.sample_once())

    try:
        yield look
    finally:
        core.reader.close()


def read_once(loaded: LoadedConfig, state_dir: Path) -> FleetSnapshot:
    """One snapshot; nothing is kept open."""
    with looking(loaded, state_dir) as look:
        return look()
