"""What goes where and what must be copied: the bookkeeping of a sleep, without a GPU (pure).

Addresses, sizes and offsets are bytes. A region is one allocation of vLLM's sleep pool, by its address and
size: an address that comes back with another size is another region.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BLOCK = 2 * 2**20
"""What one digest covers, and the granularity of CUDA's virtual memory: every allocation is a multiple."""

CHUNK = 512 * 2**20
"""What goes from engine to engine: to import and map 56 GiB took 8 ms on an H100, in chunks of 128 MiB 25 ms;
to create what 30 tensors leave over took 3."""

SLACK = 256 * 2**20
"""What a sleep gives to the driver at the least: to vLLM it is an error if the device has less free memory
after a sleep than before, whoever took it."""

WEIGHTS = "weights"
KV_CACHE = "kv_cache"

Region = tuple[int, int]
Digests = Sequence[int]


@dataclass(frozen=True)
class Span:
    """A stretch of a region."""

    offset: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Where each region lies in the pool: one after the other, nothing between."""

    offsets: Mapping[Region, int]
    size: int

    @classmethod
    def of(cls, regions: Iterable[Region]) -> Layout:
        """The layout of these regions, in their order."""
        offsets: dict[Region, int] = {}
        size = 0
        for region in regions:
            offsets[region] = size
            size += region[1]
        return cls(offsets, size)

    def holds(self, regions: Iterable[Region]) -> bool:
        """Whether it was made for exactly these regions."""
        return set(regions) == set(self.offsets)


def changed(old: Digests | None, new: Digests, size: int) -> list[Span]:
    """The stretches of a region that differ from its copy, neighbours joined; all of it without a copy."""
    if old is None or len(old) != len(new):
        return [Span(0, size)]
    spans: list[Span] = []
    for block, (before, now) in enumerate(zip(old, new, strict=True)):
        if before == now:
            continue
        offset = block * BLOCK
        if spans and spans[-1].offset + spans[-1].length == offset:
            spans[-1] = Span(spans[-1].offset, spans[-1].length + BLOCK)
        else:
            spans.append(Span(offset, BLOCK))
    return spans


def is_kept(tag: str, level: int, deferrable: Sequence[str]) -> bool:
    """Whether a sleep at `level` must bring what carries `tag` back as it was.

    `deferrable` are the tags that a wake may leave out. Up to vLLM 0.26 they are all tags there are, and
    level 2 keeps nothing; 0.33 has further ones (state of the run, graphs), which every level keeps.
    """
    return tag not in deferrable or (tag == WEIGHTS and level < 2)


def leaves(tag: str, level: int) -> bool:
    """Whether what carries `tag` gives up its VRAM at `level`; at 0 the KV cache alone does."""
    return level > 0 or tag == KV_CACHE


def wakes(tag: str, tags: Sequence[str] | None, deferrable: Sequence[str]) -> bool:
    """Whether a wake of `tags` (None: of all) brings back what carries `tag`."""
    return tags is None or tag in tags or tag not in deferrable


def whole_chunks(sizes: Sequence[int]) -> list[int]:
    """How many whole chunks each region of these sizes gets; the rest of it is memory of its own.

    Of every region some rest is left, of all of them together no less than `SLACK`.
    """
    counts = [(size - 1) // CHUNK for size in sizes]
    slack = sum(sizes) - sum(counts) * CHUNK
    for number, count in enumerate(counts):
        fewer = min(count, max(0, -((slack - SLACK) // CHUNK)))
        counts[number] -= fewer
        slack += fewer * CHUNK
    return counts
