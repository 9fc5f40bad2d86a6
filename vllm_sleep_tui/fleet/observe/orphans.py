"""What is left of servers of ours that nobody looks after: found, named, ended on request.

Only this user's processes, only those of a launch of ours; a process is ended by pid and start time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.files import Unchanged, path_of
from vllm_sleep_tui.fleet.keeper_client import KeeperStatus, read_status
from vllm_sleep_tui.fleet.observe.discovery import launch_of
from vllm_sleep_tui.fleet.pool import Pool
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record, read_record
from vllm_sleep_tui.telemetry.kernel import open_files
from vllm_sleep_tui.telemetry.processes import (
    ProcessId,
    ProcessTable,
    command_of,
    command_words,
    is_alive,
    memory,
    signal_process,
)
from vllm_sleep_tui.units import GIB, gib

KIND_SECONDS = 15.0
"""For a keeper to stop its server; a killed engine frees tens of GiB within this too."""
END_SECONDS = 25.0
NOTED_BYTES = GIB // 10
"""Less than this that orphans hold is not told."""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """A process of a server of ours that nobody looks after."""

    process: ProcessId
    launch: str
    command: str
    why: str
    ram_bytes: int
    """What it holds, pinned memory included: NVML does not show that of a sleeper."""
    is_keeper: bool = False


def find_orphans(state_dir: Path) -> tuple[Orphan, ...]:
    """Processes of this user whose keeper is gone, or whose keeper no record or config speaks for."""
    table = ProcessTable.read()
    mine = [pid for pid in table.parents if is_mine(pid)]
    launches = {pid: launch for pid in mine if (launch := launch_of(pid))}
    keepers = {pid: launch for pid, launch in launches.items() if is_keeper(pid)}
    orphans: dict[int, Orphan] = {}
    for pid, launch in keepers.items():
        why = fault_of(pid, launch)
        if why is not None:
            for member in (pid, *table.descendants(pid)):
                note(orphans, table, member, launch, why, member == pid)
    for pid in mine:
        if (file := holder_file(pid)) is not None and not Pool(file.stem, file.parent).is_used():
            note(orphans, table, pid, f"pool of {file.stem}", "no server is left that uses its pool", False)
    folders = {state_dir / "records", *(file.parent for pid in keepers if (file := keeper_file(pid)))}
    left = {**dict(recorded(folders, table, mine)), **launches}
    for pid, launch in left.items():
        if launch not in keepers.values():
            note(orphans, table, pid, launch, "its keeper is gone", False)
    return tuple(orphans[pid] for pid in sorted(orphans))


def note(
    orphans: dict[int, Orphan], table: ProcessTable, pid: int, launch: str, why: str, is_keeper: bool
) -> None:
    """Add a process that still lives."""
    process = table.id_of(pid)
    if process is None or not is_alive(process) or pid in orphans:
        return
    ram = memory(pid)
    orphans[pid] = Orphan(
        process=process,
        launch=launch,
        command=command_of(pid) or "",
        why=why,
        ram_bytes=ram.private_bytes + ram.pinned_bytes if ram else 0,
        is_keeper=is_keeper,
    )


def is_mine(pid: int) -> bool:
    """Whether the process runs as this user."""
    try:
        return psutil.Process(pid).uids().real == os.getuid()
    except (psutil.Error, OSError):
        return False


def is_keeper(pid: int) -> bool:
    """Whether the process is a keeper, by its command line."""
    return any("vllm_sleep_tui/fleet/keeper.py" in word for word in command_words(pid))


def keeper_file(pid: int) -> Path | None:
    """The file that a keeper holds locked; None if it holds none yet. A removed one ends in " (deleted)"."""
    files = [path for path in open_files(pid) if path.removesuffix(" (deleted)").endswith(".keeper")]
    return Path(files[0]) if files else None


def holder_file(pid: int) -> Path | None:
    """The file that a holder of a KV pool holds locked; None if the process is none, or has only begun."""
    if not any("vllm_sleep_tui/fleet/pool_holder.py" in word for word in command_words(pid)):
        return None
    files = [path.removesuffix(" (deleted)") for path in open_files(pid)]
    return next((Path(path) for path in files if path.endswith(".holder")), None)


def fault_of(pid: int, launch: str) -> str | None:
    """Why nobody looks after a living keeper; None if somebody does."""
    file = keeper_file(pid)
    if file is None:
        return None  # it has only just been started
    if file.name.endswith(" (deleted)"):
        return "its state folder was removed"
    try:
        record = read_record(file.with_suffix(".json"))
    except (OSError, ValueError, *NOT_JSON):
        return "it has no record"
    if record.launch != launch or record.state in (State.STOPPED, State.FAILED):
        return "its record tells of another server, or of none"
    return fault_of_config(record)


_CONFIGS = Unchanged(load, tick=0.0, most=8)
"""Of 64 keepers most have the same config, and at the next look it is as it was: to read it takes 0.1 s.

