"""Memory handed from engine to engine: real descriptors, a real holder, a stand-in for the GPU alone."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import gc
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_sleep_tui.engine.backend.chunks import Chunks, Handle
from vllm_sleep_tui.engine.backend.holder import ANSWER_SECONDS, Holder
from vllm_sleep_tui.engine.backend.mover import Mover
from vllm_sleep_tui.engine.backend.plan import BLOCK, CHUNK, SLACK, Digests, Region, whole_chunks
from vllm_sleep_tui.fleet import keeper, pool_holder
from vllm_sleep_tui.fleet.pool import Pool

GPU = "GPU-0"
KV = (4 << 40, 6 << 40)
PATIENT = 60.0
"""Seconds that a busy machine may take to answer."""
"""Addresses of two tensors of KV cache."""
WEIGHTS = 2 << 40
REST = 70 * BLOCK
"""What a tensor leaves over."""
NUMBERS = itertools.count()
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""An engine's connection ends with its process, and so does none here."""


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


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "p"
    folder.mkdir(mode=0o700)
    users = os.open(folder / f"{GPU}.users", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(users, fcntl.LOCK_SH)
    made = Place(folder, users)
    yield made
    gc.collect()  # the engines' connections, while their warnings are expected
    made.unuse()
    if made.pid and made.lives():
        until(lambda: not made.lives())


@pytest.fixture
def gpu(place: Place) -> Iterator[Gpu]:
    place.start()
    made = Gpu(holders={place.pid})
    yield made
    made.end()


def pair(gpu: Gpu, place: Place) -> tuple[Engine, Engine]:
    """Two engines that sleep, the first with chunks in the pool: it was awake before."""
    one, other = Engine(gpu, str(place.folder)), Engine(gpu, str(place.folder))
    for engine in (one, other, one):
        if engine.mover.level is not None:
            engine.mover.wake(None)
        engine.mover.sleep(1)
    return one, other


def test_the_kv_cache_of_a_sleeper_goes_to_the_next_engine_and_is_cleared(gpu: Gpu, place: Place) -> None:
    one, other = pair(gpu, place)
    assert one.mover.last["given_bytes"] == 6 * CHUNK
    assert place.ask(op="state")["free"] == {str(CHUNK): 6}
    before = gpu.used()
    made = other.memory.made
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 6 * CHUNK
    assert other.memory.made - made == 8 * BLOCK + 2 * REST, "the weights and the rests are its own"
    assert gpu.used() - before == other.memory.made - made
    assert not any(b"".join(other.content(address) for address in KV))
    assert place.ask(op="state")["free_bytes"] == 0
    assert place.lent == 6 * CHUNK
    assert place.ask(op="state")["engines"]


def test_memory_goes_round_and_nothing_grows(gpu: Gpu, place: Place) -> None:
    engines = pair(gpu, place)
    weights = {}
    for engine in engines:
        engine.mover.wake(None)
        weights[id(engine)] = engine.content(WEIGHTS)
        engine.mover.sleep(1)
    used = gpu.used()
    descriptors = len(os.listdir("/proc/self/fd"))
    for engine in engines * 10:
        engine.mover.wake(None)
        assert engine.mover.last["taken_bytes"] == 6 * CHUNK
        assert engine.content(WEIGHTS) == weights[id(engine)]
        for address in KV:
            engine.memory.write(address, os.urandom(len(engine.content(address))))
        engine.mover.sleep(1)
        assert engine.mover.last["given_bytes"] == 6 * CHUNK
    assert gpu.used() == used
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert place.lent == 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_hands_the_kv_cache_over(gpu: Gpu, place: Place, level: int) -> None:
    one, other = pair(gpu, place)
    other.mover.wake(None)
    if level == 0:
        other.mover.keep_weights()
    other.mover.sleep(max(level, 1))
    assert other.mover.last["given_bytes"] == 6 * CHUNK
    one.mover.wake(["weights"])
    assert one.mover.last["taken_bytes"] == 0
    one.mover.wake(["kv_cache"])
    assert one.mover.last["taken_bytes"] == 6 * CHUNK
    if level == 0:
        assert other.mover.sleep(1) == (8 * BLOCK, 8 * BLOCK)
    other.mover.wake(None)
    assert other.mover.level is None
    assert len(other.content(WEIGHTS)) == 8


def test_other_sizes_take_what_fits_and_make_the_rest(gpu: Gpu, place: Place) -> None:
    one, _ = pair(gpu, place)
    larger = Engine(gpu, str(place.folder), kv=5 * CHUNK + REST)
    larger.mover.sleep(1)
    larger.mover.wake(None)
    assert larger.mover.last["taken_bytes"] == 6 * CHUNK
    larger.mover.sleep(1)
    assert larger.mover.last["given_bytes"] == 10 * CHUNK
    one.mover.wake(None)
    assert place.ask(op="state")["free"] == {str(CHUNK): 4}


def test_vllm_frees_a_region_of_chunks_as_any_other(gpu: Gpu, place: Place) -> None:
    one, other = pair(gpu, place)
    other.mover.wake(None)
    other.free(KV[0])
    other.mover.sleep(1)
    assert place.lent == 0
    assert place.ask(op="state")["free_bytes"] == 6 * CHUNK, "its chunks are the pool's again"
    assert len(other.memory.pieces) == len(other.memory.handles) == 0
    one.mover.wake(None)
    assert one.mover.last["taken_bytes"] == 6 * CHUNK


def test_once_vllms_own_sleep_mode_takes_over_its_sleep_frees_what_was_lent(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    other.mover.wake(None)
    content = [other.content(address) for address in (WEIGHTS, *KV)]
    other.mover.let_go()
    assert (place.lent, other.mover.pool_bytes) == (0, 0)
    assert [other.content(address) for address in (WEIGHTS, *KV)] == content
    for found in other.allocations.values():
        other.unmap_and_release(found.handle)
    assert gpu.used() == 0


# ── whatever happens to the holder ───────────────────────────────────────────────────────────────────────


def test_what_a_neighbour_takes_during_a_sleep_is_made_up_for_from_the_pool(gpu: Gpu, place: Place) -> None:
    engine, _ = pair(gpu, place)
    engine.mover.wake(None)
    gpu.room = gpu.used() + CHUNK
    neighbour = Memory(gpu)
    gpu.memories.append(neighbour)
    engine.neighbour_grows = lambda: neighbour.make(CHUNK, exportable=False)
    free = engine.memory.free()
    engine.mover.keep_weights()
    engine.mover.sleep(1)
    assert engine.memory.free() >= free  # or vLLM would end the sleep as failed
    assert engine.mover.level == 0
    assert place.ask(op="state")["free_bytes"] == 0


def test_without_a_holder_the_driver_gives_and_takes(tmp_path: Path) -> None:
    gpu = Gpu()
    for folder in (None, str(tmp_path), str(tmp_path / "none")):
        engine = Engine(gpu, folder)
        before = engine.content(WEIGHTS)
        engine.mover.sleep(1)
        assert gpu.used() == 0
        engine.mover.wake(None)
        assert len(engine.memory.pieces) == 3, "a piece for each region"
        assert engine.content(WEIGHTS) == before
        engine.mover.sleep(1)


def test_a_holder_that_dies_takes_the_free_memory_with_it_and_nothing_else(gpu: Gpu, place: Place) -> None:
    one, other = pair(gpu, place)
    place.kill()
    assert gpu.used() == 0
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 0
    other.mover.sleep(1)
    assert gpu.used() == 0
    place.start()
    gpu.holders = {place.pid}
    one.mover.wake(None)
    place.kill()
    one.mover.sleep(1)
    assert (gpu.used(), one.mover.level) == (0, 1)
    place.start()
    for engine in (one, other):
        engine.mover.wake(None)
        engine.mover.sleep(1)
    gpu.holders = {place.pid}
    assert place.ask(op="state")["free_bytes"] == 6 * CHUNK


def test_a_holder_that_hangs_is_left_after_a_moment(gpu: Gpu, place: Place) -> None:
    other = Engine(gpu, str(place.folder), answers_within=ANSWER_SECONDS)
    other.mover.sleep(1)
    os.kill(place.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        other.mover.wake(None)
        other.mover.sleep(1)
        assert time.monotonic() - began < 60  # stopped, it would say nothing for ever
        assert other.mover.level == 1
    finally:
        os.kill(place.pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["stale", "short", "foreign"])
def test_a_descriptor_that_is_not_what_it_should_be_is_replaced(gpu: Gpu, place: Place, kind: str) -> None:
    _, other = pair(gpu, place)
    place.ask(op="shrink", to_bytes=3 * CHUNK)
    bad = os.memfd_create(gpu.name) if kind == "short" else os.open(os.devnull, os.O_RDWR)
    if kind == "foreign":
        os.close(bad)
        bad = os.memfd_create("something")
    with place.connect() as connection:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [bad] * 3))]
        connection.sendmsg([json.dumps({"op": "give", "sizes": [CHUNK] * 3}).encode()], rights)
        assert json.loads(connection.recv(1000)) == {"kept": 3}
    os.close(bad)
    descriptors = len(os.listdir("/proc/self/fd"))
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 3 * CHUNK
    assert all(len(other.content(address)) == short(3 * CHUNK + REST) for address in KV)
    other.mover.sleep(1)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_engine_that_dies_leaves_no_memory(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    ready, tell = os.pipe()
    os.set_blocking(ready, False)
    child = os.fork()
    if child == 0:
        try:
            other.chunks = Chunks(other.memory, Holder(str(place.folder), GPU, "launch-2", PATIENT))
            other.mover.wake(None)
            os.write(tell, b"%d" % other.mover.last["taken_bytes"])
            signal.pause()
        finally:
            os._exit(1)
    gpu.holders.add(child)
    until(lambda: bool(select.select([ready], [], [], 0)[0]))
    assert int(os.read(ready, 20)) == 6 * CHUNK
    assert gpu.used() > 6 * CHUNK
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert gpu.used() == 0
    until(lambda: len(place.ask(op="state")["engines"]) == 2)
    os.close(ready)
    os.close(tell)


# ── without room ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_wake_without_room_gives_all_of_it_back_and_can_be_asked_again(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    used = gpu.used()
    gpu.room = used + 6 * BLOCK
    with pytest.raises(RuntimeError, match="out of memory"):
        other.mover.wake(None)
    assert (gpu.used(), len(other.memory.pieces), len(other.memory.handles)) == (used, 0, 0)
    assert place.ask(op="state")["free_bytes"] == 6 * CHUNK
    assert (other.mover.level, place.lent) == (1, 0)
    gpu.room = used + 8 * BLOCK + 2 * REST
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 6 * CHUNK


def test_what_the_pool_has_too_much_makes_room_for_a_wake(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    small = Engine(gpu, str(place.folder), kv=CHUNK + 130 * BLOCK, weights=600)
    small.mover.sleep(1)
    gpu.room = gpu.used() + 700 * BLOCK  # weights and rests do not fit beside all six chunks
    small.mover.wake(None)
    assert small.mover.last["taken_bytes"] == 2 * CHUNK
    assert place.ask(op="state")["free_bytes"] == 0
    small.mover.sleep(1)
    gpu.room = 1 << 60
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 2 * CHUNK


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 5000).map(lambda blocks: blocks * BLOCK), max_size=40))
def test_chunks_leave_some_of_every_region_and_enough_of_all(sizes: list[int]) -> None:
    counts = whole_chunks(sizes)
    rests = [size - count * CHUNK for size, count in zip(sizes, counts, strict=True)]
    assert all(rest > 0 and count >= 0 for rest, count in zip(rests, counts, strict=True))
    assert sum(rests) >= min(SLACK, sum(sizes))
    if sum((size - 1) % CHUNK + 1 for size in sizes) >= SLACK:
        assert all(rest <= CHUNK for rest in rests)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_comes_each_engine_has_its_weights_and_no_kv_of_another(
    gpu: Gpu, place: Place, data: st.DataObject
) -> None:
    if not place.lives():
        place.start()
        gpu.holders = {place.pid}
    engines = pair(gpu, place)
    weights = {}
    for engine in engines:
        engine.mover.wake(None)
        weights[id(engine)] = engine.content(WEIGHTS)
        engine.mover.sleep(1)
    for _ in range(data.draw(st.integers(1, 8))):
        engine = data.draw(st.sampled_from(engines))
        if data.draw(st.integers(0, 5)) == 0 and place.lives():
            place.kill()
        elif data.draw(st.integers(0, 2)) == 0 and not place.lives():
            place.start()
            gpu.holders = {place.pid}
        if engine.mover.level is None:
            for address in KV:
                engine.memory.write(address, b"\xee" * len(engine.content(address)))
            if data.draw(st.booleans()):
                engine.mover.keep_weights()
            engine.mover.sleep(1)
        else:
            engine.mover.wake(None)
            assert not any(b"".join(engine.content(address) for address in KV))
            assert engine.content(WEIGHTS) == weights[id(engine)]
    for engine in engines:
        if engine.mover.level != 1:
            engine.mover.sleep(1)
    if place.lives():
        place.ask(op="shrink", to_bytes=0)
    assert gpu.used() == 0


