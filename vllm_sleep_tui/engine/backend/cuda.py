"""The driver of a real GPU: the driver's functions for mapping, torch for digests and copies."""

from __future__ import annotations

import contextlib
import importlib
import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .chunks import Chunks, Handle, Holder
from .pinned import PinnedPool
from .plan import BLOCK, Digests, Region
from .vmm import Vmm

WORDS = BLOCK // 4
ROWS = 8
"""Blocks that are multiplied at a time: the product (32 MiB) stays in the cache of the GPU."""

Sums = Callable[[Sequence[Region], Any], Any]
"""Numbers of the blocks of regions, one after the other, by factors, see `block_digests`."""


class CudaDriver:
    """One device; every call is made by the worker's own thread, with the device current."""

    def __init__(
        self,
        map_: Callable[[Handle], object],
        unmap: Callable[[Handle], object],
        holder: Holder,
        *,
        needs_rdma: bool,
    ) -> None:
        self._map = map_
        self._unmap = unmap
        self._vmm = Vmm(torch.cuda.current_device(), lambda: int(self._clearing.cuda_stream))
        self._chunks = None if needs_rdma else Chunks(self._vmm, holder)
        self._plain: set[int] = set()
        """Addresses of what was unmapped and is of the usual kind; vLLM's own function maps the others."""
        self._copying, self._clearing = torch.cuda.Stream(), torch.cuda.Stream()
        self._seed = secrets.randbits(31)
        self._sums: Sums | None = None

    def begin(self) -> None:
        """Wait for every stream."""
        if self._chunks is not None:
            self._chunks.begin()
        torch.cuda.synchronize()

    def fetch(self, handles: Sequence[Handle]) -> None:
        """From the pool holder."""
        if self._chunks is not None:
            self._chunks.fetch([handle for handle in handles if handle[2] in self._plain])

    def map(self, handle: Handle, *, clear: bool) -> None:
        """Without RDMA, unless somebody needs it; raises RuntimeError with CUDA's words."""
        if self._chunks is None or handle[2] not in self._plain:
            self._map(handle)
        else:
            self._chunks.map(handle, clear=clear)

    def unmap(self, handle: Handle) -> None:
        """By vLLM's own function; the caller has synchronized."""
        if self._chunks is None:
            self._unmap(handle)
        else:
            if self._vmm.is_plain(handle[3]):
                self._plain.add(handle[2])
            self._chunks.unmap(handle, self._unmap)

    def hand_over(self, known: Collection[Region]) -> dict[str, float]:
        """To the pool holder."""
        if self._chunks is None:
            return {}
        self._chunks.hand_over(known)
        return self._chunks.figures

    def let_go(self) -> None:
        """Of the descriptors of chunks."""
        if self._chunks is not None:
            self._chunks.let_go()

    def digests(self, regions: Sequence[Region]) -> list[Digests]:
        """See `block_digests`; all regions are looked at before the first number is waited for."""
        factors = random_factors(self._seed, torch.device("cuda", torch.cuda.current_device()))
        numbers: list[int] = self._chosen_sums(factors)(regions, factors).cpu().tolist()
        found: list[Digests] = []
        start = 0
        for _, size in regions:
            found.append(numbers[start : start + size // BLOCK])
            start += size // BLOCK
        return found

    def pin(self, size: int) -> PinnedPool:
        """Pinned by CUDA's runtime; the way of the sums is chosen meanwhile, which may compile a kernel."""
        cudart, device = torch.cuda.cudart(), torch.cuda.current_device()
        factors = random_factors(self._seed, torch.device("cuda", device))

        def register(address: int, length: int) -> int:
            with torch.cuda.device(device):  # a thread begins with another one
                return int(cudart.cudaHostRegister(address, length, 0))

        return PinnedPool(size, register, cudart.cudaHostUnregister, lambda: self._chosen_sums(factors))

    def move(self, source: Any, offset: int, target: Any, to: int, length: int) -> None:
        """Within RAM."""
        _host(target, to, length).copy_(_host(source, offset, length))

    def save(self, address: int, pool: Any, offset: int, length: int) -> None:
        """On the side stream."""
        with torch.cuda.stream(self._copying):
            for at, part in pool.parts(offset, length):
                source = _view((address + at - offset, part), "|u1", 1)
                _host(pool, at, part).copy_(source, non_blocking=True)

    def restore(self, pool: Any, offset: int, address: int, length: int) -> None:
        """On the side stream, so that the next region can be mapped meanwhile."""
        with torch.cuda.stream(self._copying):
            for at, part in pool.parts(offset, length):
                target = _view((address + at - offset, part), "|u1", 1)
                target.copy_(_host(pool, at, part), non_blocking=True)

    def finish(self) -> None:
        """Wait for both side streams."""
        self._copying.synchronize()
        self._clearing.synchronize()

    def _chosen_sums(self, factors: Any) -> Sums:
        """Chosen once in the life of the process, by two blocks of random content."""
        if self._sums is None:
            content = factors * factors
            at = content.data_ptr()
            self._sums = sums_like_torch([(at, BLOCK), (at + BLOCK, BLOCK)], factors)
        return self._sums

    def tidy(self) -> None:
        """Of the caching allocator; the sleep pool is not its."""
        torch.cuda.empty_cache()
        if self._chunks is not None:
            self._chunks.make_up()


def random_factors(seed: int, device: Any) -> Any:
    """A factor below 2**32 for each word of a block, the same ones for the same seed."""
    generator = torch.Generator(device=device)  # its own: vLLM's answers hang on the global one
    generator.manual_seed(seed)
    return torch.randint(0, 2**32, (WORDS,), dtype=torch.int64, device=device, generator=generator)


def sums_like_torch(regions: Sequence[Region], factors: Any) -> Sums:
    """Our kernel if it says of these regions what torch says, else torch's operations."""
    with contextlib.suppress(Exception):  # whatever Triton, or the compiler that it needs, may lack
        if torch.equal(sums_by_kernel(regions, factors), sums_by_torch(regions, factors)):
            return sums_by_kernel
    return sums_by_torch


def sums_by_kernel(regions: Sequence[Region], factors: Any) -> Any:
    """All blocks in one launch, counted from the first region."""
    block_sums = importlib.import_module(".kernel", __package__).block_sums
    first = regions[0][0]
    blocks = [(address + at - first) // 4 for address, size in regions for at in range(0, size, BLOCK)]
    return block_sums(_view(regions[0], "<i4", 4), blocks, factors)


def sums_by_torch(regions: Sequence[Region], factors: Any) -> Any:
    """Region by region."""
    scratch = torch.empty((ROWS, WORDS), dtype=torch.int64, device=factors.device)
    return torch.cat([block_digests(_view(region, "<i4", 4), factors, scratch) for region in regions])


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
