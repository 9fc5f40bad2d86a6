"""What is known now, read without asking anybody: records, keepers, telemetry. Nothing is written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.attached.probe import QUICK, probe_all, snapshot_of
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.keeper_client import read_status
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe import supervised
from vllm_sleep_tui.fleet.snapshot import (
    FleetSnapshot,
    GpuProcess,
    GpuSnapshot,
    HostSnapshot,
    ModelSnapshot,
    Serving,
)
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.telemetry.attribution import ModelMemory
from vllm_sleep_tui.telemetry.sampler import Sample, Sampler

NOT_ASKED: Mapping[str, Serving] = MappingProxyType({})


class Snapshotter:
    """Turns records and a sample into a snapshot."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def roots(self) -> dict[str, int]:
        """The keeper's pid of each model that has one: its processes are below it."""
        pids = {}
        for model in self._core.models():
            try:
                record, status = model.read(), read_status(model.keeper_file)
            except OperationError:
                continue  # the snapshot tells of it
            if record.state in (State.STOPPED, State.FAILED) or status.keeper is None:
                continue
            if status.launch == record.launch and status.exit is None:
                pids[model.name] = status.keeper.pid
        return pids

    def snapshot(
        self,
        sample: Sample,
        notes: tuple[str, ...] = (),
        serving: Mapping[str, Serving] = NOT_ASKED,
    ) -> FleetSnapshot:
        """Everything, with the memory of `sample`, further `notes`, and how awake models serve."""
        return FleetSnapshot(
            models=tuple(
                self._model(model, sample.models.get(model.name), serving.get(model.name))
                for model in self._core.models()
            ),
            gpus=tuple(self._gpu(sample, index) for index in range(len(sample.gpus))),
            host=HostSnapshot(
                ram_available_bytes=sample.host.available_bytes, ram_total_bytes=sample.host.total_bytes
            ),
            time=time.time(),
            notes=(*sample.notes, *notes),
        )

    def _model(self, model: Model, memory: ModelMemory | None, serving: Serving | None) -> ModelSnapshot:
        try:
            return observe(model, memory, serving)
        except OperationError as error:
            return unreadable(model, error)

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
            pool_bytes=reading.pool_bytes,
            others=tuple(
                GpuProcess(pid=other.pid, user=other.user, command=other.command, bytes=other.bytes)
                for other in others
            ),
        )


def observe(model: Model, memory: ModelMemory | None, serving: Serving | None) -> ModelSnapshot:
    """How the model's server is now, as records and the latest look tell; nobody is asked.

    Raises OperationError if its record cannot be read.
    """
    if model.config.is_attached:
        return snapshot_of(model.read(), model.config, model.core.probes.get(model.name))
    return supervised.observe(model, memory, serving)


def unreadable(model: Model, error: OperationError) -> ModelSnapshot:
    """A model of which nothing is known, because its record cannot be read."""
    config = model.config
    return ModelSnapshot(
        name=model.name,
        state=State.FAILED,
        gpus=config.gpus,
        reason=error.what,
        cure=error.cure,
        configured_level=str(config.level),
        source=config.url or config.model or "",
        is_external=config.is_attached,
    )


@contextlib.contextmanager
def looking(loaded: LoadedConfig, state_dir: Path) -> Iterator[Callable[[], FleetSnapshot]]:
    """Each call of what this yields is one snapshot: HTTP to attached servers alone, at most QUICK."""
    core = Core(loaded, state_dir)
    snapshotter = Snapshotter(core)
    sampler = Sampler(core.reader, core.simulated)

    def look() -> FleetSnapshot:
        core.probes.update(probe_all(core.config.models, QUICK))
        sampler.set_roots(snapshotter.roots())
        return snapshotter.snapshot(sampler.sample_once())

    try:
        yield look
    finally:
        core.reader.close()


def read_once(loaded: LoadedConfig, state_dir: Path) -> FleetSnapshot:
    """One snapshot; nothing is kept open."""
    with looking(loaded, state_dir) as look:
        return look()
