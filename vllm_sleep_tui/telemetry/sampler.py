"""Reads GPUs, processes and RAM in a thread of its own; the event loop only looks at the latest sample."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_sleep_tui.telemetry.attribution import (
    Attribution,
    ModelMemory,
    Stranger,
    attribute,
    describe,
    trees,
)
from vllm_sleep_tui.telemetry.gpus import GpuReader, GpuReading
from vllm_sleep_tui.telemetry.host import HostReading, host_memory
from vllm_sleep_tui.telemetry.processes import Memory, ProcessId, ProcessTable, memory

T = TypeVar("T")

SAMPLE_SECONDS = 1.0
JOIN_LIMIT = 2.0
"""Seconds that `close` waits for the thread; a driver that hangs must not hold up leaving."""
FULL_SCAN_EVERY = 10
"""Samples between two full scans of /proc; the others read only what changed."""
LATE_AFTER = 5.0
"""Seconds beyond the interval after which the latest sample says that it is old."""


class Sample(msgspec.Struct, frozen=True):
    """Everything measured at one moment."""

    time: float = 0.0
    """UTC seconds; 0.0 before the first."""
    gpus: tuple[GpuReading, ...] = ()
    models: Mapping[str, ModelMemory] = msgspec.field(default_factory=dict)
    strangers: Mapping[int, tuple[Stranger, ...]] = msgspec.field(default_factory=dict)
    """By GPU index: who else holds VRAM."""
    host: HostReading = msgspec.field(default_factory=HostReading)
    notes: tuple[str, ...] = ()
    """One line each on what is not known and why."""


class Sampler:
    """Takes a sample every `interval` seconds in a daemon thread; the reader stays the caller's to close."""

    def __init__(
        self,
        reader: GpuReader,
        simulated: Path | None,
        interval: float = SAMPLE_SECONDS,
        *,
        late_after: float = LATE_AFTER,
    ) -> None:
        self._reader = reader
        self._simulated = simulated
        self.interval = interval
        """Seconds between two samples; may be changed at any time."""
        self._late_after = late_after
        self._roots: Mapping[str, int] = {}
        self._latest = Sample()
        self._table: ProcessTable | None = None
        self._samples = 0
        self._described: dict[ProcessId, tuple[str, str]] = {}
        self._sampling = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def set_roots(self, roots: Mapping[str, int]) -> None:
        """Say which pid (the keeper) each model's processes are below, from the next sample on."""
        self._roots = dict(roots)

    def latest(self) -> Sample:
        """The newest sample, at once; it says so in its notes if the thread has been stuck."""
        sample = self._latest
        age = time.time() - sample.time
        if not sample.time or not self._thread.is_alive() or age < self.interval + self._late_after:
            return sample
        late = f"The figures are {age:.0f} s old: the GPU driver or /proc does not answer."
        return msgspec.structs.replace(sample, notes=(*sample.notes, late))

    def refresh(self) -> None:
        """Ask the thread for a sample now; returns at once."""
        self._wake.set()

    def start(self) -> None:
        """Start the thread; the first sample follows at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; waits at most `JOIN_LIMIT` seconds."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_LIMIT)

    def sample_once(self) -> Sample:
        """Take a sample in this thread and return it; never raises for what a reader does."""
        with self._sampling:
            self._latest = self._sample()
            return self._latest

    def _run(self) -> None:
        while not self._closed.is_set():
            self.sample_once()
            self._wake.wait(self.interval)
            self._wake.clear()

    def _sample(self) -> Sample:
        notes: list[str] = []
        readings: tuple[GpuReading, ...] = _guarded("GPUs", self._reader.read, (), notes)
        # After NVML, so that a process which has just begun to hold memory is in the table.
        shares = _guarded("Processes", lambda: self._attribute(readings), self._unknown(), notes)
        host = _guarded("RAM", lambda: host_memory(self._simulated), HostReading(), notes)
        if note := _guarded("GPUs", lambda: self._reader.note, None, []):
            notes.append(note)
        return Sample(time.time(), readings, shares.models, shares.strangers, host, (*notes, *shares.notes))

    def _unknown(self) -> Attribution:
        return Attribution({name: ModelMemory(None, None, None) for name in self._roots}, {})

    def _attribute(self, readings: tuple[GpuReading, ...]) -> Attribution:
        roots = self._roots
        if self._samples % FULL_SCAN_EVERY == 0:
            # Now and then from nothing: a pid may have been reused between two samples, a command renamed.
            self._table = None
            self._described = {}
        self._samples += 1
        self._table = table = ProcessTable.read(self._table)
        return attribute(
            readings, table, roots, memories=self._memories(table, roots), describe=self._describe
        )

    def _memories(self, table: ProcessTable, roots: Mapping[str, int]) -> Mapping[int, Memory]:
        if self._simulated is not None:
            from vllm_sleep_tui.telemetry.simulated import memories

            return memories(self._simulated)
        pids = (pid for tree in trees(table, roots).values() for pid in tree)
        return {pid: held for pid in pids if (held := memory(pid))}

    def _describe(self, pid: int) -> tuple[str, str]:
        process = self._table.id_of(pid) if self._table else None
        if process is None:
            return describe(pid)
        if process not in self._described:
            self._described[process] = describe(pid)
        return self._described[process]


def _guarded(subject: str, read: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    """What `read` answers; a driver or /proc that breaks costs one part of one sample, never the thread."""
    try:
        return read()
    except Exception as error:
        notes.append(f"{subject} could not be read: {error or type(error).__name__}.")
        return otherwise
