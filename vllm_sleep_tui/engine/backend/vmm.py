"""CUDA's virtual memory, by the driver's own functions.

vLLM makes memory that network cards can reach (GPUDirect RDMA) whether or not anybody asks them to; to create
that after a neighbour has released it took two and a half times as long on an H100 as memory without.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .mover import Handle

OUT_OF_MEMORY = 2
READ_WRITE = 3


class _Location(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class Properties(ctypes.Structure):
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
    """Creates and maps what vLLM's handles describe: device, size, address, the cell with CUDA's handle."""

    def __init__(self) -> None:
        self._cuda: Any = ctypes.CDLL("libcuda.so.1")

    def properties(self, handle: Handle) -> Properties | None:
        """Those of mapped memory; None if the cell holds no handle of this device."""
        found = Properties()
        value = ctypes.c_uint64.from_address(handle[3]).value
        ask = self._cuda.cuMemGetAllocationPropertiesFromHandle
        error = ask(ctypes.byref(found), ctypes.c_uint64(value))
        return found if not error and found.location.id == handle[0] else None

    def map(self, handle: Handle, like: Properties) -> None:
        """Give the address memory like it had, without RDMA; raises RuntimeError and leaves nothing."""
        device, size, address, cell = handle
        wanted = Properties.from_buffer_copy(like)
        wanted.flags.rdma = 0
        made = ctypes.c_uint64()
        self._check(
            self._cuda.cuMemCreate(
                ctypes.byref(made), ctypes.c_size_t(size), ctypes.byref(wanted), ctypes.c_uint64(0)
            )
        )
        where, length = ctypes.c_uint64(address), ctypes.c_size_t(size)
        try:
            self._check(self._cuda.cuMemMap(where, length, ctypes.c_size_t(0), made, ctypes.c_uint64(0)))
            access = _Access(_Location(wanted.location.kind, device), READ_WRITE)
            try:
                self._check(
                    self._cuda.cuMemSetAccess(where, length, ctypes.byref(access), ctypes.c_size_t(1))
                )
            except RuntimeError:
                self._cuda.cuMemUnmap(where, length)
                raise
        except RuntimeError:
            self._cuda.cuMemRelease(made)
            raise
        ctypes.c_uint64.from_address(cell).value = made.value

    @staticmethod
    def _check(error: int) -> None:
        if error:
            # vLLM's own words, by which the panel knows what may be tried again.
            raise RuntimeError(
                "CUDA Error: out of memory" if error == OUT_OF_MEMORY else f"CUDA Error: {error}"
            )
