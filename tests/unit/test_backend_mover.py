"""The bookkeeping of our sleep mode, with a stand-in for the GPU alone: its memory is bytes by address."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sleep_tui.engine.backend import fit
from vllm_sleep_tui.engine.backend.chunks import Handle
from vllm_sleep_tui.engine.backend.mover import Mover, NoPool
from vllm_sleep_tui.engine.backend.plan import BLOCK, Layout, Region, Span, changed

WORD = 8
"""A block of the stand-in stands for 2 MiB and holds this many bytes."""


def short(size: int) -> int:
    return size // BLOCK * WORD


@dataclass
class Allocation:
    handle: Handle
    tag: str


class Pool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.content = bytearray(short(size))
        self.closed = False

    def close(self) -> None:
        self.closed = True


@dataclass
class StandIn:
    """What a GPU does with memory: mapped memory holds bytes, fresh memory holds nothing of before."""

    room: int = 1 << 60
    ram: int = 1 << 60
    memory: dict[int, bytearray] = field(default_factory=dict)
    pools: list[Pool] = field(default_factory=list)

    def begin(self) -> None:
        pass

    def fetch(self, handles: Sequence[Handle]) -> None:
        pass

    def map(self, handle: Handle, *, clear: bool) -> None:
        assert handle[2] not in self.memory
        if self.room < handle[1]:
            raise RuntimeError("CUDA Error: out of memory")
        self.room -= handle[1]
        self.memory[handle[2]] = bytearray(b"\xee" * short(handle[1]))

    def unmap(self, handle: Handle) -> None:
        del self.memory[handle[2]]
        self.room += handle[1]

    def hand_over(self, known: Collection[Region]) -> dict[str, float]:
        return {}

    def let_go(self) -> None:
        pass

    def digests(self, regions: Sequence[Region]) -> list[Sequence[int]]:
        return [
            [zlib.crc32(self.memory[address][at : at + WORD]) for at in range(0, short(size), WORD)]
            for address, size in regions
        ]

    def pin(self, size: int) -> Pool:
        if size > self.ram - sum(pool.size for pool in self.pools if not pool.closed):
            raise NoPool(f"{size} bytes of RAM")
        self.pools.append(Pool(size))
        return self.pools[-1]

    def move(self, source: Pool, offset: int, target: Pool, to: int, length: int) -> None:
        assert not source.closed
        assert not target.closed
        part = source.content[short(offset) : short(offset + length)]
        target.content[short(to) : short(to + length)] = part

    def save(self, address: int, pool: Pool, offset: int, length: int) -> None:
        base = max(start for start in self.memory if start <= address)
        start = short(address - base)
        part = self.memory[base][start : start + short(length)]
        pool.content[short(offset) : short(offset + length)] = part

    def restore(self, pool: Pool, offset: int, address: int, length: int) -> None:
        assert not pool.closed
        self.memory[address][:] = pool.content[short(offset) : short(offset + length)]

    def finish(self) -> None:
        pass

    def tidy(self) -> None:
        pass

    @property
    def pinned(self) -> int:
        return sum(pool.size for pool in self.pools if not pool.closed)


class Everything(tuple[str, ...]):
    def __contains__(self, tag: object) -> bool:
        return True


class Worker:
    """Two regions of weights, one of KV cache, as vLLM's allocator would hold them."""

    def __init__(self, deferrable: tuple[str, ...] | None = None, **limits: int) -> None:
        self.gpu = StandIn(**limits)
        self.allocations: dict[int, Allocation] = {}
        self.mover = Mover(self.allocations, self.gpu, Everything() if deferrable is None else deferrable)
        for address, blocks, tag in (
            (1 << 30, 3, "weights"),
            (2 << 30, 1, "weights"),
            (3 << 30, 9, "kv_cache"),
        ):
            self.allocate(address, blocks, tag)
        self.write(1 << 30, b"weights of three blocks!")
        self.write(2 << 30, b"and one.")

    def allocate(self, address: int, blocks: int, tag: str) -> None:
        self.allocations[address] = Allocation((0, blocks * BLOCK, address, 0), tag)
        self.gpu.map(self.allocations[address].handle, clear=True)

    def write(self, address: int, content: bytes) -> None:
        assert len(content) == len(self.gpu.memory[address])
        self.gpu.memory[address][:] = content

    @property
    def weights(self) -> bytes:
        return bytes(self.gpu.memory[1 << 30] + self.gpu.memory[2 << 30])