# ── the holder itself ────────────────────────────────────────────────────────────────────────────────────


def test_one_holder_lives_per_gpu_and_ends_when_nobody_uses_it(place: Place) -> None:
    assert "holder" in place.start()
    assert place.start() == {}
    place.unuse()
    until(lambda: not place.lives())
    assert not (place.folder / f"{GPU}.sock").exists()


def test_a_holder_that_ends_leaves_nothing_and_whoever_waited_for_its_file_gets_a_new_one(
    place: Place,
) -> None:
    place.start()
    (place.folder / f"{GPU}.lent-1").write_text("of an engine that is gone")
    pool = Pool(GPU, place.folder)
    with ThreadPoolExecutor(4) as threads:
        joining = [threads.submit(pool.join) for _ in range(4)]
        place.unuse()
        joined = [each.result() for each in joining]
    assert all(pool_holder.is_at(each, str(place.folder / f"{GPU}.users")) for each in joined)
    for each in joined:
        os.close(each)
    until(lambda: not list(place.folder.iterdir()))


def test_what_lies_in_tmp_is_marked_as_used_by_who_holds_it(place: Place, tmp_path: Path) -> None:
    place.start()
    guard = tmp_path / "server" / "guard"
    guard.mkdir(parents=True)
    (guard / "panel_guard.py").touch()
    paths = [guard, guard / "panel_guard.py", place.folder / f"{GPU}.sock", place.folder / f"{GPU}.users"]
    for path in paths:
        os.utime(path, (0, 0))
    keeper.keep_fresh(str(tmp_path / "server"))
    pool_holder.keep_fresh(str(place.folder / GPU))
    assert all(time.time() - path.stat().st_mtime < 60 for path in paths)


