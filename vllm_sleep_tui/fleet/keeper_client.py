"""Our side of the keeper: launch one, ask whether it lives, read what it says."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from vllm_sleep_tui.engine.argv import LAUNCH_VARIABLE, LAUNCH_VARIABLES
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import NotAFileError, Unchanged, open_regular, read_regular
from vllm_sleep_tui.fleet import keeper
from vllm_sleep_tui.telemetry.processes import (
    ProcessId,
    ProcessTable,
    environment_has,
    is_alive,
    signal_process,
)

LOG_BYTES = 20 * 2**20
MAX_WORD = 64 * 1024
"""Bytes; a keeper writes a page."""
KEEPER_SECONDS = 30.0
"""For a keeper to tell that its server runs."""


class Exit(msgspec.Struct, frozen=True):
    """How a server ended; `code` is None if it never began, negative for a signal."""

    code: int | None
    asked: bool
    at: float


class KeeperStatus(msgspec.Struct, frozen=True):
    """What a keeper says of itself and its server."""

    launch: str | None = None
    keeper: ProcessId | None = None
    server: ProcessId | None = None
    engines: tuple[ProcessId, ...] = ()
    """Processes below it that hide their launch, as seen while it lived."""
    asked: bool = False
    """Whether the server was asked to stop."""
    exit: Exit | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperSpec:
    """What a keeper is to keep."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    """It holds the user's tokens."""
    cwd: str
    launch: str
    log: str
    lock: str
    tmp_dir: str
    mark: tuple[str, ...] = ()
    """Words that the command line of the API server itself holds in a row: its port. Below wrappers it is
    found by them."""
    grace: float = 10.0
    """Seconds between the first SIGTERM and SIGKILL to the group."""
    log_bytes: int = LOG_BYTES


def read_status(path: Path) -> KeeperStatus:
    """The last status in the keeper's file; an empty one if there is none, or none that could be a keeper's.

    Raises OperationError if the file cannot be read.
    """
    try:
        return _STATUS.get(path)
    except (FileNotFoundError, NotAFileError, *NOT_JSON):
        return KeeperStatus()
    except OSError as error:
        raise unreadable(path, error) from error


def _read_word(path: Path, _: object) -> KeeperStatus:
    return msgspec.json.decode(read_regular(path, MAX_WORD).strip() or b"{}", type=KeeperStatus)


_STATUS = Unchanged(_read_word)


def is_kept(path: Path) -> bool:
    """Whether a living keeper holds `path`; raises OperationError if that cannot be looked at."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def unreadable(path: Path, error: OSError) -> OperationError:
    """What to tell of a keeper's file that is another thing, or closed to us."""
    cure = "Correct that; its server, if it runs, runs on."
    if isinstance(error, NotAFileError):
        cure = f"Remove {path}, then start the model again."
    return OperationError(f"The keeper's file {path} cannot be read: {error.strerror}.", cure)


async def launch(spec: KeeperSpec, holds: Sequence[int] = ()) -> KeeperStatus:
    """Start a keeper with its server; raises OperationError if either cannot be started.

    `holds` are descriptors that the keeper keeps for life, and its server does not get.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        keeper.__file__,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=holds,
        env={"PATH": os.defpath, LAUNCH_VARIABLE: spec.launch},
    )
    try:
        answer, _ = await asyncio.wait_for(
            process.communicate(json.dumps(asdict(spec)).encode()), KEEPER_SECONDS
        )
    except TimeoutError:
        raise OperationError(
            f"The keeper said nothing for {KEEPER_SECONDS:.0f} s.",
            "The machine may be overloaded: look at its load, then start it again.",
        ) from None
    status = msgspec.json.decode(answer or b"{}", type=KeeperStatus)
    if status.error is None and status.server is not None:
        return status
    if status.launch is None and status.error is not None:
        raise OperationError(
            f"The keeper could not write {spec.lock}: {status.error}.",
            "Make room or give write permission there, then start it again.",
        )
    if status.launch is None:
        raise OperationError(
            "Another keeper still holds this model's place.",
            "Wait a moment and try again; `vllm-sleep-tui orphans` names what is left.",
        )
    raise OperationError(
        f"Could not run {spec.argv[0]}: {status.error}.", "Check `vllm_command` in the config."
    )


def ask_to_stop(status: KeeperStatus, *, at_once: bool) -> bool:
    """Ask a keeper to stop its server, or to kill it at once; False if it is gone."""
    if status.keeper is None:
        return False
    return signal_process(status.keeper, signal.SIGINT if at_once else signal.SIGTERM)


def members(launch: str, *recorded: ProcessId | None) -> tuple[ProcessId, ...]:
    """The living processes of a launch, keeper included.

    Each is proven: it carries the launch's id in its environment, or it is one of those that were `recorded`
    while they lived (a process that renames itself, as an engine does, hides its environment), or it is below
    one of these. A number alone, be it of a process, a group or a session, is somebody else's by now.
    """
    table = ProcessTable.read()
    proven = {process for process in recorded if process is not None and is_alive(process)}
    for pid in table.parents:
        named = any(environment_has(pid, key, launch) for key in LAUNCH_VARIABLES)
        if named and (process := table.id_of(pid)) is not None:
            proven.add(process)
    below = {pid for process in proven for pid in table.descendants(process.pid)}
    found = proven | {process for pid in below if (process := table.id_of(pid)) is not None}
    return tuple(process for process in found if is_alive(process))


async def end_members(launch: str, *recorded: ProcessId | None, limit: float = 20.0) -> bool:
    """SIGKILL whatever is left of a launch, see `members`; True once nothing is, within `limit` seconds."""
    deadline = asyncio.get_running_loop().time() + limit
    while left := await asyncio.to_thread(members, launch, *recorded):
        if asyncio.get_running_loop().time() > deadline:
            return False
        for process in left:
            signal_process(process, signal.SIGKILL)
        await asyncio.sleep(0.05)
    return True
