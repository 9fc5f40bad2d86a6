"""RAM that the GPU copies to and from at full speed, of exactly the size asked for.

`cudaHostAlloc`, which torch uses, rounds each allocation up to a power of two and touches its pages in one
thread: 4.4 s for 8 GiB on an H100's host, where mapping, touching by several threads and registering took
1.8.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

from .mover import NoPool

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: pages come at once, and are written by nobody but the kernel."""
THREADS = 16
PAGE = 2 * 2**20
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

    The mapping is shared, as CUDA's own are: it shows as ``RssShmem``, which is what the panel reads.
    """

    def __init__(
        self, size: int, register: Callable[[int, int], int], unregister: Callable[[int], object]
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
        try:
            self._touch()
            if error := register(self.address, size):
                raise NoPool(f"cudaHostRegister of {size} bytes: error {error}")
        except BaseException:
            self._libc.munmap(self.address, size)
            raise
        self.bytes: Any = (ctypes.c_ubyte * size).from_address(self.address)

    def close(self) -> None:
        """Give it back to the kernel; nobody may look into it any more."""
        del self.bytes
        self._unregister(self.address)
        self._libc.munmap(self.address, self.size)

    def _touch(self) -> None:
        """Have every page there, several threads at once: one clears 1 GiB in about a second."""
        pages = -(-self.size // PAGE)
        count = max(1, min(THREADS, os.cpu_count() or 1, pages))
        edges = [min(self.size, pages * part // count * PAGE) for part in range(count + 1)]
        errors: list[int] = []

        def touch(start: int, end: int) -> None:
            address, length = self.address + start, end - start
            if length and self._libc.madvise(address, length, POPULATE_WRITE):
                error = ctypes.get_errno()
                if error == 22:  # EINVAL: an older kernel
                    self._libc.memset(address, 0, length)
                else:
                    errors.append(error)

        threads = [threading.Thread(target=touch, args=pair) for pair in itertools.pairwise(edges)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise NoPool(f"{self.size} bytes of RAM: {os.strerror(errors[0])}")
