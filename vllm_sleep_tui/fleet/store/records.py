"""What is known about each model on disk: the truth that outlives every process of ours.

A record is one page with a checksum, written in place by one call, and only by who holds the model's lock:
replacing a file by renaming costs a disk write on ext4, 5 ms of a switch. A reader that sees half of a write
reads again. It may carry the secret of a launch of the version before, hence mode 0600.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.engine.proof import Reference
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import (
    NotAFileError,
    Unchanged,
    as_text,
    path_of,
    private_dir,
    read_regular,
    write_atomically,
)
from vllm_sleep_tui.fleet.snapshot import LastFailure, SwitchTimes
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.paths import file_name
from vllm_sleep_tui.telemetry.processes import ProcessId

PAGE = 4096
"""A write within one page is not cut in two, even by SIGKILL."""
MAX_RECORD = 2**20
"""Bytes; a record is a page, or few if its names are long."""
READ_ATTEMPTS = 5
READ_PAUSE = 0.001


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


class Hang(msgspec.Struct, frozen=True, kw_only=True):
    """An attached server that answers nobody, as the leader sees it; it holds while that process lives."""

    symptom: str
    since: float
    by: ProcessId


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
    socket: str | None = None
    """Where the server's guard lets the panel in."""
    secret: str | None = None
    """Of a server that the version before started: it has no socket, and takes this by its port."""
    gpus: tuple[int, ...] = ()
    log: str | None = None
    tmp_dir: str | None = None
    """The server's own temporary folder, which its keeper removes unless it is killed."""
    digest: str | None = None
    """Of the model and its arguments at launch; measurements are kept under it."""
    vllm_version: str | None = None
    resolved_level: str | None = None
    sleep_backend: str | None = None
    """Of the launch: own, our sleep mode; stock, vLLM's; None where nothing is said of it (CPU, no sleep)."""
    sleep_backend_why: str | None = None
    """Why it is vLLM's own although ours was to be had."""
    intent: Intent | None = None
    reason: str | None = None
    cure: str | None = None
    reference: Reference | None = None
    proof: str | None = None
    last_switch: SwitchTimes | None = None
    fell: State | None = None
    """While failed: the state from which the server died by itself, if it did; ASLEEP of one that was
    restarted and is not back asleep yet."""
    last_failure: LastFailure | None = None
    """Of the launch before this one, if that died by itself and nobody has seen why."""
    restarts: tuple[float, ...] = ()
    """UTC seconds of the latest restarts by the leader."""
    hang: Hang | None = None
    """Of an attached server; one of ours that hangs is ended."""
    schema: int = 1

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {self.state}, launch={self.launch!r})"

    def is_same_stay(self, other: Record) -> bool:
        """Whether it is in the same launch and has not left its state in between."""
        return (self.launch, self.state, self.since) == (other.launch, other.state, other.since)

    def reset(self, event: Event) -> Record:
        """Without what does not outlive `event`, whoever brings it about; the state itself stays."""
        ended: dict[str, Any] = dict.fromkeys(ENDS_WITH.get(event, ()))
        if event in NO_PROCESSES:
            ended["engines"] = ()
        return msgspec.structs.replace(self, **ended)


_NO_SERVER = ("keeper", "server", "level", "intent", "reason", "cure", "fell")
ENDS_WITH: Mapping[Event, tuple[str, ...]] = {
    Event.START: ("level", "reason", "cure", "proof", "fell"),
    Event.READY: ("intent",),
    Event.SLEPT: ("intent", "reason", "cure", "fell"),
    Event.WOKE: ("level", "intent", "reason", "cure"),
    Event.FAIL: _NO_SERVER,
    Event.EXITED: (*_NO_SERVER, "proof"),
}
"""What is over with each event: the one place that says so."""
NO_PROCESSES = frozenset({Event.FAIL, Event.EXITED})
"""After these no process of the launch is left."""


