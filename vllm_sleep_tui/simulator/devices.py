"""The simulated hardware: a folder that says which GPUs there are and what each process holds.

``gpus.json`` names the GPUs and the RAM; each process that holds memory writes ``<pid>.json``. Claims are
made under a lock of the folder, so that two processes never both get the last GiB. A file counts only while
its process lives.

Memory that processes hand to each other is a file as well, ``chunk-…``, whose open description carries a
lock: the kernel drops that with the last descriptor, as a driver frees memory that nobody maps any longer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "VLLM_SLEEP_TUI_SIMULATED_GPUS"
"""The environment variable that names the folder; without it there are no simulated GPUs."""
GIB = 1 << 30
NOBODY = 0
"""In place of the pid that a chunk is counted for."""
_FILE_LOCK = struct.Struct("hhqqi0q")
"""`struct flock` of 64 bit Linux: type, whence, start, length, pid."""
LOCK_SECONDS = 10.0
"""How long another process's claim is waited for; it takes a millisecond, unless the process was stopped."""


class OutOfMemory(Exception):  # noqa: N818 - named as the GPU's own error
    """A claim that does not fit; `free_bytes` would have."""

    def __init__(self, device: str, *, asked_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{device} is out of memory: {asked_bytes / GIB:.2f} GiB asked, {free_bytes / GIB:.2f} GiB free."
        )
        self.device = device
        self.free_bytes = free_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedGpu:
    """One GPU of the folder."""

    index: int
    uuid: str
    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What one living process holds; `vram` is bytes by GPU index, `utilization` per cent."""

    pid: int
    start_ticks: int
    title: str
    vram: Mapping[int, int]
    pinned_bytes: int
    private_bytes: int
    utilization: float


def folder_from_environment(environment: Mapping[str, str]) -> Path | None:
    """The folder that `FOLDER_VARIABLE` names, or None."""
    name = environment.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def create(folder: Path, gpus: Sequence[tuple[str, int]], *, ram_total_bytes: int) -> None:
    """Make the folder for GPUs given as (name, bytes); does nothing to one that already describes them."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    prefix = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    described = [
        {"index": index, "uuid": f"SIM-{prefix}-{index}", "name": name, "total_bytes": total}
        for index, (name, total) in enumerate(gpus)
    ]
    content = {"gpus": described, "ram_total_bytes": ram_total_bytes}
    with _locked(folder):
        if _read(folder / "gpus.json") != content:
            _write(folder / "gpus.json", content)


def gpus(folder: Path) -> tuple[SimulatedGpu, ...]:
    """The GPUs of the folder; none if it does not exist."""
    described = _read(folder / "gpus.json") or {}
    return tuple(SimulatedGpu(**gpu) for gpu in described.get("gpus", ()))


def ram_total(folder: Path) -> int:
    """The simulated machine's RAM in bytes; 0 if the folder does not exist."""
    described = _read(folder / "gpus.json") or {}
    return int(described.get("ram_total_bytes", 0))


def allocations(folder: Path) -> tuple[Allocation, ...]:
    """What living processes hold; files of the dead are removed."""
    held, known, read = [], _read_before.get(folder, {}), {}
    for path, mark in _claims(folder):
        before = known.get(path)
        claim = before[1] if before is not None and before[0] == mark else _allocation(path)
        if claim is None:
            continue
        if start_ticks(claim.pid) != claim.start_ticks:
            Path(path).unlink(missing_ok=True)
            continue
        if time.time_ns() - mark[1] > SAME_TICK:
            read[path] = (mark, claim)  # else another claim could bear the same time
        held.append(claim)
    _read_before[folder] = read
    return tuple(sorted(held, key=lambda allocation: allocation.pid))


SAME_TICK = 2 * 10**9
"""Nanoseconds within which a file system may give two files the same time."""
_Mark = tuple[int, int, int]
_read_before: dict[Path, dict[str, tuple[_Mark, Allocation]]] = {}
"""Of each folder: what its files held, while they are the same. A panel asks every second."""