def test_a_sleep_and_a_wake_bring_the_weights_back_and_pin_just_their_size() -> None:
    worker = Worker()
    before = worker.weights
    freed, kept = worker.mover.sleep(1)
    assert (freed, kept) == (13 * BLOCK, 4 * BLOCK)
    assert not worker.gpu.memory
    assert worker.gpu.pinned == worker.mover.pool_bytes == 4 * BLOCK
    worker.mover.wake(None)
    assert worker.weights == before
    assert 3 << 30 in worker.gpu.memory


def test_a_later_sleep_copies_only_what_has_changed() -> None:
    worker = Worker()
    worker.mover.sleep(1)
    assert worker.mover.last["copied_bytes"] == 4 * BLOCK
    worker.mover.wake(None)
    worker.mover.sleep(1)
    assert worker.mover.last["copied_bytes"] == 0
    worker.mover.wake(None)
    worker.write(1 << 30, b"weights of THREE blocks!")
    worker.mover.sleep(1)
    assert worker.mover.last["copied_bytes"] == BLOCK
    worker.mover.wake(None)
    assert worker.weights == b"weights of THREE blocks!and one."


def test_level_2_gives_the_ram_back_and_a_wake_brings_memory_without_content() -> None:
    worker = Worker()
    worker.mover.sleep(1)
    worker.mover.wake(None)
    worker.mover.sleep(2)
    assert worker.gpu.pinned == worker.mover.pool_bytes == 0
    worker.mover.wake(["weights"])
    assert 3 << 30 not in worker.gpu.memory
    assert worker.mover.level == 2
    worker.mover.wake(["kv_cache"])
    assert worker.mover.level is None


def test_level_0_gives_up_the_kv_cache_alone_and_goes_deeper_without_a_wake() -> None:
    worker = Worker()
    before = worker.weights
    worker.mover.keep_weights()
    freed, kept = worker.mover.sleep(1)
    assert (freed, kept, worker.gpu.pinned, worker.mover.level) == (9 * BLOCK, 0, 0, 0)
    assert worker.weights == before
    assert worker.mover.sleep(1) == (4 * BLOCK, 4 * BLOCK)
    assert not worker.gpu.memory
    worker.mover.wake(None)
    assert worker.weights == before
    worker.mover.sleep(1)
    assert worker.mover.level == 1, "only the next sleep was to keep the weights"


def test_a_model_without_a_kv_cache_goes_from_level_0_deeper_like_any_other() -> None:
    worker = Worker()
    before = worker.weights
    worker.gpu.unmap(worker.allocations.pop(3 << 30).handle)
    worker.mover.keep_weights()
    assert (worker.mover.sleep(1), worker.mover.level) == ((0, 0), 0)
    assert worker.mover.sleep(1) == (4 * BLOCK, 4 * BLOCK)
    assert worker.mover.sleep(2) == (0, 0)
    assert worker.mover.level == 1, "what sleeps already goes no deeper"
    worker.mover.wake(None)
    assert (worker.weights, worker.mover.level) == (before, None)


def test_a_wake_without_room_takes_nothing_and_can_be_asked_again() -> None:
    worker = Worker()
    before = worker.weights
    worker.mover.sleep(1)
    worker.gpu.room = 5 * BLOCK
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.mover.wake(None)
    assert worker.gpu.room == 5 * BLOCK
    assert worker.mover.level == 1
    worker.gpu.room = 13 * BLOCK
    worker.mover.wake(None)
    assert worker.weights == before
    assert worker.mover.level is None


def test_without_ram_nothing_has_been_touched() -> None:
    worker = Worker(ram=3 * BLOCK)
    before = worker.weights
    with pytest.raises(NoPool):
        worker.mover.sleep(1)
    assert worker.weights == before
    assert len(worker.gpu.memory) == 3


def test_another_allocation_makes_another_pool_of_just_the_size() -> None:
    worker = Worker()
    worker.mover.sleep(1)
    worker.mover.wake(None)
    worker.allocate(4 << 30, 2, "weights")
    worker.write(4 << 30, b"an adapter's map")
    worker.mover.sleep(1)
    assert worker.gpu.pinned == 6 * BLOCK
    worker.mover.wake(None)
    assert worker.gpu.memory[4 << 30] == b"an adapter's map"


def test_what_is_freed_and_made_anew_while_asleep_is_another_region() -> None:
    worker = Worker()
    worker.mover.sleep(1)
    del worker.allocations[2 << 30]
    worker.allocate(2 << 30, 1, "weights")
    worker.write(2 << 30, b"another.")
    worker.mover.wake(None)
    assert worker.weights.endswith(b"another.")


