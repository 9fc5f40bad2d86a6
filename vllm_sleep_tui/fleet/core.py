"""What every operation needs: the config, the records, the measurements, the GPUs, the servers' clients."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.config.load import LoadedConfig, parse_bytes
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.causes import Diagnosis
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.fleet.attached.probe import ProbeResult, base_of
from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.keeper_client import is_kept
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.peer_checks import check_for_key, check_own
from vllm_sleep_tui.fleet.pool import Pool, PooledReader
from vllm_sleep_tui.fleet.server_keys import key_of
from vllm_sleep_tui.fleet.store.locks import check_folder, gpu_lock_path
from vllm_sleep_tui.fleet.store.records import Record, RecordStore
from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.sizing.footprints import FootprintStore, digest
from vllm_sleep_tui.telemetry.gpus import GpuReader, GpuReading, open_reader
from vllm_sleep_tui.units import GIB

if TYPE_CHECKING:
    from vllm_sleep_tui.engine.client import VllmClient
    from vllm_sleep_tui.fleet.store.history import History

SIMULATED_RAM = 64 * GIB


class OperationLimits(msgspec.Struct, frozen=True, kw_only=True):
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
        self.reader: GpuReader = PooledReader(open_reader(self.simulated))
        self.on_written: Callable[[], None] | None = None
        """Called, from any thread, when something has been added to the history."""
        self._happened: list[Callable[[History], None]] = []
        self._flushing = threading.Lock()
        self._digests: dict[str, str] = {}
        self._clients: dict[tuple[str | None, ...], VllmClient] = {}
        self._launched: dict[str, tuple[str, VllmClient]] = {}
        self._retired: list[VllmClient] = []
        self.causes: dict[tuple[str | None, bool], Diagnosis] = {}
        """Why servers ended, by launch and whether the server itself is gone: a log is read once for it."""
        self.probes: dict[str, ProbeResult] = {}
        """Of the attached models: how each server was when it was last looked at."""
        self._gpus = {reading.index: reading for reading in self.reader.read()}

    def reload(self, loaded: LoadedConfig) -> None:
        """Go on with a changed config of the same file; its simulated GPUs stay as they were."""
        self.loaded = loaded
        self.config = loaded.config
        self._digests.clear()

    def model(self, name: str) -> Model:
        """A handle of the model; raises UsageError with the nearest name if the config has none."""
        self.model_config(name)
        return Model(self, name)

    def models(self) -> list[Model]:
        """A handle of each model, in the config's order."""
        return [Model(self, name) for name in self.config.models]

    def model_config(self, name: str) -> ModelConfig:
        """What the config says of a model; raises UsageError with the nearest name if there is none."""
        try:
            return self.config.models[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.config.models, n=1)
            cure = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(self.config.models)}."
            raise UsageError(f"{self.loaded.path}: no model is called {name!r}.", cure) from None

    def digest(self, name: str) -> str:
        """Names the model with its present arguments."""
        if name not in self._digests:
            self._digests[name] = digest(self.model_config(name))
        return self._digests[name]

    def total(self, gpu: int) -> int | None:
        """The memory of a GPU in bytes; None if it is not known."""
        reading = self.gpus({gpu}).get(gpu)
        return reading.total_bytes if reading else None

    def gpus(self, wanted: Collection[int]) -> dict[int, GpuReading]:
        """The GPUs by index; read again while one that is wanted is missing: the driver may load later."""
        if not self._gpus.keys() >= set(wanted):
            self._gpus |= {reading.index: reading for reading in self.reader.read()}
        return self._gpus

    def gpu_locks(self, gpus: set[int]) -> list[Path]:
        """The lock files of these GPUs, in PCI order."""
        readings = self.gpus(gpus)
        uuids = [(gpu, readings[gpu].uuid if gpu in readings else f"index-{gpu}") for gpu in gpus]
        return [gpu_lock_path(uuid) for _, uuid in sorted(uuids)]

    def pools(self, gpus: Collection[int]) -> dict[int, Pool]:
        """The KV pools of these GPUs by index, as far as the GPUs are known."""
        readings = self.gpus(gpus)
        return {gpu: Pool(readings[gpu].uuid) for gpu in sorted(set(gpus)) if gpu in readings}

    def ram_lock(self) -> Path:
        """The machine's lock for pinning RAM; simulated machines have their own."""
        simulated = next((gpu.uuid.rpartition("-")[0] for gpu in self._gpus.values() if gpu.simulated), None)
        return gpu_lock_path("ram" if simulated is None else f"ram-{simulated}")

    def readable(self) -> list[Model]:
        """The models whose files can be read, with their records: what is wrong with those of one is its
        trouble alone, and its server, if it runs, counts as a stranger's."""
        models = []
        for model in self.models():
            with contextlib.suppress(OperationError):
                is_kept(model.keeper_file)
                model.read()
                models.append(model)
        return models

    def note(self, happened: Callable[[History], None]) -> None:
        """Keep something for the history; it is written by `flush`, off the path of an operation."""
        self._happened.append(happened)

    def publish(self, event: FleetEvent) -> None:
        """Keep an event for whoever subscribes, here and in other processes."""
        self.note(lambda past: past.record_event(event))

    @functools.cached_property
    def history(self) -> History:
        """The past of this config's models."""
        from vllm_sleep_tui.fleet.store.history import History  # `status` needs no database

        return History(self.state_dir, self.loaded.path)

    @property
    def has_to_flush(self) -> bool:
        """Whether there is something to write."""
        return bool(self._happened) or self.footprints.has_to_flush

    def flush(self) -> None:
        """Write the measurements and the past; blocks for milliseconds."""
        with self._flushing:  # who closes waits for who is writing still
            self.footprints.flush()
            happened, self._happened = self._happened, []
            for tell in happened:
                tell(self.history)
        on_written = self.on_written  # it may be taken away meanwhile
        if happened and on_written is not None:
            on_written()

    def client(self, record: Record) -> VllmClient:
        """The client of the record's running server, one per launch."""
        from vllm_sleep_tui.engine.client import VllmClient  # `status` asks no server, and does without it

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

    def client_of_anybody(self, port: int) -> VllmClient:
        """A client without a credential, as every other program is; the caller closes it."""
        from vllm_sleep_tui.engine.client import VllmClient  # as above

        return VllmClient(port)

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