def _claims(folder: Path) -> Iterator[tuple[str, _Mark]]:
    """The file of each process that holds memory, with what changes when another takes its place."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and entry.name[:1].isdigit():
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield entry.path, (found.st_ino, found.st_mtime_ns, found.st_size)


def _allocation(path: str) -> Allocation | None:
    content = _read(Path(path))
    if content is None:
        return None
    vram = {int(index): int(amount) for index, amount in content.pop("vram").items()}
    return Allocation(vram=vram, **content)


def claim(
    folder: Path,
    *,
    vram: Mapping[int, int],
    pinned_bytes: int,
    private_bytes: int,
    title: str,
    utilization: float = 0.0,
) -> None:
    """Set what this process holds; raises OutOfMemory, with nothing changed, if a GPU or the RAM is full."""
    with _locked(folder):
        others = [held for held in allocations(folder) if held.pid != os.getpid()]
        shared = chunks(folder)
        for gpu in gpus(folder):
            free = gpu.total_bytes - sum(held.vram.get(gpu.index, 0) for held in others)
            free -= sum(chunk.bytes for chunk in shared if chunk.gpu == gpu.index)
            if vram.get(gpu.index, 0) > free:
                raise OutOfMemory(f"GPU {gpu.index}", asked_bytes=vram[gpu.index], free_bytes=free)
        ram_free = ram_total(folder) - sum(held.pinned_bytes + held.private_bytes for held in others)
        if pinned_bytes and pinned_bytes + private_bytes > ram_free:
            raise OutOfMemory("RAM", asked_bytes=pinned_bytes + private_bytes, free_bytes=ram_free)
        content = {
            "pid": os.getpid(),
            "start_ticks": start_ticks(os.getpid()),
            "title": title,
            "vram": {str(index): amount for index, amount in vram.items()},
            "pinned_bytes": pinned_bytes,
            "private_bytes": private_bytes,
            "utilization": utilization,
        }
        _write(folder / f"{os.getpid()}.json", content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Memory of a GPU that is held by descriptors; `pid` is whom the driver names for it, or NOBODY."""

    path: Path
    gpu: int
    bytes: int
    pid: int


def create_chunk(folder: Path, gpu: int, size: int) -> tuple[int, Chunk]:
    """New memory of a GPU, counted for this process, and its first descriptor; raises OutOfMemory."""
    with _locked(folder):
        total = next((each.total_bytes for each in gpus(folder) if each.index == gpu), 0)
        free = total - sum(held.vram.get(gpu, 0) for held in allocations(folder))
        free -= sum(chunk.bytes for chunk in chunks(folder) if chunk.gpu == gpu)
        if size > free:
            raise OutOfMemory(f"GPU {gpu}", asked_bytes=size, free_bytes=free)
        unnamed = folder / f".chunk-{os.getpid()}"
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FILE_LOCK.pack(fcntl.F_RDLCK, 0, 0, 0, 0))
        path = folder / f"chunk-{gpu}-{size}-{os.getpid()}-{os.fstat(descriptor).st_ino}"
        unnamed.rename(path)
    return descriptor, Chunk(path=path, gpu=gpu, bytes=size, pid=os.getpid())


def disown_chunks(folder: Path, given: Sequence[Chunk]) -> None:
    """Name nobody for them any longer: their creator unmaps them and gives their descriptors away."""
    with _locked(folder):
        for chunk in given:
            serial = chunk.path.name.rpartition("-")[2]
            chunk.path.rename(folder / f"chunk-{chunk.gpu}-{chunk.bytes}-{NOBODY}-{serial}")


def chunks(folder: Path) -> tuple[Chunk, ...]:
    """The chunks that somebody holds a descriptor of; the files of the others are removed."""
    held = []
    for path in folder.glob("chunk-*"):
        chunk = _chunk(path)
        with contextlib.suppress(FileNotFoundError):
            if _is_held(path):
                held.append(chunk)
            else:
                path.unlink()
    return tuple(held)


def chunk_of(folder: Path, descriptor: int) -> Chunk | None:
    """What a descriptor from somebody else stands for; None if it is no memory of these GPUs."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return None
    path = next(folder.glob(f"chunk-*-{found.st_ino}"), None)
    return _chunk(path) if path is not None and path.stat().st_dev == found.st_dev else None


def _chunk(path: Path) -> Chunk:
    _, gpu, size, pid, _ = path.name.split("-")
    return Chunk(path=path, gpu=int(gpu), bytes=int(size), pid=int(pid))


def _is_held(path: Path) -> bool:
    """Whether a description of the file is locked; to ask takes no lock, so that askers do not meet."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FILE_LOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    finally:
        os.close(descriptor)
    return bool(_FILE_LOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it does not live (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rsplit(b")", 1)[1].split(None, 20)
    except (OSError, IndexError):
        return None
    # The name may hold spaces, so fields are counted from its end: state is field 3, start time field 22.
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, time.monotonic() + LOCK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, deadline: float) -> None:
    """Lock the file; raises TimeoutError with the pid that holds it, which may be stopped."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.005)
                continue
        inode = f":{os.fstat(descriptor).st_ino}"
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
        pids = [fields[4] for fields in held if fields[5].endswith(inode)]
        raise TimeoutError(errno.ETIMEDOUT, f"its lock is held by pid {', '.join(pids) or 'unknown'}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        # A pipe in its place must not be waited for: without a writer it reads as empty.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: Mapping[str, object]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(content))
    partial.replace(path)
