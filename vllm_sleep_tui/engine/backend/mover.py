"""Takes a model's memory off the GPU and brings it back.

Weights hardly ever change, so their copy in RAM is kept over wakes, and a sleep copies only the blocks whose
digest differs from that of the copy. What has no copy to bring back (the KV cache) is given up first, so that
the driver cleans it while the rest is looked at; at a wake the copies run while the next region is mapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from .chunks import Handle
from .plan import Digests, Layout, Region, changed, is_kept, leaves, wakes

KEEP_SECONDS = 10.0
"""How long a wish for level 0 holds: whoever told of it may have died before the sleep."""


class NoPool(RuntimeError):  # noqa: N818 - nothing has been done yet: the caller sleeps another way
    """The RAM for the copies is not to be had; no memory was touched."""


class Allocation(Protocol):
    """One allocation of vLLM's sleep pool, as vLLM describes it (`AllocationData`)."""

    handle: Handle
    tag: str


class Sleeping(NamedTuple):
    """A region without memory: whose it was, and whether the pool holds what was in it."""

    allocation: Allocation
    saved: bool


class Pool(Protocol):
    """RAM that the GPU copies to and from."""

    size: int

    def close(self) -> None:
        """Give it back."""


class Driver(Protocol):
    """What needs a GPU."""

    def begin(self) -> None:
        """A sleep or a wake begins: wait until the GPU has nothing to do."""

    def fetch(self, handles: Sequence[Handle]) -> None:
        """These regions will be mapped: have ready what other engines left for them."""

    def map(self, handle: Handle, *, clear: bool) -> None:
        """Give a region its memory, and begin to clear what was another's; RuntimeError if there is none.

        Without `clear` all of it is overwritten by a copy that begins now.
        """

    def unmap(self, handle: Handle) -> None:
        """Take a region's memory away; its address stays reserved."""

    def hand_over(self, known: Collection[Region]) -> dict[str, float]:
        """The sleep or wake ends: leave to other engines what they can use. What was done, in bytes by name.

        `known` are all regions that vLLM has.
        """

    def let_go(self) -> None:
        """All regions hold memory, and vLLM's own functions take it away from now on."""

    def digests(self, regions: Sequence[Region]) -> list[Digests]:
        """A number for each block of each region: other content gives another number."""

    def pin(self, size: int) -> Pool:
        """A pool of exactly this size; raises NoPool."""

    def move(self, source: Pool, offset: int, target: Pool, to: int, length: int) -> None:
        """Copy between two pools."""

    def save(self, address: int, pool: Pool, offset: int, length: int) -> None:
        """Begin a copy from the GPU."""

    def restore(self, pool: Pool, offset: int, address: int, length: int) -> None:
        """Begin a copy to the GPU, beside whatever else is done."""

    def finish(self) -> None:
        """Wait for all that was begun."""

    def tidy(self) -> None:
        """A sleep ends: give what torch holds for later to the driver, and more where others took much."""


