"""Processes by pid and start time: who lives, below whom, with what memory and port.

From psutil, and what that cannot tell from `kernel`, which says why.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import select
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import psutil

from vllm_sleep_tui.telemetry import kernel
from vllm_sleep_tui.telemetry.kernel import Socket, boot_id
from vllm_sleep_tui.text import one_line

MAX_COMMAND = 200
"""Characters of a command line that are shown."""
_READ_AT_MOST = 65536
"""Characters of a command line in which secrets are looked for, before it is cut."""


class ProcessId(msgspec.Struct, frozen=True):
    """A process that a reused pid cannot be taken for: pid, start in clock ticks since boot, and boot.

    Ticks begin anew with each boot, and the first services get nearly the same pids each time.
    """

    pid: int
    start: int
    boot: str = msgspec.field(default_factory=boot_id)
    """Eight digits of the boot's number; an identity written without one is taken for this boot's."""


class Memory(msgspec.Struct, frozen=True):
    """A process's RAM in bytes without file pages, which the kernel can drop at any time."""

    private_bytes: int
    """Its own pages."""
    pinned_bytes: int
    """RssShmem, where CUDA's pinned host memory shows (vLLM 0.24, measured)."""


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none."""
    stat = kernel.stat(pid)
    return stat.start if stat else None


def is_alive(process: ProcessId) -> bool:
    """Whether this very process runs: not ended, not a zombie, not another one under its pid."""
    return _ends.has_not_come(process) or _is_alive(process)


def _is_alive(process: ProcessId) -> bool:
    if process.boot != boot_id():
        return False
    stat = kernel.stat(process.pid)
    return stat is not None and stat.start == process.start and stat.state not in "ZX"


class _Ends:
    """The ends of processes that are asked after again and again: to read /proc takes ten times as long.

    From the second time on a process is asked after by a pidfd, which means it alone and is readable once
    it has ended. Those that nobody has asked after for the longest give way.
    """

    MOST = 256

    def __init__(self) -> None:
        self._handles: dict[ProcessId, int | None] = {}
        self._lock = threading.Lock()  # a descriptor must not be another file's before it was polled

    def has_not_come(self, process: ProcessId) -> bool:
        """Whether the process is known to run; False means that it is to be looked at."""
        with self._lock:
            is_known, handle = process in self._handles, self._handles.pop(process, None)
            if is_known and handle is None:
                handle = _handle_of(process)
            if handle is not None and _can_be_read(handle):
                os.close(handle)
                return False
            self._handles[process] = handle
            if len(self._handles) > self.MOST:
                oldest = self._handles.pop(next(iter(self._handles)))
                if oldest is not None:
                    os.close(oldest)
            return handle is not None


def _handle_of(process: ProcessId) -> int | None:
    """A pidfd of this very process; None if it has ended, or where there are none (see `signal_process`)."""
    try:
        handle = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        return None
    if not _is_alive(process):  # a look after the handle was made cannot be about another one
        os.close(handle)
        return None
    return handle


def _can_be_read(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


_ends = _Ends()


class Effort(msgspec.Struct, frozen=True):
    """What a process has done so far."""

    seconds: float
    """Of processor time."""
    wants_to_run: bool
    """It runs, or waits for a processor or a disk; not if it is stopped or waits for somebody to ask."""


def effort(pid: int) -> Effort | None:
    """What the process has done; None if there is none."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            used, status = process.cpu_times(), process.status()
    except (psutil.Error, OSError):
        return None
    return Effort(used.user + used.system, status in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP))


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped (SIGSTOP, Ctrl-Z, a debugger): it does nothing until it goes on."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except (psutil.Error, OSError):
        return False


def signal_process(process: ProcessId, signum: int) -> bool:
    """Send the signal to this very process; False if it is gone or belongs to another user.

    psutil's `send_signal` looks first and signals then by pid, which may be another process's by that time.
    """
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except (AttributeError, OSError):
        # No pidfd: a kernel before 5.3, a Python built without it, or a sandbox that forbids it.
        return _signal_by_pid(process, signum)
    try:
        # From here on the handle means one process for good, so a check made now cannot go stale.
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(handle, signum)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(handle)
    return True


