"""The machine's RAM, with the limits of the container or service that this process runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from vllm_sleep_tui.telemetry.kernel import OWN_CGROUP

_UNLIMITED = 1 << 60
"""Version 1 of control groups writes "no limit" as a number near 2^63."""


class HostReading(msgspec.Struct, frozen=True):
    """RAM in bytes; None: not known."""

    available_bytes: int | None = None
    """What can be taken without swapping: page cache counts as free."""
    total_bytes: int | None = None


def host_memory(simulated: Path | None) -> HostReading:
    """RAM of this machine, or of the simulated one in that folder."""
    if simulated is not None:
        return _simulated_memory(simulated)
    machine = psutil.virtual_memory()
    group = cgroup_memory(Path(OWN_CGROUP), Path("/sys/fs/cgroup"))
    return HostReading(
        _least(machine.available, group.available_bytes),
        _least(machine.total, group.total_bytes),
    )


def _least(machine: int, group: int | None) -> int:
    return machine if group is None else min(machine, group)


def _simulated_memory(folder: Path) -> HostReading:
    from vllm_sleep_tui.telemetry.simulated import memories, ram_total

    total = ram_total(folder)
    if total is None:
        return HostReading()
    held = sum(memory.private_bytes + memory.pinned_bytes for memory in memories(folder).values())
    return HostReading(max(0, total - held), total)


def cgroup_memory(membership: Path, mount: Path) -> HostReading:
    """The tightest memory limit among a process's control groups, version 2 or 1; None where there is none.

    `membership` is a file like /proc/self/cgroup, `mount` the folder where control groups are mounted.
    """
    levels = [level for group in _groups(membership, mount) if (level := _level(group))]
    return HostReading(
        min((max(0, limit - taken) for limit, taken in levels), default=None),
        min((limit for limit, _ in levels), default=None),
    )


def _groups(membership: Path, mount: Path) -> Iterator[Path]:
    """The folders of the process's memory groups, from its own up to the mount."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = mount if number == "0" else mount / "memory"
        own = root / path.lstrip("/")
        # Inside a container the path may be the host's, while the mount shows the container's own group.
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _level(group: Path) -> tuple[int, int] | None:
    """(limit, bytes taken that cannot be dropped) of one group; None without a limit."""
    for limit_name, taken_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, taken = _number(group / limit_name), _number(group / taken_name)
        if limit is not None and taken is not None and limit < _UNLIMITED:
            return limit, taken - _droppable(group / "memory.stat", prefix)
    return None


def _number(path: Path) -> int | None:
    """The file's number; None if there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _droppable(stat: Path, prefix: str) -> int:
    """Bytes of file pages, which the kernel drops before it kills anybody."""
    wanted = {f"{prefix}active_file", f"{prefix}inactive_file"}
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(fields[1]) for fields in lines if fields[0] in wanted)
