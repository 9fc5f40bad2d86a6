"""Engines that hand memory on: real descriptors, a real holder, a stand-in for the GPU alone."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sleep_tui.engine.backend.chunks import Chunks, Handle
from vllm_sleep_tui.engine.backend.holder import Holder
from vllm_sleep_tui.engine.backend.mover import Mover
from vllm_sleep_tui.engine.backend.plan import BLOCK, CHUNK, Digests, Region
from vllm_sleep_tui.fleet import pool_holder

GPU = "GPU-0"
KV = (4 << 40, 6 << 40)
PATIENT = 60.0
"""Seconds that a busy machine may take to answer."""
"""Addresses of two tensors of KV cache."""
WEIGHTS = 2 << 40
REST = 70 * BLOCK
"""What a tensor leaves over."""
NUMBERS = itertools.count()


def short(size: int) -> int:
    """Bytes of the file that stands for so much memory."""
    return size // BLOCK


@dataclass
class Gpu:
    """Memory is a file without a name, which lives for as long as the kernel knows a reference to it."""

    room: int = 1 << 60
    name: str = field(default_factory=lambda: f"gpu-{os.getpid()}-{next(NUMBERS)}")
    memories: list[Memory] = field(default_factory=list)
    holders: set[int] = field(default_factory=set)
    """Processes that may have references besides us."""

    def used(self) -> int:
        """Bytes that somebody has a reference to."""
        found: dict[int, int] = {}
        for pid in (os.getpid(), *self.holders):
            try:
                names = os.listdir(f"/proc/{pid}/fd")
            except FileNotFoundError:
                continue
            for name in names:
                path = f"/proc/{pid}/fd/{name}"
                try:
                    if self.owns(path):
                        about = os.stat(path)
                        found[about.st_ino] = about.st_size * BLOCK
                except FileNotFoundError:
                    continue
        return sum(found.values())

    def owns(self, path: str) -> bool:
        """Whether it is memory of ours that lies behind this link of `/proc`."""
        return os.readlink(path).startswith(f"/memfd:{self.name} ")

    def end(self) -> None:
        """All processes are gone."""
        for memory in self.memories:
            memory.end()


@dataclass
class Memory:
    """What CUDA gives one process."""

    gpu: Gpu
    handles: dict[int, int] = field(default_factory=dict)
    pieces: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Size and descriptor by address."""
    allowed: set[int] = field(default_factory=set)
    exportable: set[int] = field(default_factory=set)
    made: int = 0
    cleared: int = 0
    next_handle: int = 1

    def make(self, size: int, *, exportable: bool) -> int:
        if self.gpu.used() + size > self.gpu.room:
            raise RuntimeError("CUDA Error: out of memory")
        descriptor = os.memfd_create(self.gpu.name)
        os.ftruncate(descriptor, short(size))
        self.made += size
        if exportable:
            self.exportable.add(os.fstat(descriptor).st_ino)
        return self._handle(descriptor)

    def adopt(self, descriptor: int) -> int:
        if not self.gpu.owns(f"/proc/self/fd/{descriptor}"):
            raise RuntimeError("CUDA Error: cuMemImportFromShareableHandle 999")
        return self._handle(os.dup(descriptor))

    def release(self, memory: int) -> None:
        os.close(self.handles.pop(memory))

    def place(self, address: int, size: int, memory: int) -> None:
        if os.fstat(self.handles[memory]).st_size != short(size):
            raise RuntimeError("CUDA Error: cuMemMap 801")
        assert all(at + length <= address or address + size <= at for at, (length, _) in self.pieces.items())
        self.pieces[address] = (size, os.dup(self.handles[memory]))

    def allow(self, address: int, size: int) -> None:
        inside = self._inside(address, size)
        assert sum(self.pieces[at][0] for at in inside) == size
        self.allowed.update(inside)

    def remove(self, address: int, size: int) -> None:
        for at in self._inside(address, size):
            os.close(self.pieces.pop(at)[1])
            self.allowed.discard(at)

    def at(self, address: int) -> int:
        return self._handle(os.dup(self.pieces[address][1]))

    def export(self, memory: int) -> int:
        if os.fstat(self.handles[memory]).st_ino not in self.exportable:
            raise RuntimeError("CUDA Error: cuMemExportToShareableHandle 1")  # made by another process, too
        return os.dup(self.handles[memory])

    def clear(self, address: int, size: int) -> None:
        self.write(address, bytes(short(size)))
        self.cleared += size

    def free(self) -> int:
        return self.gpu.room - self.gpu.used()

    def read(self, address: int, size: int) -> bytes:
        return b"".join(
            os.pread(self.pieces[at][1], short(self.pieces[at][0]), 0) for at in self._inside(address, size)
        )

    def write(self, address: int, content: bytes) -> None:
        for at in self._inside(address, len(content) * BLOCK):
            assert at in self.allowed
            offset = short(at - address)
            os.pwrite(self.pieces[at][1], content[offset : offset + short(self.pieces[at][0])], 0)

    def end(self) -> None:
        """The process is gone."""
        for descriptor in (*self.handles.values(), *(held for _, held in self.pieces.values())):
            os.close(descriptor)
        self.handles, self.pieces = {}, {}

    def _handle(self, descriptor: int) -> int:
        self.next_handle += 1
        self.handles[self.next_handle] = descriptor
        return self.next_handle

    def _inside(self, address: int, size: int) -> list[int]:
        return sorted(at for at in self.pieces if address <= at < address + size)


class Ram(bytearray):
    """A pool of pinned RAM."""

    @property
    def size(self) -> int:
        return len(self) * BLOCK

    def close(self) -> None:
        self.clear()


