"""What is known about each model on disk: the truth that outlives every process of ours.

A record is written whole and renamed into place, so that a reader never sees half of one, and only by who
holds the model's lock. It carries the launch's secret, hence mode 0600.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import msgspec

from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.telemetry.processes import ProcessId


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that was begun: written before each call to vLLM, so that a successor can settle it."""

    operation: str
    phase: str
    since: float
    actor: ProcessId
    level: int | None = None
    eta: float | None = None
    """Seconds the whole operation is expected to take."""
    detail: str | None = None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the fixed question while the model was known to be well."""

    logprobs: tuple[float, ...]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One model of one config."""

    config: str
    name: str
    state: State = State.STOPPED
    since: float = 0.0
    level: int | None = None
    launch: str | None = None
    keeper: ProcessId | None = None
    server: ProcessId | None = None
    engines: tuple[ProcessId, ...] = ()
    """The processes that hold the model's memory, known once the server is ready."""
    port: int | None = None
    secret: str | None = None
    gpus: tuple[int, ...] = ()
    log: str | None = None
    digest: str | None = None
    """Of the model and its arguments at launch; measurements are kept under it."""
    vllm_version: str | None = None
    resolved_level: str | None = None
    intent: Intent | None = None
    reason: str | None = None
    cure: str | None = None
    reference: Reference | None = None
    proof: str | None = None
    last_switch: SwitchTimes | None = None
    schema: int = 1

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.state}, launch={self.launch!r})"


class RecordStore:
    """The records of one config file in one state folder."""

    def __init__(self, state_dir: Path, config_path: Path) -> None:
        self.folder = state_dir / "records"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config = str(config_path.resolve())
        self._suffix = hashlib.sha256(self.config.encode()).hexdigest()[:8]
        self._cache: dict[Path, tuple[tuple[int, int], Record]] = {}

    def path(self, name: str, kind: str = "json") -> Path:
        """The file of a model: ``json`` the record, ``lock`` its lock, ``keeper`` its keeper's word."""
        return self.folder / f"{name}-{self._suffix}.{kind}"

    def read(self, name: str) -> Record:
        """The model's record, or a stopped one if there is none; a broken file is set aside."""
        path = self.path(name)
        try:
            status = path.stat()
        except FileNotFoundError:
            return Record(config=self.config, name=name)
        stamp = (status.st_mtime_ns, status.st_ino)
        known = self._cache.get(path)
        if known and known[0] == stamp:
            return known[1]
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
        except FileNotFoundError:
            return Record(config=self.config, name=name)
        except msgspec.DecodeError:
            return self._set_aside(path, name)
        self._cache[path] = (stamp, record)
        return record

    def write(self, record: Record) -> None:
        """Replace the model's record; raises OSError if the disk refuses."""
        write_atomically(self.path(record.name), msgspec.json.encode(record))

    def _set_aside(self, path: Path, name: str) -> Record:
        """Keep a record that cannot be read for the person, out of the way."""
        aside = path.with_suffix(f".broken-{int(time.time())}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was faster
            return Record(config=self.config, name=name)
        return Record(
            config=self.config,
            name=name,
            state=State.FAILED,
            since=time.time(),
            reason="Its record could not be read.",
            cure=f"It was kept as {aside.name}; start the model again.",
        )

    def others(self) -> list[Record]:
        """Records of other configs in this state folder; unreadable ones are left out."""
        found = []
        for path in self.folder.glob("*.json"):
            if path.stem.endswith(f"-{self._suffix}"):
                continue
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Record))
            except (OSError, msgspec.DecodeError):
                continue
        return found


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step, readable by this user alone."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