class Mover:
    """The memory of one worker; `allocations` are vLLM's own, by address."""

    def __init__(
        self, allocations: Mapping[int, Allocation], driver: Driver, deferrable: Sequence[str]
    ) -> None:
        self._allocations = allocations
        self._driver = driver
        self._deferrable = deferrable
        self._asleep: dict[Region, Sleeping] = {}
        """Regions without memory."""
        self._pool: Pool | None = None
        self._layout = Layout.of(())
        self._digests: dict[Region, Digests] = {}
        """Of the copies in the pool."""
        self.level: int | None = None
        """The level it sleeps at; None while anything but a part of it is awake."""
        self._keeps_weights_until = 0.0
        self.last: dict[str, float] = {}
        """Bytes and seconds of the last sleep or wake."""

    @property
    def pool_bytes(self) -> int:
        """RAM held for the copies."""
        return self._pool.size if self._pool else 0

    def keep_weights(self, keep: bool = True) -> None:
        """Let the sleep that comes now, not one that comes later, go to level 0, whatever vLLM calls it."""
        self._keeps_weights_until = time.monotonic() + KEEP_SECONDS if keep else 0.0

    def sleep(self, level: int) -> tuple[int, int]:
        """Sleep at `level`, also from level 0 to 1 or 2; bytes of VRAM given up, and of them kept in RAM.

        Raises NoPool with everything as it was.
        """
        if time.monotonic() < self._keeps_weights_until:
            level = 0
        self._keeps_weights_until = 0.0
        steps = _Steps()
        self._driver.begin()
        leaving = [r for r in self._awake() if leaves(self._tag(r), level)]
        kept = [r for r in leaving if is_kept(self._tag(r), level, self._deferrable)]
        self._make_pool(kept)
        steps.take("pool")
        lost = [region for region in leaving if region not in set(kept)]
        self._give_up(lost, saved=False)
        steps.take("give up")
        copied = self._save(kept, steps)
        self._give_up(kept, saved=True)
        steps.take("unmap")
        handed = self._driver.hand_over(self._regions())
        steps.take("hand over")
        if level == 2 and not self._saved():
            self._drop_pool()
        self._driver.tidy()
        steps.take("tidy")
        if leaving or self.level is None:  # a model without a KV cache sleeps at level 0 all the same
            self.level = level
        freed, backed = sum(size for _, size in leaving), sum(size for _, size in kept)
        moved = {"freed_bytes": freed, "kept_bytes": backed, "copied_bytes": copied}
        self.last = {**moved, **handed, **steps.seconds}
        return freed, backed

    def wake(self, tags: Sequence[str] | None) -> None:
        """Bring back what `tags` name, all of it or nothing.

        Raises RuntimeError without VRAM, with everything as it was, and may be asked again.
        """
        steps = _Steps()
        self._keeps_weights_until = 0.0
        self._driver.begin()
        self._awake()
        chosen = [region for region in self._asleep if wakes(self._tag(region), tags, self._deferrable)]
        chosen.sort(key=lambda region: not self._asleep[region].saved)  # the copies first: they take longest
        self._driver.fetch([self._handle(region) for region in chosen if not self._asleep[region].saved])
        steps.take("fetch")
        mapped: dict[Region, Sleeping] = {}
        try:
            for region in chosen:
                saved = self._asleep[region].saved
                self._driver.map(self._handle(region), clear=not saved)
                mapped[region] = self._asleep.pop(region)
                if saved:
                    assert self._pool is not None
                    self._driver.restore(self._pool, self._layout.offsets[region], *region)
            steps.take("map")
            self._driver.finish()
            steps.take("copy")
        except RuntimeError:
            self._undo(mapped)
            raise
        handed = self._driver.hand_over(self._regions())
        steps.take("hand over")
        self.level = None if not self._asleep else self.level
        self.last = {"mapped_bytes": sum(size for _, size in chosen), **handed, **steps.seconds}

    def _undo(self, mapped: Mapping[Region, Sleeping]) -> None:
        """Part of a wake: the copies in the pool are still what was copied."""
        self._driver.finish()
        for region, sleeping in mapped.items():
            self._driver.unmap(self._handle(region))
            self._asleep[region] = sleeping
        self._driver.hand_over(self._regions())

    def give_up(self, tags: Sequence[str]) -> int:
        """Give up what `tags` name without a copy, while the rest stays; bytes given up."""
        self._driver.begin()
        lost = [region for region in self._awake() if self._tag(region) in tags]
        self._give_up(lost, saved=False)
        self._driver.hand_over(self._regions())
        self.level = 0 if lost else self.level
        return sum(size for _, size in lost)

    def let_go(self) -> None:
        """Leave it to vLLM's own sleep mode for good, while all of it is awake."""
        self._driver.let_go()
        self._drop_pool()

    def _awake(self) -> list[Region]:
        """The regions that hold memory; what vLLM freed meanwhile is forgotten."""
        known = self._regions()
        self._asleep = {
            region: sleeping
            for region, sleeping in self._asleep.items()
            if known.get(region) is sleeping.allocation
        }
        return [region for region in known if region not in self._asleep]

    def _regions(self) -> dict[Region, Allocation]:
        return {(address, found.handle[1]): found for address, found in self._allocations.items()}

    def _saved(self) -> list[Region]:
        return [region for region, sleeping in self._asleep.items() if sleeping.saved]

    def _handle(self, region: Region) -> Handle:
        return self._allocations[region[0]].handle

    def _tag(self, region: Region) -> str:
        return self._allocations[region[0]].tag

    def _give_up(self, regions: Iterable[Region], *, saved: bool) -> None:
        for region in regions:
            self._driver.unmap(self._handle(region))
            self._asleep[region] = Sleeping(self._allocations[region[0]], saved)

    def _make_pool(self, kept: Sequence[Region]) -> None:
        """Have a pool of just the size of what is kept, with the copies of what sleeps in it already."""
        there = self._saved()
        wanted = [*there, *kept]
        if not kept or (self._pool is not None and self._layout.holds(wanted)):
            return
        old, layout = self._pool, self._layout
        if old is not None and not there:
            self._drop_pool()  # or both would be held at once
            old = None
        fresh, self._layout = self._driver.pin(sum(size for _, size in wanted)), Layout.of(wanted)
        if old is not None:
            for region in there:
                self._driver.move(old, layout.offsets[region], fresh, self._layout.offsets[region], region[1])
            old.close()
        self._pool = fresh
        self._digests = {region: self._digests[region] for region in there}

    def _save(self, kept: Sequence[Region], steps: _Steps) -> int:
        """Bring the copies of these regions up to date; bytes that had to be copied."""
        if not kept:
            return 0
        assert self._pool is not None
        fresh = dict(zip(kept, self._driver.digests(kept), strict=True))
        steps.take("digest")
        copied = 0
        for region, new in fresh.items():
            for span in changed(self._digests.pop(region, None), new, region[1]):
                at = self._layout.offsets[region] + span.offset
                self._driver.save(region[0] + span.offset, self._pool, at, span.length)
                copied += span.length
        self._driver.finish()
        self._digests |= fresh  # not before the copies are there: a copy that fails is made again
        steps.take("copy")
        return copied

    def _drop_pool(self) -> None:
        pool, self._pool = self._pool, None
        self._layout, self._digests = Layout.of(()), {}
        if pool is not None:
            pool.close()


class _Steps:
    """Seconds of each step of an operation, by name."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._at = clock()
        self.seconds: dict[str, float] = {}

    def take(self, name: str) -> None:
        """The step that ends now."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._at
        self._at = now
