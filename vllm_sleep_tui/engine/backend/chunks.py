"""Memory of regions in chunks that one engine hands to the next, so that the driver need not clear it.

A region gets as many whole chunks as go into it, and what is left over as memory of its own. vLLM knows a
region by one cell with one of CUDA's handles, unmaps all of it and releases that handle: so the cell holds
one piece's, and the handles of the others are released as soon as they are mapped, for mapped memory stays.

A chunk can be exported by the process that created it and by no other (CUDA refuses it), so whoever has one
of another's keeps its descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from .plan import CHUNK, SLACK, whole_chunks

FREED_SECONDS = 0.3
"""For the driver to notice that the holder has given memory up."""

Handle = tuple[int, int, int, Any]
"""Device, size, address, and the address of the cell with CUDA's handle."""


class Memory(Protocol):
    """What of `Vmm` is needed, for one device; memory is a number that stands for one reference to it."""

    def make(self, size: int, *, exportable: bool) -> int:
        """Fresh memory; raises RuntimeError with "out of memory"."""

    def adopt(self, descriptor: int) -> int:
        """The memory of a descriptor, which stays open; RuntimeError if it is none of this device."""

    def release(self, memory: int) -> None:
        """Give up one reference."""

    def place(self, address: int, size: int, memory: int) -> None:
        """Map it; raises RuntimeError if it is smaller."""

    def allow(self, address: int, size: int) -> None:
        """Let the device use what is mapped there."""

    def remove(self, address: int, size: int) -> None:
        """Unmap whole pieces."""

    def at(self, address: int) -> int:
        """Another reference to what is mapped at an address; raises RuntimeError."""

    def export(self, memory: int) -> int:
        """A descriptor of it; raises RuntimeError."""

    def clear(self, address: int, size: int) -> None:
        """Begin to write zeros there."""

    def free(self) -> int:
        """Bytes of the whole device that nobody has."""


class Holder(Protocol):
    """See holder.py; nothing raises."""

    def begin(self) -> bool:
        """A sleep or a wake begins; whether there is a holder."""

    def take(self, size: int, count: int) -> list[int]:
        """At most so many descriptors of chunks."""

    def give(self, size: int, descriptors: Sequence[int]) -> int:
        """Hand over chunks; how many are kept."""

    def note_lent(self, size: int) -> None:
        """The bytes of others' chunks that are mapped here."""

    def shrink(self) -> bool:
        """Have all that is free given up; whether there was any."""