def _signal_by_pid(process: ProcessId, signum: int) -> bool:
    if not is_alive(process):
        return False
    try:
        os.kill(process.pid, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class ProcessTable:
    """All processes at one moment, so that one scan serves every model."""

    parents: Mapping[int, int]
    """Parent of each pid."""
    starts: Mapping[int, int]
    """Start of each pid in clock ticks since boot."""
    in_container: bool = False
    """The pids are those of a container, where NVML may speak of pids of the host."""
    _children: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for pid, parent in self.parents.items():
            self._children.setdefault(parent, []).append(pid)

    @classmethod
    def read(cls, previous: ProcessTable | None = None) -> ProcessTable:
        """Scan them; with a recent table, only what appeared and what lost its parent is read again."""
        pids = psutil.pids()
        kept = previous._still_valid(frozenset(pids)) if previous else frozenset[int]()
        parents: dict[int, int] = {}
        starts: dict[int, int] = {}
        for pid in pids:
            if previous and pid in kept:
                parents[pid], starts[pid] = previous.parents[pid], previous.starts[pid]
            elif stat := kernel.stat(pid):
                parents[pid], starts[pid] = stat.parent, stat.start
        return cls(parents, starts, kernel.in_container())

    def _still_valid(self, pids: frozenset[int]) -> frozenset[int]:
        """The known pids whose parent lives: only the death of a parent gives a process another one."""
        return frozenset(
            pid for pid in pids & self.parents.keys() if self.parents[pid] in pids or self.parents[pid] == 0
        )

    def __contains__(self, pid: int) -> bool:
        return pid in self.parents

    def id_of(self, pid: int) -> ProcessId | None:
        """The pid with its start; None if it was not there."""
        start = self.starts.get(pid)
        return None if start is None else ProcessId(pid, start)

    def descendants(self, pid: int, stop_at: frozenset[int] = frozenset()) -> tuple[int, ...]:
        """The pids below `pid`, parents first, leaving out those of `stop_at` and what is below them."""
        below: list[int] = []
        waiting = [pid]
        seen = {pid}
        while waiting:
            for child in self._children.get(waiting.pop(), ()):
                if child not in seen and child not in stop_at:
                    seen.add(child)
                    below.append(child)
                    waiting.append(child)
        return tuple(below)


def memory(pid: int) -> Memory | None:
    """What RAM the process holds; None if it is gone or has none of its own, as kernel threads."""
    pinned = kernel.shared_memory(pid)
    if pinned is None:
        return None
    try:
        resident = psutil.Process(pid).memory_info()
    except (psutil.Error, OSError):
        return None
    # `shared` is the pages of files and pinned memory together.
    return Memory(max(0, resident.rss - resident.shared), pinned)


def user_of(pid: int) -> str | None:
    """The name (without one, the number) of the process's user; None if it cannot be seen."""
    try:
        return psutil.Process(pid).username()
    except (psutil.Error, OSError):
        return None


def user_name(uid: int) -> str:
    """The user's name, without one the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


_SECRET = r"(?:api[-_]?key|access[-_]?key|token|secret|passw(?:or)?d|credentials?)"
_MASKS = (
    # vLLM's --api-key takes several values, so all words up to the next flag are masked.
    (re.compile(rf"(--?[\w-]*{_SECRET})((?:[ ]+(?!-)[^ ]+)+|=[^ ]*)", re.IGNORECASE), r"\1 ***"),
    (re.compile(rf"(\b\w*{_SECRET}[\"']?[=:]\s*)[^ ]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\bbearer[ ]+)[^ ]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(://)[^/ @]+@"), r"\1***@"),
    (re.compile(r"\b(?:hf_|sk-)[\w-]{8,}"), "***"),
)


def command_of(pid: int) -> str | None:
    """The command line, safe to show: no escapes, secrets masked, cut; None if it cannot be seen."""
    command = " ".join(command_words(pid))
    if not command.strip():
        # A kernel thread or a zombie has only its short name.
        try:
            command = f"[{psutil.Process(pid).name()}]"
        except (psutil.Error, OSError):
            return None
    return _safe(os.fsencode(command[:_READ_AT_MOST]).decode("utf-8", "replace"))


def command_words(pid: int) -> list[str]:
    """The command line as it was given, secrets included; empty if there is none or it cannot be seen."""
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.Error, OSError):
        return []


def _safe(command: str) -> str:
    text = one_line(command)
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= MAX_COMMAND else text[: MAX_COMMAND - 1] + "…"


def environment_has(pid: int, key: str, value: str) -> bool:
    """Whether the process was started with this variable; False too where it may not be looked at.

    Not for a process that renames itself, see `kernel.environment`.
    """
    return f"{key}={value}".encode() in (kernel.environment(pid) or ())


def environment_value(process: ProcessId, key: str) -> str | None:
    """A variable that the process was started with, "" if it was not set; None if it cannot be looked at.

    Not for a process that renames itself, see `kernel.environment`.
    """
    words = kernel.environment(process.pid)
    if words is None or not is_alive(process):  # what was read may be another's
        return None
    prefix = f"{key}=".encode()
    return next((os.fsdecode(word[len(prefix) :]) for word in words if word.startswith(prefix)), "")


class PortHolder(msgspec.Struct, frozen=True):
    """Who listens on a port, as far as it can be seen."""

    process: ProcessId | None
    """None if the process belongs to another user, whose open files cannot be read."""
    user: str
    command: str | None


def _listeners(port: int) -> list[Socket]:
    """The sockets that take loopback connections to the port."""
    return [
        each
        for each in kernel.sockets(port)
        if each.state == kernel.LISTENING and _takes_loopback(each.local[0])
    ]


def _takes_loopback(address: str) -> bool:
    local = ipaddress.ip_address(address)
    return local.is_loopback or local.is_unspecified


def _has_one_of(pid: int, listeners: Iterable[Socket]) -> bool:
    """Whether one of the process's open files is one of these sockets."""
    names = {f"socket:[{each.inode}]" for each in listeners}
    return any(name in names for name in kernel.open_files(pid))


def listens(port: int, pids: Iterable[int]) -> bool:
    """Whether one of these processes listens on the port on loopback or on every address."""
    listeners = _listeners(port)
    return bool(listeners) and any(_has_one_of(pid, listeners) for pid in pids)


def has_listener(port: int) -> bool:
    """Whether anybody listens on the port on loopback or on every address."""
    return bool(_listeners(port))


def holder_of_port(port: int) -> PortHolder | None:
    """Who listens on the port, in words, even where only the user can be seen; None if nobody does."""
    listeners = _listeners(port)
    if not listeners:
        return None
    table = ProcessTable.read()
    # A child that inherited the socket holds it too; the parent, which opened it, started earlier.
    for pid in sorted(table.starts, key=lambda pid: (table.starts[pid], pid)):
        if _has_one_of(pid, listeners):
            return PortHolder(table.id_of(pid), user_of(pid) or "unknown", command_of(pid))
    return PortHolder(None, user_name(listeners[0].user), None)
