"""The processes behind the memory: our servers' trees, and whoever else holds VRAM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_sleep_tui.fleet.snapshot import HeldProcess
from vllm_sleep_tui.telemetry.attribution import describe, trees
from vllm_sleep_tui.telemetry.processes import Memory, ProcessTable, memory
from vllm_sleep_tui.telemetry.sampler import Sample


def held_processes(
    sample: Sample, roots: Mapping[str, int], simulated: Path | None
) -> tuple[HeldProcess, ...]:
    """Every process below the roots, parents first, then strangers with VRAM; reads /proc (blocks for ms)."""
    table = ProcessTable.read()
    owners = {pid: name for name, tree in trees(table, roots).items() for pid in tree}
    vram: dict[int, dict[str, int | None]] = {}
    for reading in sample.gpus:
        for pid, amount in (reading.processes or {}).items():
            vram.setdefault(pid, {})[str(reading.index)] = amount
    simulated_memory = _simulated(simulated)
    pids = [*owners, *(pid for pid in vram if pid not in owners)]
    return tuple(_held(table, pid, owners, vram.get(pid, {}), simulated_memory) for pid in pids)


def _simulated(folder: Path | None) -> Mapping[int, Memory]:
    if folder is None:
        return {}
    from vllm_sleep_tui.telemetry.simulated import memories

    return memories(folder)


def _held(
    table: ProcessTable,
    pid: int,
    owners: Mapping[int, str],
    vram: dict[str, int | None],
    simulated_memory: Mapping[int, Memory],
) -> HeldProcess:
    user, command = describe(pid)
    owner, above = owners.get(pid), table.parents.get(pid)
    ram = simulated_memory.get(pid) or memory(pid)
    return HeldProcess(
        pid=pid,
        parent=above if owner is not None and owners.get(above or 0) == owner else None,
        model=owner,
        user=user,
        command=command,
        vram_by_gpu=vram,
        ram_bytes=None if ram is None else ram.private_bytes + ram.pinned_bytes,
    )
