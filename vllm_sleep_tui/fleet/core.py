"""What every operation needs: the config, the records, the measurements, the GPUs, the servers' clients."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.config import ModelConfig
from vllm_sleep_tui.config_file import LoadedConfig, parse_bytes
from vllm_sleep_tui.errors import OperationError, RefusedError, UsageError
from vllm_sleep_tui.fleet.footprints import Footprint, FootprintStore, digest
from vllm_sleep_tui.fleet.keeping import is_kept
from vllm_sleep_tui.fleet.locks import check_folder, gpu_lock_path
from vllm_sleep_tui.fleet.other_ends import check_for_key, check_own
from vllm_sleep_tui.fleet.records import Record, RecordStore
from vllm_sleep_tui.fleet.server_keys import key_of
from vllm_sleep_tui.fleet.sighting import Sighting, base_of
from vllm_sleep_tui.fleet.states import Event, next_state
from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.gpus import VISIBLE, GpuReader, GpuReading, fault_of, is_hidden, open_reader
from vllm_sleep_tui.telemetry.processes import memory
from vllm_sleep_tui.telemetry.simulated import memories

if TYPE_CHECKING:
    from vllm_sleep_tui.engine.client import VllmClient
    from vllm_sleep_tui.fleet.history import History

GIB = 2**30
SIMULATED_RAM = 64 * GIB
PINNED_NOISE = GIB // 4
"""Shared memory of an engine that never slept: 0.07 GiB on an H100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationLimits:
    """How long an operation waits for a server, in seconds."""

    drain: float = 30.0
    """For the answers under way, before they are cut off."""
    settle: float = 5.0
    """For the memory to be seen gone after a sleep."""
    call: float = 60.0
    """For any call to vLLM."""
    call_per_gib: float = 10.0
    """On top, for each GiB that the call moves; pinning took 0.7 s per GiB on an H100, slow disks need the
    rest."""


def simulated_folder(loaded: LoadedConfig, state_dir: Path) -> Path | None:
    """The folder of the config's simulated GPUs, made if need be; None if it has none.

    Raises OperationError if it cannot be written.
    """
    gpus = loaded.config.simulated_gpus
    if not gpus:
        return None
    store = RecordStore(state_dir, loaded.path)
    folder = store.path("simulated", "gpus")
    described = [(gpu.name, parse_bytes(gpu.memory)) for gpu in gpus]
    try:
        devices.create(folder, described, ram_total_bytes=SIMULATED_RAM)
    except OSError as error:
        raise OperationError(
            f"The simulated GPUs cannot be written to {folder}: {error.strerror}.",
            "Free space, make the folder writable, or name another with XDG_STATE_HOME.",
        ) from None
    return folder