class Chunks:
    """The regions of one device whose memory comes in chunks."""

    def __init__(self, memory: Memory, holder: Holder) -> None:
        self._memory = memory
        self._holder = holder
        self._counts: dict[tuple[int, int], int] = {}
        """Whole chunks of each region, by address and size."""
        self._mapped: dict[tuple[int, int], list[int | None]] = {}
        """Descriptors of the chunks that are mapped now, in their order, by region; None: created here."""
        self._stock: list[int] = []
        """Descriptors of chunks that were taken and are not placed yet."""
        self._leaving: list[int] = []
        """Descriptors of chunks that are not mapped any more."""
        self._has_holder = False
        self._free = 0
        """Of the device when the sleep or wake began."""
        self.figures: dict[str, float] = {}
        """Bytes of the sleep or wake that goes on: taken from the pool, created, given to it."""

    def begin(self) -> None:
        """A sleep or a wake begins."""
        self.figures = {"taken_bytes": 0.0, "created_bytes": 0.0, "given_bytes": 0.0}
        self._counts = {}
        self._free = self._memory.free()
        self._has_holder = self._holder.begin()

    def fetch(self, handles: Sequence[Handle]) -> None:
        """Take what there is for these regions, which are mapped next; any other is mapped in one piece."""
        if not self._has_holder:
            return
        regions = [(address, size) for _, size, address, _ in handles]
        counts = whole_chunks([size for _, size in regions])
        self._counts = dict(zip(regions, counts, strict=True))
        self._stock += self._holder.take(CHUNK, sum(counts))

    def map(self, handle: Handle, *, clear: bool) -> None:
        """Give a region its memory, and begin to clear what was another's unless it is overwritten anyway.

        Raises RuntimeError and leaves nothing.
        """
        _, size, address, cell = handle
        edge = address + self._counts.get((address, size), 0) * CHUNK
        placed: list[int | None] = []
        first, end = 0, address
        try:
            while end < address + size:
                length = CHUNK if end < edge else address + size - end
                memory, descriptor = self._piece(length, is_chunk=end < edge)
                try:
                    self._memory.place(end, length, memory)
                except RuntimeError:
                    self._memory.release(memory)
                    if descriptor is None:
                        raise
                    os.close(descriptor)  # it is shorter than whoever gave it said
                    continue
                if first:
                    self._memory.release(memory)
                first = first or memory
                if end < edge:
                    placed.append(descriptor)
                end += length
            self._memory.allow(address, size)
            taken = sum(CHUNK for descriptor in placed if descriptor is not None)
            if taken and clear:
                self._memory.clear(address, edge - address)
        except RuntimeError:
            if end > address:
                self._memory.remove(address, end - address)
                self._memory.release(first)
            self._leaving += [descriptor for descriptor in placed if descriptor is not None]
            raise
        ctypes.c_uint64.from_address(cell).value = first
        self._mapped[address, size] = placed
        self.figures["taken_bytes"] += taken
        self.figures["created_bytes"] += size - taken

    def unmap(self, handle: Handle, unmap: Callable[[Handle], object]) -> None:
        """Unmap a region by vLLM's own function, with its chunks ready for the next engine."""
        _, size, address, _ = handle
        for number, descriptor in enumerate(self._mapped.pop((address, size), [])):
            if descriptor is None and self._has_holder:
                with contextlib.suppress(RuntimeError):  # then the driver gets it
                    self._leaving.append(self._exported(address + number * CHUNK))
            elif descriptor is not None:
                self._leaving.append(descriptor)
        unmap(handle)

    def hand_over(self, known: Collection[tuple[int, int]]) -> None:
        """The sleep or wake has ended: what is not mapped goes to the pool, and what is is written down.

        `known` are vLLM's regions by address and size: it may have freed some meanwhile.
        """
        self._leaving += self._stock
        for region in self._mapped.keys() - set(known):
            self._leaving += [descriptor for descriptor in self._mapped.pop(region) if descriptor is not None]
        lent = [
            descriptor for chunks in self._mapped.values() for descriptor in chunks if descriptor is not None
        ]
        self._holder.note_lent(len(lent) * CHUNK)  # before the next engine has what is not mapped here now
        self.figures["given_bytes"] += self._holder.give(CHUNK, self._leaving) * CHUNK
        self._stock, self._leaving = [], []

    def make_up(self) -> None:
        """A sleep has ended: have the pool give up what it has if a neighbour took what was to be free.

        vLLM fails a sleep after which the device has less free memory than before, whoever took it.
        """
        if self._memory.free() < self._free + SLACK // 2 and self._holder.shrink():
            until = time.monotonic() + FREED_SECONDS
            while self._memory.free() < self._free and time.monotonic() < until:
                time.sleep(0.01)

    def let_go(self) -> None:
        """Leave the regions to vLLM's own functions: what those unmap must not live on by our descriptors."""
        for region in list(self._mapped):
            for descriptor in self._mapped.pop(region):
                if descriptor is not None:
                    os.close(descriptor)
        self._holder.note_lent(0)

    def _exported(self, address: int) -> int:
        """A descriptor of a chunk that was created here."""
        memory = self._memory.at(address)
        try:
            return self._memory.export(memory)
        finally:
            self._memory.release(memory)

    def _piece(self, size: int, *, is_chunk: bool) -> tuple[int, int | None]:
        """Memory of this size, with its descriptor if it was another's; raises RuntimeError."""
        while is_chunk and self._stock:
            descriptor = self._stock.pop()
            try:
                return self._memory.adopt(descriptor), descriptor
            except RuntimeError:
                os.close(descriptor)  # stale, or of another device
        try:
            return self._memory.make(size, exportable=is_chunk), None
        except RuntimeError:
            if not self._holder.shrink():
                raise
        return self._make_soon(size, exportable=is_chunk), None

    def _make_soon(self, size: int, *, exportable: bool) -> int:
        """Fresh memory, as soon as the driver has noticed that the pool gave some up; raises RuntimeError."""
        until = time.monotonic() + FREED_SECONDS
        while True:
            try:
                return self._memory.make(size, exportable=exportable)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
