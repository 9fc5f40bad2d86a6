"""Processes by pid and start time, read from /proc: who lives, below whom, with what memory and port."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from vllm_sleep_tui.text import one_line

MAX_COMMAND = 200
"""Characters of a command line that are shown."""

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO in Linux's include/linux/proc_ns.h; any other number is a container's namespace."""


@functools.cache
def boot_id() -> str:
    """Which run of the machine this is, by the kernel's random number for it; empty if it does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read(8).decode("ascii", "replace")
    except OSError:
        return ""


class ProcessId(msgspec.Struct, frozen=True):
    """A process that a reused pid cannot be taken for: pid, start in clock ticks since boot, and boot.

    Ticks begin anew with each boot, and the first services get nearly the same pids each time.
    """

    pid: int
    start: int
    boot: str = msgspec.field(default_factory=boot_id)
    """Eight digits of the boot's number; an identity written without one is taken for this boot's."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A process's RAM in bytes without file pages, which the kernel can drop at any time."""

    private_bytes: int
    """RssAnon."""
    pinned_bytes: int
    """RssShmem, where CUDA's pinned host memory shows (vLLM 0.24, measured)."""


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent: int
    start: int


def _stat(pid: int) -> _Stat | None:
    """/proc/PID/stat; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(1024)
    except OSError:
        return None
    # The name before the last bracket is the process's own choice and may hold brackets and spaces.
    fields = text[text.rfind(b")") + 2 :].split(None, 20)
    if len(fields) < 20:
        return None
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none."""
    stat = _stat(pid)
    return stat.start if stat else None


def is_alive(process: ProcessId) -> bool:
    """Whether this very process runs: not ended, not a zombie, not another one under its pid."""
    if process.boot != boot_id():
        return False
    stat = _stat(process.pid)
    return stat is not None and stat.start == process.start and stat.state not in "ZX"


@dataclass(frozen=True, slots=True)
class Effort:
    """What a process has done so far."""

    ticks: int
    """Clock ticks of processor time."""
    wants_to_run: bool
    """It runs, or waits for a processor or a disk; not if it is stopped or waits for somebody to ask."""


def effort(pid: int) -> Effort | None:
    """What the process has done; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()
        return Effort(int(fields[11]) + int(fields[12]), fields[0] in (b"R", b"D"))
    except (OSError, IndexError, ValueError):
        return None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped (SIGSTOP, Ctrl-Z, a debugger): it does nothing until it goes on."""
    stat = _stat(pid)
    return stat is not None and stat.state in "Tt"


def own_pids(pid: int) -> frozenset[int]:
    """The pids of a process in its namespaces, the one it knows itself by among them."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"NSpid:"):
                return frozenset(map(int, line.split()[1:]))
    return frozenset({pid})


def signal_process(process: ProcessId, signum: int) -> bool:
    """Send the signal to this very process; False if it is gone or belongs to another user."""
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


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


@dataclass(frozen=True, slots=True)
class ProcessTable:
    """All processes at one moment, so that one scan of /proc serves every model."""

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
        """Scan /proc; with a recent table, only what appeared and what lost its parent is read again."""
        pids = _pids()
        kept = previous._still_valid(frozenset(pids)) if previous else frozenset[int]()
        parents: dict[int, int] = {}
        starts: dict[int, int] = {}
        for pid in pids:
            if previous and pid in kept:
                parents[pid], starts[pid] = previous.parents[pid], previous.starts[pid]
            elif stat := _stat(pid):
                parents[pid], starts[pid] = stat.parent, stat.start
        return cls(parents, starts, _in_container())

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
        found: list[int] = []
        waiting = [pid]
        seen = {pid}
        while waiting:
            for child in self._children.get(waiting.pop(), ()):
                if child not in seen and child not in stop_at:
                    seen.add(child)
                    found.append(child)
                    waiting.append(child)
        return tuple(found)


def _in_container() -> bool:
    try:
        return os.readlink("/proc/self/ns/pid") != _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def descendants(pid: int) -> tuple[int, ...]:
    """The pids below `pid` now, from one scan of /proc."""
    return ProcessTable.read().descendants(pid)


def memory(pid: int) -> Memory | None:
    """What RAM the process holds; None if it is gone or has none of its own, as kernel threads."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            text = file.read()
    except OSError:
        return None
    private, pinned = _kibibytes(text, b"\nRssAnon:"), _kibibytes(text, b"\nRssShmem:")
    return None if private is None or pinned is None else Memory(private * 1024, pinned * 1024)


def _kibibytes(status: bytes, key: bytes) -> int | None:
    start = status.find(key)
    return None if start < 0 else int(status[start + len(key) : start + len(key) + 32].split(None, 1)[0])