class Core:
    """One config over one state folder; shared by all operations of a process."""

    def __init__(self, loaded: LoadedConfig, state_dir: Path, limits: OperationLimits | None = None) -> None:
        check_folder()
        self.limits = limits or OperationLimits()
        self.loaded = loaded
        self.config = loaded.config
        self.state_dir = state_dir
        self.simulated = simulated_folder(loaded, state_dir)
        self.records = RecordStore(state_dir, loaded.path)
        self.footprints = FootprintStore(state_dir)
        self.reader: GpuReader = open_reader(self.simulated)
        self._happened: list[Callable[[History], None]] = []
        self._flushing = threading.Lock()
        self._digests: dict[str, str] = {}
        self._clients: dict[tuple[str | None, ...], VllmClient] = {}
        self._launched: dict[str, tuple[str, VllmClient]] = {}
        self._retired: list[VllmClient] = []
        self.sightings: dict[str, Sighting] = {}
        """Of the attached models: how each server was when it was last looked at."""
        self._gpus = {reading.index: reading for reading in self.reader.read()}

    def reload(self, loaded: LoadedConfig) -> None:
        """Go on with a changed config of the same file; its simulated GPUs stay as they were."""
        self.loaded = loaded
        self.config = loaded.config
        self._digests.clear()

    def model(self, name: str) -> ModelConfig:
        """The model's config; raises UsageError with the nearest name if there is none."""
        try:
            return self.config.models[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.config.models, n=1)
            cure = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(self.config.models)}."
            raise UsageError(f"{self.loaded.path}: no model is called {name!r}.", cure) from None

    def vllm_command(self, name: str) -> tuple[str, ...]:
        """The vllm of the model."""
        return self.model(name).vllm_command or self.config.vllm_command

    def footprint(self, name: str) -> Footprint:
        """What was measured of the model with its present arguments."""
        return self.footprints.get(self.digest(name), self.records.vllm_version(name))

    def digest(self, name: str) -> str:
        """Names the model with its present arguments."""
        known = self._digests.get(name)
        if known is None:
            known = self._digests[name] = digest(self.model(name))
        return known

    def remember(self, record: Record, change: Callable[[Footprint], Footprint]) -> None:
        """Keep a measurement of the record's launch; it is written after the operation."""
        name = record.digest or self.digest(record.name)
        self.footprints.note(name, record.vllm_version, change)

    def pinned_now(self, record: Record) -> int:
        """Bytes of RAM that the record's engines have pinned; 0 if they never slept at level 1."""
        pinned = 0
        held = memories(self.simulated) if self.simulated else {}
        for engine in record.engines:
            found = held.get(engine.pid) or memory(engine.pid)
            pinned += found.pinned_bytes if found else 0
        return pinned if pinned > PINNED_NOISE else 0

    def total(self, gpu: int) -> int | None:
        """The memory of a GPU in bytes; None if it is not known."""
        reading = self._known_gpus({gpu}).get(gpu)
        return reading.total_bytes if reading else None

    def _known_gpus(self, wanted: Iterable[int]) -> dict[int, GpuReading]:
        """The GPUs by index; read again while one that is wanted is missing: the driver may load later."""
        if not self._gpus.keys() >= set(wanted):
            self._gpus |= {reading.index: reading for reading in self.reader.read()}
        return self._gpus

    def check_gpus(self, name: str) -> None:
        """Raises UsageError if the model names a GPU that this machine does not have.

        Raises RefusedError if the GPU or the driver does not answer, is not this user's or not this shell's.
        """
        if self.reader.faults:
            self.reader.read()  # it may be well again
        known_gpus = self._known_gpus(self.model(name).gpus)
        for gpu in self.model(name).gpus:
            if fault := fault_of(self.reader.faults, gpu):
                raise RefusedError(f"Cannot start {name}: {fault.what}", fault.cure)
        for gpu in self.model(name).gpus:
            self.check_visible(name, known_gpus.get(gpu))
        if not known_gpus:
            return  # without NVML nothing is known; vLLM will say
        for gpu in self.model(name).gpus:
            if gpu not in known_gpus:
                known = ", ".join(map(str, sorted(known_gpus)))
                raise UsageError(
                    f"{self.loaded.path}: models.{name}.gpus: there is no GPU {gpu}.",
                    f"This machine has: {known}.",
                )

    def check_visible(self, name: str, gpu: GpuReading | None) -> None:
        """Raises RefusedError if the shell was given other GPUs: by a scheduler, or by agreement."""
        visible = os.environ.get(VISIBLE)
        if gpu is None or gpu.simulated or not is_hidden(gpu, visible):
            return
        raise RefusedError(
            f"Cannot start {name}: GPU {gpu.index} is not this shell's; {VISIBLE} is {visible!r} here.",
            f"Give it one of those under `gpus:`, or unset {VISIBLE} if GPU {gpu.index} is yours.",
        )

    def gpu_locks(self, gpus: set[int]) -> list[Path]:
        """The lock files of these GPUs, in PCI order."""
        known = self._known_gpus(gpus)
        uuids = [(gpu, known[gpu].uuid if gpu in known else f"index-{gpu}") for gpu in gpus]
        return [gpu_lock_path(uuid) for _, uuid in sorted(uuids)]

    def ram_lock(self) -> Path:
        """The machine's lock for pinning RAM; simulated machines have their own."""
        simulated = next((gpu.uuid.rpartition("-")[0] for gpu in self._gpus.values() if gpu.simulated), None)
        return gpu_lock_path("ram" if simulated is None else f"ram-{simulated}")

    def model_locks(self, names: set[str]) -> list[Path]:
        """The lock files of these models, by name."""
        return [self.records.path(name, "lock") for name in sorted(names)]

    def readable(self) -> list[Record]:
        """The records of all models whose files can be read: what is wrong with those of one is its trouble
        alone, and its server, if it runs, counts as a stranger's."""
        found = []
        for name in self.config.models:
            with contextlib.suppress(OperationError):
                is_kept(self.keeper_file(name))
                found.append(self.records.read(name))
        return found

    def keeper_file(self, name: str) -> Path:
        """Where the model's keeper says how its server is."""
        return self.records.path(name, "keeper")

    def enter(self, record: Record, event: Event, **changes: object) -> Record:
        """Move the record by `event`, with other fields changed, and write it."""
        state, now = next_state(record.state, event), time.time()
        entered = self.write(record, state=state, since=now, **changes)
        self.note(lambda past: past.record_state(record.name, state, entered.level, at=now))
        return entered

    def note(self, happened: Callable[[History], None]) -> None:
        """Keep something for the history; it is written by `flush`, off the path of an operation."""
        self._happened.append(happened)

    @functools.cached_property
    def history(self) -> History:
        """The past of this config's models."""
        from vllm_sleep_tui.fleet.history import History  # `status` needs no database

        return History(self.state_dir, self.loaded.path)

    def flush(self) -> None:
        """Write the measurements and the past; blocks for milliseconds."""
        with self._flushing:  # who closes waits for who is writing still
            self.footprints.flush()
            happened, self._happened = self._happened, []
            for tell in happened:
                tell(self.history)

    def write(self, record: Record, **changes: object) -> Record:
        """Write the record with some fields changed; raises OperationError if the disk refuses."""
        changed = msgspec.structs.replace(record, **changes)
        try:
            self.records.write(changed)
        except OSError as error:
            raise OperationError(
                f"Could not write {self.records.path(record.name)}: {error.strerror}.",
                "Make room or give write permission there; the servers run on.",
            ) from error
        return changed

    def client(self, record: Record) -> VllmClient:
        """The client of the record's running server, one per launch."""
        from vllm_sleep_tui.engine.client import VllmClient  # httpx costs 0.2 s that `status` does not have

        assert record.launch is not None
        assert record.port is not None
        launch, client = self._launched.get(record.name, (None, None))
        if client is None or launch != record.launch:
            if client is not None:
                self._retired.append(client)
            key = key_of(record, self.config.models.get(record.name))
            client = VllmClient(
                record.port, uds=record.socket, secret=record.secret, check=check_own, api_key=key
            )
            self._launched[record.name] = (record.launch, client)
        return client

    def client_at(self, model: ModelConfig) -> VllmClient:
        """The client of an attached server."""
        from vllm_sleep_tui.engine.client import VllmClient  # as above

        key = (model.url, model.api_key, model.url_user)
        if key not in self._clients:
            base = base_of(model.url or "")
            check = check_for_key(model)
            self._clients[key] = VllmClient(0, base_url=base, api_key=model.api_key, check=check)
        return self._clients[key]

    async def close_retired(self) -> None:
        """Close the connections to launches that are over."""
        retired, self._retired = self._retired, []
        for client in retired:
            await client.aclose()

    async def close(self) -> None:
        """Close every connection; servers run on."""
        self._retired += [*self._clients.values(), *(client for _, client in self._launched.values())]
        self._clients.clear()
        self._launched.clear()
        await self.close_retired()
        await asyncio.to_thread(self.flush)
        if "history" in self.__dict__:
            await asyncio.to_thread(self.history.close)
        self.reader.close()


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.1f} GiB"
