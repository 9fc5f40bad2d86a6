"""CUDA's virtual memory, by the driver's own functions.

vLLM makes memory that network cards can reach (GPUDirect RDMA) whether or not anybody asks them to; to create
that after a neighbour has released it took two and a half times as long on an H100 as memory without.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY = 2
READ_WRITE = 3
ON_DEVICE = 1
"""CU_MEM_ALLOCATION_TYPE_PINNED and CU_MEM_LOCATION_TYPE_DEVICE alike."""
DESCRIPTOR = 1
"""CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR."""

NOTHING = ctypes.c_uint64(0)


class _Location(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class Vmm:
    """CUDA's memory and addresses of one device, in bytes; all raise RuntimeError with CUDA's words.

    Memory is a number that stands for one reference to it: whoever has it releases it. What is mapped stays
    until it is unmapped, with or without such a number.
    """

    def __init__(self, device: int, stream: Callable[[], int]) -> None:
        self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        self._stream = stream
        """On which memory is cleared."""
        self._location = _Location(ON_DEVICE, device)

    def make(self, size: int, *, exportable: bool) -> int:
        """Fresh memory, cleared by the driver, that can be handed to another process or not."""
        made = ctypes.c_uint64()
        wanted = _Properties(ON_DEVICE, DESCRIPTOR if exportable else 0, self._location)
        self._call("cuMemCreate", ctypes.byref(made), ctypes.c_size_t(size), ctypes.byref(wanted), NOTHING)
        return made.value

    def release(self, memory: int) -> None:
        """Give up one reference."""
        self._call("cuMemRelease", ctypes.c_uint64(memory))

    def is_plain(self, cell: int) -> bool:
        """Whether what a cell of vLLM's stands for is of this device and nothing special, but for RDMA."""
        try:
            return self._is_plain(ctypes.c_uint64.from_address(cell).value)
        except RuntimeError:
            return False

    def _is_plain(self, memory: int) -> bool:
        found = _Properties()
        self._call("cuMemGetAllocationPropertiesFromHandle", ctypes.byref(found), ctypes.c_uint64(memory))
        return (
            found.kind == ON_DEVICE
            and (found.location.kind, found.location.id) == (ON_DEVICE, self._location.id)
            and not found.flags.compression
            and not found.flags.usage
        )

    def at(self, address: int) -> int:
        """Another reference to the memory that is mapped at an address."""
        found = ctypes.c_uint64()
        self._call("cuMemRetainAllocationHandle", ctypes.byref(found), ctypes.c_void_p(address))
        return found.value

    def place(self, address: int, size: int, memory: int) -> None:
        """Map it at an address that is reserved; nobody may touch it before `allow`."""
        where, length = ctypes.c_uint64(address), ctypes.c_size_t(size)
        self._call("cuMemMap", where, length, ctypes.c_size_t(0), ctypes.c_uint64(memory), NOTHING)

    def allow(self, address: int, size: int) -> None:
        """Let the device read and write what is mapped there, in one or more pieces."""
        access = _Access(self._location, READ_WRITE)
        where, length = ctypes.c_uint64(address), ctypes.c_size_t(size)
        self._call("cuMemSetAccess", where, length, ctypes.byref(access), ctypes.c_size_t(1))

    def remove(self, address: int, size: int) -> None:
        """Unmap whole pieces."""
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def clear(self, address: int, size: int) -> None:
        """Begin to write zeros there."""
        where, length = ctypes.c_uint64(address), ctypes.c_size_t(size)
        self._call("cuMemsetD8Async", where, ctypes.c_ubyte(0), length, ctypes.c_void_p(self._stream()))

    def free(self) -> int:
        """Bytes of the whole device that nobody has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def export(self, memory: int) -> int:
        """A file descriptor by which another process can have it."""
        found = ctypes.c_int(-1)
        kind = ctypes.c_int(DESCRIPTOR)
        handle = ctypes.c_uint64(memory)
        self._call("cuMemExportToShareableHandle", ctypes.byref(found), handle, kind, NOTHING)
        os.set_inheritable(found.value, False)
        return found.value

    def adopt(self, descriptor: int) -> int:
        """The memory that a descriptor stands for, which stays open."""
        found = ctypes.c_uint64()
        kind = ctypes.c_int(DESCRIPTOR)
        self._call("cuMemImportFromShareableHandle", ctypes.byref(found), ctypes.c_void_p(descriptor), kind)
        if not self._is_plain(found.value):
            self.release(found.value)
            raise RuntimeError("the descriptor is of other memory")
        return found.value

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._cuda, name)(*arguments):
            # vLLM's own words, by which the panel knows what may be tried again.
            raise RuntimeError(
                "CUDA Error: out of memory" if error == OUT_OF_MEMORY else f"CUDA Error: {name} {error}"
            )
