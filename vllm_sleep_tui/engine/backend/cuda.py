"""The driver of a real GPU: the driver's functions for mapping, torch for digests and copies."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .mover import Handle
from .pinned import PinnedPool
from .plan import BLOCK, Digests, Region
from .vmm import Properties, Vmm

WORDS = BLOCK // 4
ROWS = 8
"""Blocks that are multiplied at a time: the product (32 MiB) stays in the cache of the GPU."""


class CudaDriver:
    """One device; every call is made by the worker's own thread, with the device current."""

    def __init__(
        self, map_: Callable[[Handle], object], unmap: Callable[[Handle], object], *, needs_rdma: bool
    ) -> None:
        self._map = map_
        self._unmap = unmap
        self._vmm = None if needs_rdma else Vmm()
        self._properties: dict[int, Properties] = {}
        """Of what was unmapped, by address; vLLM's own function maps what is not in it."""
        self._stream: Any = None
        self._seed = secrets.randbits(31)

    def synchronize(self) -> None:
        """Wait for every stream."""
        torch.cuda.synchronize()

    def map(self, handle: Handle) -> None:
        """As it was, without RDMA; raises RuntimeError with CUDA's words."""
        like = self._properties.get(handle[2])
        if self._vmm is None or like is None:
            self._map(handle)
        else:
            self._vmm.map(handle, like)

    def unmap(self, handle: Handle) -> None:
        """By vLLM's own function; the caller has synchronized."""
        if self._vmm is not None and (found := self._vmm.properties(handle)) is not None:
            self._properties[handle[2]] = found
        self._unmap(handle)

    def digests(self, regions: Sequence[Region]) -> list[Digests]:
        """See `block_digests`; all regions are looked at before the first number is waited for."""
        device = torch.device("cuda", torch.cuda.current_device())
        factors = random_factors(self._seed, device)
        scratch = torch.empty((ROWS, WORDS), dtype=torch.int64, device=device)
        parts = [block_digests(_view(region, "<i4", 4), factors, scratch) for region in regions]
        numbers: list[int] = torch.cat(parts).cpu().tolist()
        found: list[Digests] = []
        start = 0
        for part in parts:
            found.append(numbers[start : start + len(part)])
            start += len(part)
        return found

    def pin(self, size: int) -> PinnedPool:
        """Pinned by CUDA's runtime."""
        cudart = torch.cuda.cudart()
        return PinnedPool(
            size,
            lambda address, length: int(cudart.cudaHostRegister(address, length, 0)),
            cudart.cudaHostUnregister,
        )

    def move(self, source: Any, offset: int, target: Any, to: int, length: int) -> None:
        """Within RAM."""
        _host(target, to, length).copy_(_host(source, offset, length))

    def save(self, address: int, pool: Any, offset: int, length: int) -> None:
        """On the side stream."""
        with torch.cuda.stream(self._side()):
            _host(pool, offset, length).copy_(_view((address, length), "|u1", 1), non_blocking=True)

    def restore(self, pool: Any, offset: int, address: int, length: int) -> None:
        """On the side stream, so that the next region can be mapped meanwhile."""
        with torch.cuda.stream(self._side()):
            _view((address, length), "|u1", 1).copy_(_host(pool, offset, length), non_blocking=True)

    def finish(self) -> None:
        """Wait for the side stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def tidy(self) -> None:
        """Of the caching allocator; the sleep pool is not its."""
        torch.cuda.empty_cache()

    def _side(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream


def random_factors(seed: int, device: Any) -> Any:
    """A factor below 2**32 for each word of a block, the same ones for the same seed."""
    generator = torch.Generator(device=device)  # its own: vLLM's answers hang on the global one
    generator.manual_seed(seed)
    return torch.randint(0, 2**32, (WORDS,), dtype=torch.int64, device=device, generator=generator)


def block_digests(words: Any, factors: Any, scratch: Any) -> Any:
    """One 64-bit number for each block: the sum of its 32-bit words, each times its random factor, mod 2**64.

    Two contents that differ give the same number for one choice of factors in 2**32 at the most, whatever the
    difference: with every factor but one fixed, the products of that one, (less than 2**32) times (less than
    2**32), are all different mod 2**64. So changes cannot cancel out, neither twice the same nor two that
    change places.
    """
    blocks = words.view(-1, WORDS)
    sums = torch.empty(len(blocks), dtype=torch.int64, device=words.device)
    for start in range(0, len(blocks), ROWS):
        part = blocks[start : start + ROWS]
        product = scratch[: len(part)]
        torch.mul(part, factors, out=product)
        torch.sum(product, dim=1, out=sums[start : start + len(part)])
    return sums


def _view(region: Region, kind: str, width: int) -> Any:
    """A tensor over memory that torch did not allocate."""

    class Described:
        __cuda_array_interface__ = {  # noqa: RUF012 - the protocol's name and form
            "shape": (region[1] // width,),
            "typestr": kind,
            "data": (region[0], False),
            "version": 3,
        }

    return torch.as_tensor(Described(), device=torch.device("cuda", torch.cuda.current_device()))


def _host(pool: Any, offset: int, length: int) -> Any:
    return torch.frombuffer(pool.bytes, dtype=torch.uint8, count=length, offset=offset)
