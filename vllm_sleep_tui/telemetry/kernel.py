"""What psutil cannot tell of processes, read from Linux's /proc: the one place that does so.

- The start in clock ticks since boot, with parent and state in the same read: records and keepers hold ticks.
  psutil's `create_time` is by the wall clock, so it moves when that is set. Of two reads the second may be of
  another process with the same pid, and a stranger would then be taken for a server of ours.
- All parents in one pass: psutil's `ppid` reads five files a process (0.11 ms against 0.02, measured on 125
  processes), which a `status` would be slower by.
- RssShmem, where CUDA's pinned memory shows; psutil gives it together with the shared pages of files.
- Pids in their namespaces; one variable of the environment as it was given, byte for byte.
- The users of sockets whose processes cannot be looked at, and connections' other ends.
- Open files that were removed, and who holds a lock.

Every function takes a process that is gone or another user's for one that tells nothing, and does not raise.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import sys
from collections.abc import Iterator

import msgspec

OWN_CGROUP = "/proc/self/cgroup"
"""Which control groups this process is in."""
LISTENING = "0A"
TIME_WAIT = "06"
"""States in /proc/net/tcp (Linux, include/net/tcp_states.h)."""
Address = tuple[str, int]

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO in Linux's include/linux/proc_ns.h; any other number is a container's namespace."""


def _read(path: str, limit: int = -1) -> bytes | None:
    """A file's content, or its first `limit` bytes; None if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(limit)
    except OSError:
        return None


@functools.cache
def boot_id() -> str:
    """Which run of the machine this is, by the kernel's random number for it; empty if it does not tell."""
    return (_read("/proc/sys/kernel/random/boot_id", 8) or b"").decode("ascii", "replace")


class Stat(msgspec.Struct, frozen=True):
    """A process at one moment."""

    state: str
    """One letter, as ps shows it."""
    parent: int
    start: int
    """Clock ticks since boot."""


def stat(pid: int) -> Stat | None:
    """State, parent and start from one read; None if there is no such process."""
    text = _read(f"/proc/{pid}/stat", 1024)
    if text is None:
        return None
    # The name before the last bracket is the process's own choice and may hold brackets and spaces.
    fields = text[text.rfind(b")") + 2 :].split(None, 20)
    if len(fields) < 20:
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


def own_pids(pid: int) -> frozenset[int]:
    """The pids of a process in its namespaces, the one it knows itself by among them."""
    numbers = _of_status(pid, b"NSpid:")
    return frozenset(map(int, numbers)) if numbers else frozenset({pid})


def shared_memory(pid: int) -> int | None:
    """Bytes of RssShmem; None if the process is gone or has no memory of its own, as kernel threads."""
    words = _of_status(pid, b"RssShmem:")
    return int(words[0]) * 1024 if words else None


def _of_status(pid: int, key: bytes) -> list[bytes]:
    """The words of a line of /proc/PID/status; empty if there is none."""
    text = _read(f"/proc/{pid}/status") or b""
    start = text.find(b"\n" + key)
    return [] if start < 0 else text[start + 1 + len(key) :].split(b"\n", 1)[0].split()


def in_container() -> bool:
    """Whether the pids seen here are those of a container, not of the machine."""
    try:
        return os.readlink("/proc/self/ns/pid") != _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def environment(pid: int) -> tuple[bytes, ...] | None:
    """The words (NAME=value) that a process was started with; None if it may not be looked at.

    A process that renames itself, as vLLM's engine and workers do, wipes what the kernel shows of its
    environment, unless it was started with SPT_NOENV=1 (setproctitle 1.3, tried).
    """
    text = _read(f"/proc/{pid}/environ")
    return None if text is None else tuple(text.split(b"\0"))


def open_files(pid: int) -> Iterator[str]:
    """The kernel's names of a process's open files; a removed one's ends in " (deleted)"."""
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(f"{folder}/{name}")


class Socket(msgspec.Struct, frozen=True):
    """One TCP socket of this machine, whoever has it."""

    local: Address
    remote: Address
    state: str
    """As LISTENING and TIME_WAIT."""
    user: int
    inode: int
    """0 while no program has taken it up."""


def sockets(port: int) -> Iterator[Socket]:
    """The sockets bound to the port, IPv4's before IPv6's; none if the kernel does not show them."""
    ending = f":{port:04X}"
    for table in ("tcp", "tcp6"):
        for line in (_read(f"/proc/net/{table}") or b"").decode("ascii").splitlines()[1:]:
            fields = line.split(None, 10)
            if fields[1].endswith(ending):
                ends = _parsed(fields[1]), _parsed(fields[2])
                yield Socket(*ends, state=fields[3], user=int(fields[7]), inode=int(fields[9]))


def _parsed(text: str) -> Address:
    """An address of the table: hexadecimal words in the machine's own byte order, then the port."""
    words, _, port = text.partition(":")
    packed = b"".join(
        int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8)
    )
    return plain_address(ipaddress.ip_address(packed)), int(port, 16)


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """IPv4 as such, even where an IPv6 socket carries it."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


class FileLock(msgspec.Struct, frozen=True):
    """A lock that a process holds on a file."""

    pid: int
    """In this process's namespace; below 1 if it is of another."""
    exclusive: bool
    device: str
    """MAJOR:MINOR in hexadecimal; some file systems (overlay, btrfs) show another than stat does."""
    inode: int


def file_locks() -> tuple[FileLock, ...]:
    """Every lock that is held; none if the kernel does not show them."""
    held = []
    for line in (_read("/proc/locks") or b"").decode("ascii", "replace").splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[1] == "->":  # a process that waits for the lock above
            continue
        device, _, inode = fields[5].rpartition(":")
        if inode.isdigit():
            held.append(FileLock(int(fields[4]), fields[3] == "WRITE", device, int(inode)))
    return tuple(held)
