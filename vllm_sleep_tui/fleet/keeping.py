"""Our side of the keeper: launch one, ask whether it lives, read what it says."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from vllm_sleep_tui.engine.argv import LAUNCH_VARIABLE
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet import keeper
from vllm_sleep_tui.telemetry.processes import (
    ProcessId,
    environment_has,
    is_alive,
    signal_process,
    start_ticks,
)

LOG_BYTES = 20 * 2**20
KEEPER_SECONDS = 30.0
"""For a keeper to tell that its server runs."""


class Exit(msgspec.Struct, frozen=True):
    """How a server ended; `code` is None if it never began, negative for a signal."""

    code: int | None
    asked: bool
    at: float


class Word(msgspec.Struct, frozen=True):
    """What a keeper says of itself and its server."""

    launch: str | None = None
    keeper: ProcessId | None = None
    server: ProcessId | None = None
    asked: bool = False
    """Whether the server was asked to stop."""
    exit: Exit | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a keeper is to keep."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    """It holds the launch's secret, and the user's tokens."""
    cwd: str
    launch: str
    log: str
    lock: str
    tmp_dir: str
    grace: float = 10.0
    """Seconds between the first SIGTERM and SIGKILL to the group."""
    log_bytes: int = LOG_BYTES


def read_word(path: Path) -> Word:
    """The last word in the keeper's file; an empty one if there is none."""
    try:
        return msgspec.json.decode(path.read_bytes().strip() or b"{}", type=Word)
    except (FileNotFoundError, *NOT_JSON):
        return Word()


def is_kept(path: Path) -> bool:
    """Whether a living keeper holds `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


async def launch(order: Order) -> Word:
    """Start a keeper with its server; raises OperationError if either cannot be started."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        keeper.__file__,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={"PATH": os.defpath, LAUNCH_VARIABLE: order.launch},
    )
    try:
        answer, _ = await asyncio.wait_for(
            process.communicate(json.dumps(asdict(order)).encode()), KEEPER_SECONDS
        )
    except TimeoutError:
        raise OperationError(
            f"The keeper said nothing for {KEEPER_SECONDS:.0f} s.",
            "The machine may be overloaded: look at its load, then start it again.",
        ) from None
    word = msgspec.json.decode(answer or b"{}", type=Word)
    if word.error is None and word.server is not None:
        return word
    if word.launch is None and word.error is not None:
        raise OperationError(
            f"The keeper could not write {order.lock}: {word.error}.",
            "Make room or give write permission there, then start it again.",
        )
    if word.launch is None:
        raise OperationError(
            "Another keeper still holds this model's place.",
            "Wait a moment and try again; `vllm-sleep-tui orphans` names what is left.",
        )
    raise OperationError(
        f"Could not run {order.argv[0]}: {word.error}.", "Check `vllm_command` in the config."
    )


def ask_to_stop(word: Word, *, at_once: bool) -> bool:
    """Ask a keeper to stop its server, or to kill it at once; False if it is gone."""
    if word.keeper is None:
        return False
    return signal_process(word.keeper, signal.SIGINT if at_once else signal.SIGTERM)


def members(launch: str, server: ProcessId | None) -> tuple[ProcessId, ...]:
    """The living processes of a launch, keeper included: by its id, else by its server's session.

    The id alone would miss engines: a process that renames itself wipes its environment in /proc.
    """
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            process = ProcessId(pid=int(entry), start=start_ticks(int(entry)) or 0)
            named = environment_has(process.pid, LAUNCH_VARIABLE, launch)
            if is_alive(process) and (named or (server is not None and is_of_session(process, server))):
                found.append(process)
    return tuple(found)


def is_of_session(process: ProcessId, leader: ProcessId) -> bool:
    """Whether a process of this user belongs to the session that `leader` began, even if it ended since.

    The kernel gives a session's number to nobody else while one of its processes lives; if the number is
    another process's now, the session is over.
    """
    if start_ticks(leader.pid) not in (None, leader.start) or process.start < leader.start:
        return False
    try:
        return os.getsid(process.pid) == leader.pid and os.stat(f"/proc/{process.pid}").st_uid == os.getuid()
    except OSError:
        return False


async def end_members(launch: str, server: ProcessId | None, limit: float = 20.0) -> bool:
    """SIGKILL whatever is left of a launch; True once nothing is, within `limit` seconds."""
    deadline = asyncio.get_running_loop().time() + limit
    while left := await asyncio.to_thread(members, launch, server):
        if asyncio.get_running_loop().time() > deadline:
            return False
        for process in left:
            signal_process(process, signal.SIGKILL)
        await asyncio.sleep(0.05)
    return True