def test_free_memory_that_nobody_comes_for_is_given_up(place: Place) -> None:
    place.start(linger=0.2)
    gpu = Gpu(holders={place.pid})
    pair(gpu, place)
    until(lambda: gpu.used() == 0)
    assert place.lives()


def test_a_limit_and_a_shrink_hold(place: Place) -> None:
    place.start(limit_bytes=4 * CHUNK)
    gpu = Gpu(holders={place.pid})
    one, _ = pair(gpu, place)
    assert one.mover.last["given_bytes"] == 4 * CHUNK
    assert gpu.used() == 4 * CHUNK
    assert place.ask(op="shrink", to_bytes=CHUNK, limit_bytes=2 * CHUNK)["free"] == {str(CHUNK): 1}
    assert gpu.used() == CHUNK
    assert place.ask(op="end") == {}
    until(lambda: not place.lives())
    assert gpu.used() == 0


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"[]",
        b"\xff" * 20,
        b"[" * 3000,
        b"{}",
        b'{"op": "fly"}',
        b'{"op": ["give"]}',
        b'{"op": "give"}',
        b'{"op": "give", "sizes": [0]}',
        b'{"op": "give", "sizes": [true]}',
        b'{"op": "take", "wanted": {"x": 1}}',
        b'{"op": "take", "wanted": {"5": -1}}',
        b'{"op": "take", "wanted": {"5": "1"}}',
        b'{"op": "take", "wanted": []}',
        b'{"op": "take", "wanted": {"' + b"9" * 5000 + b'": 1}}',
        b'{"op": "shrink"}',
        b'{"op": "shrink", "to_bytes": -1}',
        b'{"op": "shrink", "to_bytes": 0, "limit_bytes": "0"}',
        b'{"op": "hello"}',
        b"x" * 60000,
    ],
)
def test_rubbish_is_answered_with_a_sentence_and_hung_up_on(place: Place, packet: bytes) -> None:
    place.start()
    gpu = Gpu(holders={place.pid})
    descriptor = os.memfd_create(gpu.name)
    os.ftruncate(descriptor, 10)
    with place.connect() as connection:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor] * 3))]
        connection.sendmsg([packet], rights)
        assert json.loads(connection.recv(65536))["error"].endswith(".")
        assert connection.recv(65536) == b""
    os.close(descriptor)
    assert gpu.used() == 0, "no descriptor stays"
    assert place.ask(op="state")["free_bytes"] == 0


def test_a_client_that_does_not_read_its_answers_stops_nobody(place: Place) -> None:
    place.start()
    with place.connect() as connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection.send(b'{"op": "state"}')
        assert place.ask(op="state")["free_bytes"] == 0


def test_a_folder_that_others_may_enter_is_refused_by_both(place: Place) -> None:
    place.folder.chmod(0o755)
    assert "error" in place.start()
    place.folder.chmod(0o700)
    place.start()
    place.folder.chmod(0o750)
    assert not Holder(str(place.folder), GPU, "x").begin()
    place.folder.chmod(0o700)
    assert "error" in place.start(gpu="../x")
