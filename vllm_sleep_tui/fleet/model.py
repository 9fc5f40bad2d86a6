"""The handle of one model: its config, its record, what was measured of it, its files and its client.

A handle belongs to one operation or one look. Its `record` is what this handle read or wrote last; the truth
is on disk, and only who holds the model's lock may write it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.states import RUNNING, Event, State, next_state
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.sizing.footprints import Footprint
from vllm_sleep_tui.telemetry.processes import memory
from vllm_sleep_tui.telemetry.simulated import memories
from vllm_sleep_tui.units import GIB

if TYPE_CHECKING:  # the core makes the handles
    from vllm_sleep_tui.engine.client import VllmClient
    from vllm_sleep_tui.fleet.core import Core

WANTED_SECONDS = 5.0
PINNED_NOISE = GIB // 4
"""Shared memory of an engine that never slept: 0.07 GiB on an H100."""


class Model:
    """One model of the config."""

    def __init__(self, core: Core, name: str) -> None:
        self.core = core
        self.name = name
        self._record: Record | None = None

    def __repr__(self) -> str:
        return f"Model({self.name!r})"

    # ── config ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def config(self) -> ModelConfig:
        """What the config says of it; raises UsageError if a reload has removed it."""
        return self.core.model_config(self.name)

    @property
    def vllm_command(self) -> tuple[str, ...]:
        """The vllm that runs it."""
        return self.config.vllm_command or self.core.config.vllm_command

    @property
    def base(self) -> Path:
        """The config's folder, to which its paths are relative."""
        return self.core.loaded.path.parent

    # ── record ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def record(self) -> Record:
        """The record as this handle last read or wrote it."""
        return self._record if self._record is not None else self.read()

    @record.setter
    def record(self, record: Record) -> None:
        self._record = record  # put together anew, not on disk yet

    def read(self) -> Record:
        """The record as it is on disk now; raises OperationError if it cannot be read."""
        self._record = self.core.records.read(self.name)
        return self._record

    def write(self, **changes: Any) -> Record:
        """Write the record with some fields changed; raises OperationError if the disk refuses."""
        return self._put(msgspec.structs.replace(self.record, **changes))

    def enter(self, event: Event, note: str | None = None, **changes: Any) -> Record:
        """Move the record by `event`, see `Record.reset`, with other fields changed, and write it.

        `note` is what the history is to say of it beside the state.

        Raises RefusedError if that event cannot happen in this state, and OperationError as `write` does.
        """
        state, now = next_state(self.record.state, event), time.time()
        fields = {"state": state, "since": now, **changes}
        before, entered = self.record, self._put(msgspec.structs.replace(self.record.reset(event), **fields))
        self.core.note(lambda past: past.record_state(self.name, state, entered.level, at=now))
        intent = entered.intent or before.intent
        self.publish(intent.operation if intent else None, note)
        return entered

    def publish(self, operation: str | None = None, note: str | None = None) -> None:
        """Tell, and keep in the history, that the model is in its state now; of a failed one, why."""
        record, is_fault = self.record, self.record.state is State.FAILED
        self.core.publish(
            FleetEvent(
                time=time.time(),
                kind=Kind.FAULT if is_fault else Kind.STATE,
                model=self.name,
                operation=operation,
                state=record.state,
                level=record.level,
                detail=record.reason if is_fault else note,
                pid=os.getpid(),
            )
        )

    def _put(self, record: Record) -> Record:
        try:
            self.core.records.write(record)
        except OSError as error:
            raise OperationError(
                f"Could not write {self.core.records.path(self.name)}: {error.strerror}.",
                "Make room or give write permission there; the servers run on.",
            ) from error
        self._record = record
        return record

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def keeper_file(self) -> Path:
        """Where its keeper says how its server is."""
        return self.core.records.path(self.name, "keeper")

    @property
    def lock(self) -> Path:
        """Its lock file."""
        return self.core.records.path(self.name, "lock")

    @property
    def wanted_file(self) -> Path:
        """Touched again and again while requests wait for it, see `is_wanted`."""
        return self.core.records.path(self.name, "wanted")

    @property
    def is_wanted(self) -> bool:
        """Whether requests wait for it, in whichever process: it is not put away."""
        try:
            return abs(time.time() - self.wanted_file.stat().st_mtime) < WANTED_SECONDS
        except OSError:
            return False

    def want(self) -> None:
        """Say that requests wait for it, for the next WANTED_SECONDS; a full disk is no reason to fail."""
        with contextlib.suppress(OSError):
            os.close(
                os.open(self.wanted_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            )
            os.utime(self.wanted_file)

    @property
    def log_path(self) -> Path:
        """Where the log of its next launch is to be."""
        return self.core.records.log_path(self.name)

    # ── measurements ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def digest(self) -> str:
        """Names the model with its present arguments."""
        return self.core.digest(self.name)

    @property
    def footprint(self) -> Footprint:
        """What was measured of it: with the arguments it runs with, else with those it would start with.

        The config may have changed since the launch, or was read otherwise by the version that started it.
        """
        record = self.record
        digest = record.digest if record.state in RUNNING else None
        return self.core.footprints.get(digest or self.digest, record.vllm_version)

    @property
    def footprint_as_configured(self) -> Footprint:
        """What was measured of it with the arguments that the config gives it now."""
        return self.core.footprints.get(self.digest, self.record.vllm_version)

    @property
    def moving_seconds(self) -> float:
        """How long a call which moves its weights may take."""
        footprint, limits = self.footprint, self.core.limits
        weights = footprint.weights or max(footprint.awake.values(), default=0)
        return limits.call + limits.call_per_gib * weights / GIB

    def remember(self, change: Callable[[Footprint], Footprint]) -> None:
        """Keep a measurement of the record's launch; it is written after the operation."""
        record = self.record
        self.core.footprints.note(record.digest or self.digest, record.vllm_version, change)

    def pinned_now(self) -> int:
        """Bytes of RAM that its engines have pinned; 0 if they never slept at level 1."""
        simulated = self.core.simulated
        by_pid = memories(simulated) if simulated else {}
        pinned = 0
        for engine in self.record.engines:
            process = by_pid.get(engine.pid) or memory(engine.pid)
            pinned += process.pinned_bytes if process else 0
        return pinned if pinned > PINNED_NOISE else 0

    # ── server ───────────────────────────────────────────────────────────────────────────────────────────

    def client(self) -> VllmClient:
        """The client of its running server, one per launch."""
        return self.core.client(self.record)