class RecordStore:
    """The records of one config file in one state folder."""

    def __init__(self, state_dir: Path, config_path: Path) -> None:
        self.folder = state_dir / "records"
        private_dir(self.folder)
        self.config = as_text(config_path.resolve())
        self._suffix = hashlib.sha256(self.config.encode()).hexdigest()[:8]
        self._records = Unchanged(lambda path, _: read_record(path))
        self._paths: dict[tuple[str, str], Path] = {}
        """Made once each: with 64 models half of what a look at the fleet takes."""

    def path(self, name: str, kind: str = "json") -> Path:
        """The file of a model: ``json`` the record, ``lock`` its lock, ``keeper`` its keeper's word."""
        path = self._paths.get((name, kind))
        if path is None:
            path = self._paths[name, kind] = self.folder / f"{file_name(name)}-{self._suffix}.{kind}"
        return path

    def read(self, name: str) -> Record:
        """The model's record, or a stopped one if there is none; what is broken or no file is set aside.

        Raises OperationError if the file cannot be read.
        """
        path = self.path(name)
        for attempt in range(READ_ATTEMPTS):
            try:
                return self._records.get(path)
            except FileNotFoundError:
                return Record(config=self.config, name=name)
            except NotAFileError:
                break
            except (ValueError, *NOT_JSON):
                time.sleep(READ_PAUSE * (attempt > 0))
            except OSError as error:
                raise OperationError(
                    f"The record {path} cannot be read: {error.strerror}.",
                    "Correct that; its server, if it runs, runs on.",
                ) from error
        return self._set_aside(path, name)

    def write(self, record: Record) -> None:
        """Put the model's record on disk; raises OSError if the disk refuses."""
        path = self.path(record.name)
        content = encode(record)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                raise
            write_atomically(path, content)  # there is none, or a link or pipe in its place
            return
        try:
            now = os.fstat(descriptor)
            in_place = stat.S_ISREG(now.st_mode) and now.st_size == len(content) == PAGE
            if in_place:
                os.pwrite(descriptor, content, 0)
        finally:
            os.close(descriptor)
        if not in_place:
            write_atomically(path, content)

    def _set_aside(self, path: Path, name: str) -> Record:
        """Keep a record that cannot be read for the person; what it told is put together anew.

        Its server, if it lives, is taken back through its keeper by whoever holds the locks next.
        """
        aside = path.with_suffix(f".broken-{int(time.time())}")
        record = Record(
            config=self.config,
            name=name,
            state=State.FAILED,
            since=time.time(),
            reason=f"Its record could not be read and was kept as {aside.name}.",
            cure="Start the model again.",
        )
        with contextlib.suppress(OSError):  # another process was faster, or the folder is read-only
            path.rename(aside)
            write_atomically(path, encode(record))
        return record

    def log_path(self, name: str) -> Path:
        """Where the model's log is to be: NAME.log, unless that is a model's of another config which is there
        still; then the name ends like the record's."""
        own = self.folder.parent / "logs" / f"{file_name(name)}.log"
        users = (other for other in self.others() if other.log == as_text(own))
        taken = any(os.path.lexists(path_of(user.config)) for user in users)
        return own.with_name(self.path(name, "log").name) if taken else own

    def others(self) -> list[Record]:
        """Records of other configs in this state folder; unreadable ones are left out."""
        found = []
        for path in self.folder.glob("*.json"):
            if path.stem.endswith(f"-{self._suffix}"):
                continue
            try:
                found.append(read_record(path))
            except (OSError, ValueError, *NOT_JSON):
                continue
        return found


def encode(record: Record) -> bytes:
    """A line of JSON, a line with its checksum, blanks to the end of the page."""
    line = msgspec.json.encode(record)
    return b"%s\n%08x\n" % (line, zlib.crc32(line)) + b" " * (PAGE - len(line) - 10)


def decode(content: bytes) -> Record:
    """The record in `content`; raises ValueError or msgspec.DecodeError if it is not whole."""
    line, checksum = content.split(b"\n", 2)[:2]
    if zlib.crc32(line) != int(checksum, 16):
        raise ValueError("the checksum does not fit")
    return msgspec.json.decode(line, type=Record)


def read_record(path: Path) -> Record:
    """The record in a file; raises OSError, ValueError or one of NOT_JSON if there is none."""
    return decode(read_regular(path, MAX_RECORD))
