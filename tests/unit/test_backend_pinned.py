"""The RAM of the copies: real pages, with a stand-in for CUDA's registration alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vllm_sleep_tui.engine.backend.mover import NoPool
from vllm_sleep_tui.engine.backend.pinned import PIECE, PinnedPool

BLOCK = 2 * 2**20


class Cuda:
    """Knows what is registered."""

    def __init__(self, most: int = 1 << 60) -> None:
        self.most = most
        self.registered: dict[int, int] = {}
        self.lock = threading.Lock()

    def register(self, address: int, length: int) -> int:
        with self.lock:
            if sum(self.registered.values()) + length > self.most:
                return 2
            self.registered[address] = length
            return 0

    def unregister(self, address: int) -> None:
        del self.registered[address]


def shared_memory() -> int:
    """Bytes of this process that the panel would show as pinned."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))


@pytest.mark.parametrize("size", [BLOCK, PIECE, 2 * PIECE + 3 * BLOCK])
def test_a_pool_is_of_just_the_size_and_goes_as_it_came(size: int) -> None:
    cuda, before = Cuda(), shared_memory()
    pool = PinnedPool(size, cuda.register, cuda.unregister)
    assert shared_memory() - before == size
    edges = sorted(cuda.registered.items())
    assert edges[0][0] == pool.address
    assert sum(cuda.registered.values()) == size == pool.size
    pool.bytes[size - 1] = 7
    pool.close()
    assert not cuda.registered
    assert shared_memory() == before


def test_something_else_is_done_meanwhile_and_if_that_fails_nothing_stays() -> None:
    cuda, before, done = Cuda(), shared_memory(), []
    pool = PinnedPool(PIECE, cuda.register, cuda.unregister, lambda: done.append("once"))
    assert done == ["once"]
    pool.close()

    def fail() -> None:
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        PinnedPool(PIECE, cuda.register, cuda.unregister, fail)
    assert not cuda.registered
    assert shared_memory() == before


def test_no_copy_crosses_the_edge_of_what_is_registered() -> None:
    cuda = Cuda()
    pool = PinnedPool(2 * PIECE + BLOCK, cuda.register, cuda.unregister)
    for offset, length in ((0, pool.size), (BLOCK, PIECE), (PIECE, PIECE), (PIECE - BLOCK, 2 * BLOCK)):
        parts = list(pool.parts(offset, length))
        assert sum(part for _, part in parts) == length
        assert parts[0][0] == offset
        for at, part in parts:
            starts = [start - pool.address for start in cuda.registered]
            assert any(start <= at and at + part <= start + PIECE for start in starts)
    pool.close()


def test_without_the_ram_nothing_stays() -> None:
    cuda, before = Cuda(most=PIECE), shared_memory()
    with pytest.raises(NoPool, match="cudaHostRegister"):
        PinnedPool(3 * PIECE, cuda.register, cuda.unregister)
    assert not cuda.registered
    assert shared_memory() == before
    with pytest.raises(NoPool, match=os.strerror(12)):
        PinnedPool(1 << 50, cuda.register, cuda.unregister)