def user_of(pid: int) -> str | None:
    """The name (without one, the number) of the process's user; None if it cannot be seen."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"Uid:"):
                return user_name(int(line.split()[1]))
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
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            text = file.read(65536)
        if not text.strip(b"\0 "):
            # A kernel thread or a zombie has only its short name.
            with open(f"/proc/{pid}/comm", "rb") as file:
                text = b"[" + file.read().strip() + b"]"
    except OSError:
        return None
    return _safe(text.decode("utf-8", "replace"))


def _safe(command: str) -> str:
    text = one_line(command.replace("\0", " "))
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= MAX_COMMAND else text[: MAX_COMMAND - 1] + "…"


def environment_has(pid: int, key: str, value: str) -> bool:
    """Whether the process was started with this variable; False too where it may not be looked at.

    A process that renames itself, as vLLM's engine and workers do, wipes what the kernel shows of its
    environment, unless it was started with SPT_NOENV=1 (setproctitle 1.3, tried).
    """
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{key}={value}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def environment_value(process: ProcessId, key: str) -> str | None:
    """A variable that the process was started with, "" if it was not set; None if it cannot be looked at.

    Not for a process that renames itself, see `environment_has`.
    """
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return None
    if not is_alive(process):  # what was read may be another's
        return None
    prefix = f"{key}=".encode()
    return next((os.fsdecode(word[len(prefix) :]) for word in words if word.startswith(prefix)), "")


@dataclass(frozen=True, slots=True)
class PortHolder:
    """Who listens on a port, as far as it can be seen."""

    process: ProcessId | None
    """None if the process belongs to another user, whose open files cannot be read."""
    user: str
    command: str | None


@dataclass(frozen=True, slots=True)
class _Listeners:
    """The listening sockets of one port: socket inode → user number."""

    users: Mapping[int, int]

    @classmethod
    def of(cls, port: int) -> _Listeners:
        return cls({inode: uid for name in ("tcp", "tcp6") for inode, uid in _listening(name, port)})

    def held_by(self, pid: int) -> bool:
        """Whether one of the process's open files is one of these sockets."""
        wanted = {f"socket:[{inode}]" for inode in self.users}
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            return False
        for name in names:
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}") in wanted:
                    return True
        return False


def _listening(table: str, port: int) -> Iterator[tuple[int, int]]:
    """(inode, user number) of each socket that takes loopback connections to the port."""
    try:
        with open(f"/proc/net/{table}", "rb") as file:
            text = file.read().decode("ascii")
    except OSError:
        return
    ending = f":{port:04X}"
    for line in text.splitlines()[1:]:
        fields = line.split()
        # State 0A is LISTEN (Linux, include/net/tcp_states.h).
        if fields[3] == "0A" and fields[1].endswith(ending) and _takes_loopback(fields[1].split(":")[0]):
            yield int(fields[9]), int(fields[7])


def _takes_loopback(address: str) -> bool:
    """Whether this hexadecimal local address, in the kernel's byte order, is loopback or every address."""
    octets = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    if not any(octets):
        return True
    if len(octets) == 4 or octets[:12] == b"\0" * 10 + b"\xff\xff":
        return octets[-4] == 127 or not any(octets[-4:])
    return octets == b"\0" * 15 + b"\1"


def listens(port: int, pids: Iterable[int]) -> bool:
    """Whether one of these processes listens on the port on loopback or on every address."""
    listeners = _Listeners.of(port)
    return bool(listeners.users) and any(listeners.held_by(pid) for pid in pids)


def has_listener(port: int) -> bool:
    """Whether anybody listens on the port on loopback or on every address."""
    return bool(_Listeners.of(port).users)


def listener(port: int) -> ProcessId | None:
    """The process that listens on the port; None if nobody does or it belongs to another user."""
    return _first_holder(_Listeners.of(port))


def _first_holder(listeners: _Listeners) -> ProcessId | None:
    if not listeners.users:
        return None
    table = ProcessTable.read()
    # A child that inherited the socket holds it too; the parent, which opened it, started earlier.
    for pid in sorted(table.starts, key=lambda pid: (table.starts[pid], pid)):
        if listeners.held_by(pid):
            return table.id_of(pid)
    return None


def holder_of_port(port: int) -> PortHolder | None:
    """Who listens on the port, in words, even where only the user can be seen; None if nobody does."""
    listeners = _Listeners.of(port)
    if not listeners.users:
        return None
    process = _first_holder(listeners)
    if process is None:
        return PortHolder(None, user_name(next(iter(listeners.users.values()))), None)
    return PortHolder(process, user_of(process.pid) or "unknown", command_of(process.pid))
