"""What an engine holds on its GPUs, by itself or through one worker process a GPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sleep_tui.simulator import devices
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


class Rank:
    """One GPU's share, held by the process that calls `hold`."""

    def __init__(self, folder: Path | None, gpu: int | None, title: str) -> None:
        self._folder = folder
        self._gpu = gpu
        self._title = title

    def hold(self, holding: Holding) -> int:
        """Hold exactly that; the missing bytes if it does not fit: VRAM is then held as far as it goes."""
        if self._folder is None or self._gpu is None:
            return 0
        try:
            self._claim(self._folder, self._gpu, holding)
        except devices.OutOfMemory as error:
            if error.device == "RAM":
                return holding.pinned
            room = max(0, error.free_bytes - SPARE_BYTES)
            self._claim(self._folder, self._gpu, Holding(room, holding.pinned, holding.utilization))
            return holding.vram - room
        return 0

    def _claim(self, folder: Path, gpu: int, holding: Holding) -> None:
        devices.claim(
            folder,
            vram={gpu: holding.vram},
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

    def hold(self, holding: Holding) -> int:
        """As `Rank.hold`; raises WorkerDied."""
        self.channel.send(dataclasses.asdict(holding))
        answers = self.channel.receive()
        if answers is None:
            raise WorkerDied
        return int(answers[0]["missing"])


def work(rank: Rank, channel: Channel) -> None:
    """A worker's life: hold what the engine says, end with the engine."""
    while (messages := channel.receive()) is not None:
        for message in messages:
            channel.send({"missing": rank.hold(Holding(**message))})


class Memory:
    """The memory of all ranks, which always hold the same; times and sizes are those of one."""

    def __init__(self, ranks: Sequence[Rank | WorkerRank], gpus: Sequence[int], folder: Path | None) -> None:
        self.ranks = ranks
        self._gpus = gpus
        self._folder = folder
        self._base = 0
        self._mapped: dict[str, int] = {}
        self._pinned = 0
        self._utilization = 0.0

    @property
    def has_pinned(self) -> bool:
        """Whether the pinned pool of level 1 exists."""
        return self._pinned > 0

    def used_by_others(self) -> int:
        """Bytes of our GPUs that processes of other servers hold."""
        if self._folder is None:
            return 0
        ours = {os.getpid(), *(rank.pid for rank in self.ranks if isinstance(rank, WorkerRank))}
        others = [held for held in devices.allocations(self._folder) if held.pid not in ours]
        return sum(held.vram.get(gpu, 0) for held in others for gpu in self._gpus)

    def used_on(self, gpu: int) -> int:
        """Bytes of one GPU that anybody holds."""
        if self._folder is None:
            return 0
        return sum(held.vram.get(gpu, 0) for held in devices.allocations(self._folder))

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
        return self._apply() == 0

    def pin(self, amount: int) -> bool:
        """Grow each rank's pinned pool; False, and unchanged, if the RAM is full."""
        before, self._pinned = self._pinned, max(self._pinned, amount)
        if self._apply() == 0:
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
        missing = self._apply()
        self._mapped[tag] -= missing
        return missing == 0

    def unmap(self, tag: str) -> None:
        """Give a pool back to the GPU."""
        self._mapped[tag] = 0
        self._apply()

    def _apply(self) -> int:
        holding = Holding(self.held, self._pinned, self._utilization)
        return max([rank.hold(holding) for rank in self.ranks], default=0)


def share(plan: MemoryPlan, tag: str) -> int:
    """Bytes of one rank's pool."""
    return plan.weights if tag == "weights" else plan.kv_cache