@dataclass
class Allocation:
    handle: Handle
    tag: str


class Engine:
    """One worker: a region of weights, two of KV cache. It is the mover's driver, by chunks."""

    def __init__(
        self,
        gpu: Gpu,
        folder: str | None,
        kv: int = 3 * CHUNK + REST,
        weights: int = 8,
        answers_within: float = PATIENT,
    ) -> None:
        self.memory = Memory(gpu)
        gpu.memories.append(self.memory)
        self.holder = Holder(folder, GPU, "launch-1", answers_within)
        self.chunks = Chunks(self.memory, self.holder)
        self.allocations: dict[int, Allocation] = {}
        self.cells: list[Any] = []
        self.neighbour_grows: Callable[[], object] = lambda: None
        """Called while it sleeps."""
        self.mover = Mover(self.allocations, self, ("weights", "kv_cache"))
        self.allocate(WEIGHTS, weights * BLOCK, "weights")
        for address in KV:
            self.allocate(address, kv, "kv_cache")

    def allocate(self, address: int, size: int, tag: str) -> None:
        """As vLLM's allocator does: one piece, and the handle in the cell."""
        self.cells.append(ctypes.c_uint64(self.memory.make(size, exportable=False)))
        self.memory.place(address, size, self.cells[-1].value)
        self.memory.allow(address, size)
        self.memory.write(address, os.urandom(short(size)))
        self.allocations[address] = Allocation((0, size, address, ctypes.addressof(self.cells[-1])), tag)

    def free(self, address: int) -> None:
        """As vLLM's allocator does: all of it unmapped, one handle released."""
        self.unmap_and_release(self.allocations.pop(address).handle)

    def unmap_and_release(self, handle: Handle) -> None:
        self.memory.remove(handle[2], handle[1])
        self.memory.release(ctypes.c_uint64.from_address(handle[3]).value)

    def content(self, address: int) -> bytes:
        return self.memory.read(address, self.allocations[address].handle[1])

    # ── the driver ───────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        self.chunks.begin()

    def fetch(self, handles: Sequence[Handle]) -> None:
        self.chunks.fetch(handles)

    def map(self, handle: Handle, *, clear: bool) -> None:
        self.chunks.map(handle, clear=clear)

    def unmap(self, handle: Handle) -> None:
        self.chunks.unmap(handle, self.unmap_and_release)

    def hand_over(self, known: Collection[Region]) -> dict[str, float]:
        self.chunks.hand_over(known)
        return self.chunks.figures

    def let_go(self) -> None:
        self.chunks.let_go()

    def digests(self, regions: Sequence[Region]) -> list[Digests]:
        return [list(self.memory.read(*region)) for region in regions]

    def pin(self, size: int) -> Ram:
        return Ram(short(size))

    def move(self, source: Ram, offset: int, target: Ram, to: int, length: int) -> None:
        target[short(to) : short(to + length)] = source[short(offset) : short(offset + length)]

    def save(self, address: int, pool: Ram, offset: int, length: int) -> None:
        base = max(start for start in self.allocations if start <= address)
        content = self.content(base)[short(address - base) :]
        pool[short(offset) : short(offset + length)] = content[: short(length)]

    def restore(self, pool: Ram, offset: int, address: int, length: int) -> None:
        self.memory.write(address, bytes(pool[short(offset) : short(offset + length)]))

    def finish(self) -> None:
        pass

    def tidy(self) -> None:
        self.neighbour_grows()
        self.chunks.make_up()


@dataclass
class Place:
    """A folder of holders, with the file that says that somebody uses them."""

    folder: Path
    users: int = -1
    pid: int = 0

    def start(self, **order: Any) -> dict[str, Any]:
        """Run a holder; what it says."""
        told = subprocess.run(
            [sys.executable, "-I", "-S", pool_holder.__file__],
            input=json.dumps(
                {"folder": str(self.folder), "gpu": GPU, "limit_bytes": None, "linger": 60, **order}
            ),
            capture_output=True,
            text=True,
            check=True,
        )
        word: dict[str, Any] = json.loads(told.stdout)
        if "holder" in word:
            self.pid = word["holder"]["pid"]
        return word

    def ask(self, **request: Any) -> dict[str, Any]:
        """As the panel asks."""
        with self.connect() as connection:
            connection.send(json.dumps(request).encode())
            answer: dict[str, Any] = json.loads(connection.recv(65536))
            return answer

    def connect(self) -> socket.socket:
        """One connection."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(10)
        connection.connect(str(self.folder / f"{GPU}.sock"))
        return connection

    def kill(self) -> None:
        """SIGKILL, seen to be over."""
        os.kill(self.pid, signal.SIGKILL)
        until(lambda: not self.lives())

    def lives(self) -> bool:
        """Whether a holder has the lock of its file."""
        try:
            with (self.folder / f"{GPU}.holder").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass  # it has ended, and left nothing
        return False

    def unuse(self) -> None:
        """The last server has gone."""
        if self.users >= 0:
            os.close(self.users)
        self.users = -1

    @property
    def lent(self) -> int:
        """What we have written down."""
        path = self.folder / f"{GPU}.lent-{os.getpid()}"
        if not path.exists():
            return 0
        word = json.loads(path.read_text())
        assert word["pid"] == os.getpid()
        return int(word["bytes"])


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def pair(gpu: Gpu, place: Place) -> tuple[Engine, Engine]:
    """Two engines that sleep, the first with chunks in the pool: it was awake before."""
    one, other = Engine(gpu, str(place.folder)), Engine(gpu, str(place.folder))
    for engine in (one, other, one):
        if engine.mover.level is not None:
            engine.mover.wake(None)
        engine.mover.sleep(1)
    return one, other
