"""Which model holds how much memory: NVML's pids and the RAM of processes, mapped onto the process tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from vllm_sleep_tui.telemetry.gpus import GpuReading
from vllm_sleep_tui.telemetry.processes import Memory, ProcessTable, command_of, user_of


class ModelMemory(msgspec.Struct, frozen=True):
    """What the processes of one model hold, in bytes; None: not known."""

    vram_by_gpu: dict[int, int] | None
    """By GPU index, 0 where it holds nothing; a GPU that is missing is not known."""
    ram_bytes: int | None
    """Private and pinned memory; file pages are not counted, since the kernel can drop them."""
    pinned_bytes: int | None


class Stranger(msgspec.Struct, frozen=True):
    """A process that holds VRAM and belongs to none of the models."""

    pid: int
    user: str
    command: str
    bytes: int | None


class Attribution(msgspec.Struct, frozen=True):
    """Memory by model and, by GPU index, of strangers; `notes` say what cannot be told apart and why."""

    models: Mapping[str, ModelMemory]
    strangers: Mapping[int, tuple[Stranger, ...]]
    notes: tuple[str, ...] = ()


def describe(pid: int) -> tuple[str, str]:
    """(user, command) of a process in words, also where it cannot be seen."""
    return user_of(pid) or "unknown", command_of(pid) or "a process that cannot be seen from here"


def trees(table: ProcessTable, roots: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The pids of each root with all below it; of a root below another, only its own root's."""
    stop = frozenset(roots.values())
    return {
        name: (root, *table.descendants(root, stop_at=stop)) for name, root in roots.items() if root in table
    }


def attribute(
    readings: Sequence[GpuReading],
    table: ProcessTable,
    roots: Mapping[str, int],
    *,
    memories: Mapping[int, Memory],
    describe: Callable[[int], tuple[str, str]] = describe,
) -> Attribution:
    """Sum VRAM and RAM over the process tree below each root pid (a model's keeper).

    `memories` is the RAM by pid; a model none of whose processes is in it holds an unknown amount. A root
    that is gone is not known: what it started may still hold memory.
    """
    pids = trees(table, roots)
    ours = {pid: name for name, tree in pids.items() for pid in tree}
    listed = {reading.index: reading.processes for reading in readings if reading.processes is not None}
    notes = [_silent_list(reading) for reading in readings if _is_silent(reading)]
    if _speaks_of_other_pids(listed.values(), table, ours):
        listed = {}
        notes.append(
            "NVML names processes outside this container, so VRAM by model is not known; "
            "with the host's pids (docker: --pid=host) it would be."
        )
    models = {
        name: _model_memory(frozenset(pids[name]), listed, memories)
        if name in pids
        else ModelMemory(None, None, None)
        for name in roots
    }
    return Attribution(models, _strangers(listed, ours, describe), tuple(notes))


def _is_silent(reading: GpuReading) -> bool:
    """Whether the device tells its memory but not who holds it, as on WSL2."""
    if reading.used_bytes is None:
        return False
    return reading.processes is None or None in reading.processes.values()


def _silent_list(reading: GpuReading) -> str:
    return (
        f"GPU {reading.index} does not tell memory by process (under WSL2 none does), "
        "so VRAM by model is not known there."
    )


def _speaks_of_other_pids(
    listed: Iterable[Mapping[int, int | None]], table: ProcessTable, ours: Mapping[int, str]
) -> bool:
    """Whether NVML's pids are the host's while we see a container's: none is ours and some are nobody's."""
    if not table.in_container:
        return False
    pids = {pid for processes in listed for pid in processes}
    return not any(pid in ours for pid in pids) and any(pid not in table for pid in pids)


def _model_memory(
    pids: frozenset[int], listed: Mapping[int, Mapping[int, int | None]], memories: Mapping[int, Memory]
) -> ModelMemory:
    vram = {index: _held(pids, processes) for index, processes in listed.items()}
    vram_by_gpu = {index: amount for index, amount in vram.items() if amount is not None}
    held = [memories[pid] for pid in pids if pid in memories]
    pinned = sum(memory.pinned_bytes for memory in held)
    private = sum(memory.private_bytes for memory in held)
    return ModelMemory(vram_by_gpu or None, private + pinned if held else None, pinned if held else None)


def _held(pids: frozenset[int], processes: Mapping[int, int | None]) -> int | None:
    """Bytes these pids hold on one GPU; None if NVML names one of them without an amount."""
    amounts = [amount for pid, amount in processes.items() if pid in pids]
    return None if None in amounts else sum(amount for amount in amounts if amount is not None)


def _strangers(
    listed: Mapping[int, Mapping[int, int | None]],
    ours: Mapping[int, str],
    describe: Callable[[int], tuple[str, str]],
) -> dict[int, tuple[Stranger, ...]]:
    return {
        index: tuple(
            Stranger(pid, *describe(pid), amount)
            for pid, amount in sorted(processes.items(), key=lambda item: -(item[1] or 0))
            if pid not in ours
        )
        for index, processes in listed.items()
    }
