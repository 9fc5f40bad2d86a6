"""What an engine holds on its GPUs, by itself or through one worker process a GPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.simulator.pool import CHUNK, Pool
from vllm_sleep_tui.simulator.processes import Channel
from vllm_sleep_tui.simulator.profiles import PRIVATE_BYTES, MemoryPlan

OUT_OF_MEMORY = "CUDA Error: out of memory at csrc/cumem_allocator.cpp:163"
INVALID_ARGUMENT = "CUDA Error: invalid argument at csrc/cumem_allocator.cpp:169"
SPARE_BYTES = 16 << 20
"""What even a mapping that takes all it can get leaves on the GPU."""


class WorkerDied(Exception):  # noqa: N818 - it is the worker's end, not our error
    """A worker process ended while the engine talked to it."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Bytes that one rank holds."""

    vram: int
    pinned: int
    utilization: float
    shared: int = 0
    """Of `vram`, in chunks that can be handed on, as far as they are whole."""
    stale: bool = False
    """The first chunk that the pool lends cannot be mapped."""


@dataclass(frozen=True, slots=True)
class Held:
    """How that went."""

    missing: int = 0
    """Bytes that did not fit: VRAM is then held as far as it goes."""
    created: int = 0
    """Bytes of new chunks."""


class Rank:
    """One GPU's share, held by the process that calls `hold`."""

    def __init__(self, folder: Path | None, gpu: devices.SimulatedGpu | None, title: str) -> None:
        self._folder = folder
        self._gpu = gpu
        self._title = title
        self._pool = Pool(folder, gpu, os.environ) if folder and gpu else None

    def hold(self, holding: Holding) -> Held:
        """Hold exactly that."""
        if self._folder is None or self._gpu is None or self._pool is None:
            return Held()
        created = 0
        if self._pool.mapped and not holding.shared:
            self._pool.hand_over()
        elif holding.shared > self._pool.mapped:
            _, created = self._pool.fill(holding.shared, stale=holding.stale)
        private = holding.vram - self._pool.mapped
        try:
            self._claim(self._folder, self._gpu.index, holding, private)
        except devices.OutOfMemory as error:
            if error.device == "RAM":
                return Held(holding.pinned, created)
            room = max(0, error.free_bytes - SPARE_BYTES)
            self._claim(self._folder, self._gpu.index, holding, room)
            return Held(private - room, created)
        return Held(0, created)

    def _claim(self, folder: Path, gpu: int, holding: Holding, vram: int) -> None:
        devices.claim(
            folder,
            vram={gpu: vram},
            pinned_bytes=holding.pinned,
            private_bytes=PRIVATE_BYTES,
            title=self._title,
            utilization=holding.utilization,
        )


class WorkerRank:
    """One GPU's share, held by a worker process."""

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid = pid
        self.channel = channel

    def hold(self, holding: Holding) -> Held:
        """As `Rank.hold`; raises WorkerDied."""
        self.channel.send(dataclasses.asdict(holding))
        answers = self.channel.receive()
        if answers is None:
            raise WorkerDied
        return Held(**answers[0])


def work(rank: Rank, channel: Channel) -> None:
    """A worker's life: hold what the engine says, end with the engine."""
    while (messages := channel.receive()) is not None:
        for message in messages:
            channel.send(dataclasses.asdict(rank.hold(Holding(**message))))


class Memory:
    """The memory of all ranks, which always hold the same; times and sizes are those of one."""

    def __init__(self, ranks: Sequence[Rank | WorkerRank], gpus: Sequence[int], folder: Path | None) -> None:
        self.ranks = ranks
        self._gpus = gpus
        self._folder = folder
        self._base = 0
        self._mapped: dict[str, int] = {}
        self._shared: dict[str, int] = {}
        """Of what is mapped, the pools whose memory is handed on."""
        self._pinned = 0
        self._utilization = 0.0

    @property
    def has_pinned(self) -> bool:
        """Whether the pinned pool of level 1 exists."""
        return self._pinned > 0

    def used_by_others(self) -> int:
        """Bytes of our GPUs that processes of other servers hold; what is handed on is nobody's."""
        if self._folder is None:
            return 0
        ours = {os.getpid(), *(rank.pid for rank in self.ranks if isinstance(rank, WorkerRank))}
        others = [held for held in devices.allocations(self._folder) if held.pid not in ours]
        return sum(held.vram.get(gpu, 0) for held in others for gpu in self._gpus)

    def used_on(self, gpu: int) -> int:
        """Bytes of one GPU that are taken."""
        if self._folder is None:
            return 0
        shared = sum(chunk.bytes for chunk in devices.chunks(self._folder) if chunk.gpu == gpu)
        return shared + sum(held.vram.get(gpu, 0) for held in devices.allocations(self._folder))

    @property
    def held(self) -> int:
        """Bytes of VRAM that one rank holds."""
        return self._base + sum(self._mapped.values())

    def show_work(self, utilization: float) -> None:
        """Report how busy the GPUs are, in per cent."""
        if utilization != self._utilization:
            self._utilization = utilization
            self._apply()

    def set_base(self, amount: int) -> bool:
        """Hold what never sleeps: context, graphs, buffers; False if it does not fit."""
        self._base = amount
        return self._apply().missing == 0

    def pin(self, amount: int) -> bool:
        """Grow each rank's pinned pool; False, and unchanged, if the RAM is full."""
        before, self._pinned = self._pinned, max(self._pinned, amount)
        if self._apply().missing == 0:
            return True
        self._pinned = before
        return False

    def unpin(self) -> None:
        """Give the pinned pool back; vLLM's own sleep mode never does."""
        self._pinned = 0
        self._apply()

    def map(self, tag: str, amount: int) -> bool:
        """Map a pool; False if it does not fit, and then what fits stays mapped: nothing rolls back."""
        self._mapped[tag] = amount
        missing = self._apply().missing
        self._mapped[tag] -= missing
        return missing == 0

    def map_shared(self, tag: str, amount: int, *, stale: bool) -> int | None:
        """Map a pool of memory that can be handed on, others' first: bytes that had to be made anew.

        None if it does not fit; nothing of it is mapped then. `stale`: see `Holding`.
        """
        self._mapped[tag] = self._shared[tag] = amount
        held = self._apply(stale=stale)
        if held.missing:
            self.unmap(tag)
            return None
        return held.created + amount % CHUNK

    def unmap(self, tag: str) -> None:
        """Give a pool back to the GPU, or hand it on."""
        self._mapped[tag] = self._shared[tag] = 0
        self._apply()

    def _apply(self, *, stale: bool = False) -> Held:
        shared = sum(self._shared.values())
        holding = Holding(self.held, self._pinned, self._utilization, shared, stale)
        held = [rank.hold(holding) for rank in self.ranks]
        return max(held, key=lambda each: (each.missing, each.created), default=Held())


def share(plan: MemoryPlan, tag: str) -> int:
    """Bytes of one rank's pool."""
    return plan.weights if tag == "weights" else plan.kv_cache