A person writes it, and not twice within the tick of a file system.
"""


def fault_of_config(record: Record) -> str | None:
    """Whether the config of a record still names its model; a config that cannot be read may."""
    path = path_of(record.config)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"its config {path} is gone"
    except OSError:
        return None
    try:
        model = _CONFIGS.get(path).config.models.get(record.name)
    except UsageError:
        return None
    if model is None:
        return f"{path} no longer names {record.name}"
    return f"{path} gives {record.name} by `url:` now" if model.is_attached else None


def recorded(folders: Iterable[Path], table: ProcessTable, mine: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The living processes that records and keepers' words speak of, each with its launch, and those below.

    An engine may have wiped its environment: then it was written down while it lived. Nobody is
    believed for the number of his session, which is given anew once its processes are gone.
    """
    alive = {table.id_of(pid) for pid in mine}
    for folder in folders:
        for launch, processes in spoken_of(folder):
            for process in processes:
                if process in alive and is_alive(process):
                    yield from ((pid, launch) for pid in (process.pid, *table.descendants(process.pid)))


def spoken_of(folder: Path) -> Iterator[tuple[str, tuple[ProcessId, ...]]]:
    """The launches of a records folder that have not ended: id, its processes."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, *NOT_JSON):
            record = read_record(path)
            if record.launch is not None and record.state not in (State.STOPPED, State.FAILED):
                yield record.launch, processes_of(record)
    for path in folder.glob("*.keeper"):
        with contextlib.suppress(OperationError):
            word = read_status(path)
            if word.launch is not None and word.exit is None:
                yield word.launch, processes_of(word)


def processes_of(source: Record | KeeperStatus) -> tuple[ProcessId, ...]:
    """Server and engines, as a record or a keeper tells of them."""
    return (*([source.server] if source.server else []), *source.engines)


def summary(orphans: Sequence[Orphan]) -> tuple[str, ...]:
    """One line on orphans for the screen; none if there is none."""
    if not orphans:
        return ()
    ram = sum(orphan.ram_bytes for orphan in orphans)
    what = "process is" if len(orphans) == 1 else "processes are"
    left = f"{len(orphans)} {what} left of lost servers"
    left += f" and hold {gib(ram)} of RAM" if ram >= NOTED_BYTES else ""
    return (f"{left}: see `vllm-sleep-tui orphans`.",)


def end_orphans(orphans: Sequence[Orphan]) -> None:
    """End them and wait until they are gone; raises OperationError for any that stays END_SECONDS.

    A keeper is asked to stop its server; where there is none, nobody is left to be asked.
    """
    kept = {orphan.launch for orphan in orphans if orphan.is_keeper}
    for orphan in orphans:
        if orphan.is_keeper or orphan.launch not in kept:
            signal_process(orphan.process, signal.SIGTERM if orphan.is_keeper else signal.SIGKILL)
    began = time.monotonic()
    while left := [orphan for orphan in orphans if is_alive(orphan.process)]:
        waited = time.monotonic() - began
        if waited > END_SECONDS:
            raise OperationError(
                f"Still there after {END_SECONDS:.0f} s: pid {', '.join(str(o.process.pid) for o in left)}.",
                "A process that waits for its driver ends late: look again in a minute.",
            )
        if waited > KIND_SECONDS:
            for orphan in left:
                signal_process(orphan.process, signal.SIGKILL)
        time.sleep(0.05)
