"""Simulated GPUs: what the processes of a simulation folder say they hold, as readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.gpus import GpuFault, GpuReading
from vllm_sleep_tui.telemetry.processes import Memory


class SimulatedReader:
    """Reads the simulated GPUs of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def faults(self) -> tuple[GpuFault, ...]:
        """Simulated GPUs have none."""
        return ()

    @property
    def note(self) -> str | None:
        """Says that there are no simulated GPUs, if so."""
        return None if devices.gpus(self._folder) else f"No simulated GPU in {self._folder}."

    def read(self) -> tuple[GpuReading, ...]:
        """All simulated GPUs now."""
        held, shared = devices.allocations(self._folder), devices.chunks(self._folder)
        return tuple(_reading(gpu, held, shared) for gpu in devices.gpus(self._folder))

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        """Used bytes of one simulated GPU and its bytes by pid."""
        if all(gpu.index != index for gpu in devices.gpus(self._folder)):
            return None, None
        shared = devices.chunks(self._folder)
        processes = _processes(index, devices.allocations(self._folder), shared)
        return sum(amount or 0 for amount in processes.values()) + _of_nobody(index, shared), processes

    def close(self) -> None:
        """Nothing to let go of."""


def _processes(
    index: int, held: Sequence[devices.Allocation], shared: Sequence[devices.Chunk]
) -> dict[int, int | None]:
    """As NVML lists them: who created memory and has it still, not who was handed some."""
    created: dict[int, int] = {}
    for chunk in shared:
        if chunk.gpu == index:
            created[chunk.pid] = created.get(chunk.pid, 0) + chunk.bytes
    return {
        allocation.pid: allocation.vram[index] + created.get(allocation.pid, 0)
        for allocation in held
        if allocation.vram.get(index)
    }


def _of_nobody(index: int, shared: Sequence[devices.Chunk]) -> int:
    """Bytes of a GPU that are taken and listed for no process."""
    return sum(chunk.bytes for chunk in shared if chunk.gpu == index and chunk.pid == devices.NOBODY)


def _reading(
    gpu: devices.SimulatedGpu, held: Sequence[devices.Allocation], shared: Sequence[devices.Chunk]
) -> GpuReading:
    processes = _processes(gpu.index, held, shared)
    used = sum(amount or 0 for amount in processes.values()) + _of_nobody(gpu.index, shared)
    busy = sum(allocation.utilization for allocation in held if allocation.pid in processes)
    return GpuReading(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        used_bytes=used,
        free_bytes=max(0, gpu.total_bytes - used),
        total_bytes=gpu.total_bytes,
        utilization=min(100.0, busy),
        processes=processes,
        simulated=True,
    )


def memories(folder: Path) -> dict[int, Memory]:
    """The RAM that each process of the simulation says it holds, by pid."""
    return {held.pid: Memory(held.private_bytes, held.pinned_bytes) for held in devices.allocations(folder)}


def ram_total(folder: Path) -> int | None:
    """The simulated machine's RAM in bytes; None if the folder describes none."""
    return devices.ram_total(folder) or None