@pytest.mark.parametrize("level", [1, 2])
def test_tags_that_no_wake_may_leave_out_are_kept_at_every_level(level: int) -> None:
    """vLLM 0.33: the state of a run and the graphs come back with any wake, as they were."""
    worker = Worker(deferrable=("weights", "kv_cache"))
    worker.allocate(5 << 30, 1, "runtime")
    worker.write(5 << 30, b"runtime!")
    worker.mover.sleep(level)
    worker.mover.wake(["kv_cache"])
    assert worker.gpu.memory[5 << 30] == b"runtime!"
    assert 1 << 30 not in worker.gpu.memory


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_comes_the_weights_stay_what_they_were(data: st.DataObject) -> None:
    worker = Worker()
    before = worker.weights
    for _ in range(data.draw(st.integers(1, 12))):
        if worker.mover.level is None:
            spot = data.draw(st.integers(0, 31))
            content = bytearray(worker.weights)
            content[spot] = data.draw(st.integers(0, 255))
            worker.write(1 << 30, bytes(content[:24]))
            worker.write(2 << 30, bytes(content[24:]))
        before = worker.weights if worker.mover.level in (None, 0) else before
        if worker.mover.level is None and data.draw(st.booleans()):
            worker.mover.keep_weights()
        worker.mover.sleep(1)
        if data.draw(st.booleans()):
            tags = data.draw(st.sampled_from([None, ["weights"]]))
            worker.mover.wake(tags)
            assert worker.weights == before
            if tags:
                worker.mover.wake(["kv_cache"])
            assert worker.mover.level is None


def test_stretches_that_changed_are_joined() -> None:
    assert changed(None, [1, 2], 2 * BLOCK) == [Span(0, 2 * BLOCK)]
    assert changed([1, 2, 3, 4], [1, 0, 0, 4], 4 * BLOCK) == [Span(BLOCK, 2 * BLOCK)]
    assert changed([1, 2, 3], [0, 2, 0], 3 * BLOCK) == [Span(0, BLOCK), Span(2 * BLOCK, BLOCK)]
    assert Layout.of([(7, 2 * BLOCK), (9, BLOCK)]).offsets == {(7, 2 * BLOCK): 0, (9, BLOCK): 2 * BLOCK}


# ── what of vLLM it relies on ────────────────────────────────────────────────────────────────────────────


class Allocator:
    @staticmethod
    def get_instance() -> object: ...

    def sleep(self, offload_tags: object = None) -> None: ...

    def wake_up(self, tags: object = None) -> None: ...


def cumem(**other: object) -> SimpleNamespace:
    def create_and_map(allocation_handle: object) -> None: ...

    def unmap_and_release(allocation_handle: object) -> None: ...

    described = {
        "cumem_available": True,
        "create_and_map": create_and_map,
        "unmap_and_release": unmap_and_release,
        "CuMemAllocator": Allocator,
    }
    return SimpleNamespace(**{**described, **other})


CUDA = SimpleNamespace(is_cuda=lambda: True)


def test_a_vllm_that_fits_is_taken_and_one_that_was_not_seen_on_a_gpu_is_not() -> None:
    version = f"{fit.PROVEN[0]}.0"
    assert fit.misfits(version, CUDA, cumem(), Allocation) == []
    assert "has not been seen" in fit.misfits("0.99.1", CUDA, cumem(), Allocation)[0]
    assert "has not been seen" in fit.misfits("dev", CUDA, cumem(), Allocation)[0]


def test_what_does_not_fit_is_named() -> None:
    version = f"{fit.PROVEN[0]}.0"
    other = SimpleNamespace(is_cuda=lambda: False)
    assert fit.misfits(version, other, cumem(), Allocation) == ["this vLLM does not run on an NVIDIA GPU"]
    assert "not there" in fit.misfits(version, CUDA, None, Allocation)[0]
    assert "not there" in fit.misfits(version, CUDA, cumem(cumem_available=False), Allocation)[0]
    found = fit.misfits(version, CUDA, cumem(create_and_map=lambda handle: None), Allocation)
    assert found == ["vllm.device_allocator.cumem has no create_and_map(allocation_handle)"]
    assert "AllocationData" in fit.misfits(version, CUDA, cumem(), object)[0]


@pytest.mark.parametrize(
    "handle", [(0, BLOCK, 4096), (0, BLOCK + 4096, 4096, 0), (0, BLOCK, 8192, 0), (0, BLOCK, 4096, [1])]
)
def test_a_handle_of_another_shape_is_not_touched(handle: tuple[object, ...]) -> None:
    assert fit.misfits_of({4096: Allocation((0, BLOCK, 4096, 7), "weights")}) == []
    assert fit.misfits_of({4096: Allocation(handle, "weights")})  # type: ignore[arg-type]
