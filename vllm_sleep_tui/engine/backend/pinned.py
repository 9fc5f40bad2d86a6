"""RAM that the GPU copies to and from at full speed, of exactly the size asked for.

`cudaHostAlloc`, which torch uses, rounds each allocation up to a power of two and touches its pages in one
thread: 4.4 s for 8 GiB on an H100's host. There 7.5 GiB mapped and touched by several threads took 1.7 s, and
0.4 to register; 1.6 for both where each thread registers what it has touched, piece by piece.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .mover import NoPool

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: pages come at once, and are written by nobody but the kernel."""
THREADS = 8
PIECE = 256 * 2**20
"""What is registered at once: no copy may cross an edge."""
FAILED = ctypes.c_void_p(-1).value


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    return libc


class PinnedPool:
    """Registered with CUDA by `register(address, size)`, which answers 0; raises NoPool without the RAM.

    `meanwhile` is done once while other threads fill it, which takes seconds.
    The mapping is shared, as CUDA's own are: it shows as ``RssShmem``, which is what the panel reads.
    """

    def __init__(
        self,
        size: int,
        register: Callable[[int, int], int],
        unregister: Callable[[int], object],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.size = size
        self._unregister = unregister
        self._libc = _libc()
        found = self._libc.mmap(
            None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0
        )
        if found in (None, FAILED):
            raise NoPool(f"{size} bytes of RAM: {os.strerror(ctypes.get_errno())}")
        self.address: int = found
        self._libc.madvise(self.address, size, mmap.MADV_HUGEPAGE)  # only where the kernel has them to give
        self._registered: list[int] = []
        try:
            self._fill(register, meanwhile)
        except BaseException:
            self._leave()
            raise
        self.bytes: Any = (ctypes.c_ubyte * size).from_address(self.address)

    def close(self) -> None:
        """Give it back to the kernel; nobody may look into it any more."""
        del self.bytes
        self._leave()

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """A stretch in parts that can be copied, each an offset in the pool and a length."""
        end = offset + length
        while offset < end:
            edge = min(end, (offset // PIECE + 1) * PIECE)
            yield offset, edge - offset
            offset = edge

    def _leave(self) -> None:
        for address in self._registered:
            self._unregister(address)
        self._libc.munmap(self.address, self.size)

    def _fill(self, register: Callable[[int, int], int], meanwhile: Callable[[], object]) -> None:
        """Have every page there and registered, by several threads: one clears 1 GiB in about a second."""
        pieces = list(range(0, self.size, PIECE))
        errors: list[str] = []

        def work(mine: Sequence[int]) -> None:
            for start in mine:
                address, length = self.address + start, min(PIECE, self.size - start)
                if error := self._touch(address, length):
                    errors.append(f"{self.size} bytes of RAM: {os.strerror(error)}")
                elif error := register(address, length):
                    errors.append(f"cudaHostRegister of {length} bytes: error {error}")
                else:
                    self._registered.append(address)
                    continue
                return

        count = max(1, min(THREADS, os.cpu_count() or 1))
        threads = [threading.Thread(target=work, args=(pieces[number::count],)) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            meanwhile()
        finally:  # what they write to is not given back under them
            for thread in threads:
                thread.join()
        if errors:
            raise NoPool(errors[0])

    def _touch(self, address: int, length: int) -> int:
        """The kernel's error; 0 if every page is there."""
        if not self._libc.madvise(address, length, POPULATE_WRITE):
            return 0
        error = ctypes.get_errno()
        if error == errno.EINVAL:  # an older kernel
            self._libc.memset(address, 0, length)
            return 0
        return error
