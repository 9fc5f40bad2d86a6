"""What must hold once everything has settled: looked at from outside, while nobody may act."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.keeper_client import is_kept, read_status
from vllm_sleep_tui.fleet.observe.orphans import find_orphans, is_keeper, keeper_file
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.processes import ProcessTable, is_alive, listens

OVERLAP = "Memory usage increased after sleeping"
"""What the engine says that was put to sleep while another took memory on its GPU."""
POOL_HOLDS = "its pool holds"


async def violations(core: Core, launches: set[str]) -> list[str]:
    """Every invariant that does not hold, in words; `launches` are all that were ever seen."""
    records = [core.records.read(name) for name in core.config.models]
    found = [*lost_records(core), *orphans(core, launches), *doubles(core), *holders(core, records)]
    for record in records:
        if record.state in (State.STOPPED, State.FAILED):
            found += ended(core, record)
        else:
            found += [*running(core, record), *await ownership(core, record)]
    return [*found, *overlaps(core), *pools(core, records)]


def lost_records(core: Core) -> Iterator[str]:
    yield from (f"record lost: {path.name}" for path in core.records.folder.glob("*.broken-*"))


def orphans(core: Core, launches: set[str]) -> Iterator[str]:
    for orphan in find_orphans(core.state_dir):
        if orphan.launch in launches:
            yield f"orphan: pid {orphan.process.pid} {orphan.command[:60]} ({orphan.why})"


def doubles(core: Core) -> Iterator[str]:
    """More than one keeper for a model."""
    seen: dict[Path, int] = {}
    for pid in ProcessTable.read().parents:
        file = keeper_file(pid) if is_keeper(pid) else None
        if file is not None and file.parent == core.records.folder:
            seen[file] = seen.get(file, 0) + 1
    yield from (f"double: {count} keepers of {file.stem}" for file, count in seen.items() if count > 1)


def holders(core: Core, records: list[Record]) -> Iterator[str]:
    """Memory of a GPU held by a process that no record names."""
    named = {engine.pid for record in records for engine in record.engines}
    assert core.simulated is not None
    for held in devices.allocations(core.simulated):
        if held.pid not in named and any(held.vram.values()):
            states = {record.name: (record.state.value, record.launch) for record in records}
            above = ProcessTable.read().parents.get(held.pid)
            yield f"pid {held.pid} ({held.title}, below {above}) holds VRAM and is in no record: {states}"


def pools(core: Core, records: list[Record]) -> Iterator[str]:
    """Memory that lies about, holders that nobody needs, and loans that the dead or sleepers have."""
    assert core.simulated is not None
    asleep = {e.pid for record in records if record.state is State.ASLEEP for e in record.engines}
    for gpu, pool in core.pools({0, 1}).items():
        lent, state = pool.lent(), pool.state()
        free = state.free_bytes if state is not None else 0
        chunks = [chunk for chunk in devices.chunks(core.simulated) if chunk.gpu == gpu]
        unlisted = sum(chunk.bytes for chunk in chunks if chunk.pid == devices.NOBODY)
        if unlisted != sum(lent.values()) + free:
            yield f"GPU {gpu}: {unlisted} bytes are listed for nobody, {lent} are lent and {free} free"
        if free:
            yield f"GPU {gpu}: {POOL_HOLDS} {free} bytes"
        if any(size for pid, size in lent.items() if pid in asleep):
            yield f"GPU {gpu}: a sleeper has something of the pool: {lent}"
        if pool.holder() is not None and not pool.is_used():
            yield f"GPU {gpu}: its holder outlives the servers"
    taken = {gpu: core.reader.memory(gpu) for gpu in core.pools({0, 1})}
    for gpu, (used, by_pid) in taken.items():
        if used != sum(size or 0 for size in (by_pid or {}).values()):
            yield f"GPU {gpu}: {used} bytes are used and {by_pid} tell of others"


def ended(core: Core, record: Record) -> Iterator[str]:
    if is_kept(core.model(record.name).keeper_file):
        yield f"{record.name} is {record.state} and has a keeper"
    if record.intent is not None:
        yield f"{record.name} is {record.state} and has an intent"


def running(core: Core, record: Record) -> Iterator[str]:
    path = core.model(record.name).keeper_file
    if record.state not in (State.AWAKE, State.ASLEEP) or record.intent is not None:
        yield f"{record.name} is not settled: {record.state}, {record.intent}"
    if not is_kept(path) or read_status(path).launch != record.launch:
        yield f"{record.name} is {record.state} and has no keeper of its own"
    if not record.engines or not all(is_alive(engine) for engine in record.engines):
        yield f"{record.name} is {record.state} and an engine is gone"


async def ownership(core: Core, record: Record) -> list[str]:
    """The server at the record's port is this launch's and is as the record says."""
    assert record.keeper is not None
    assert record.port is not None
    found = []
    if not listens(record.port, ProcessTable.read().descendants(record.keeper.pid)):
        found.append(f"{record.name}: port {record.port} is somebody else's")
    client = core.client(record)
    try:
        sleeping = await client.is_sleeping(10)
        gate = await client.gate()
    except EngineError as error:
        return [*found, f"{record.name}: it does not answer: {error}"]
    if sleeping is not (record.state is State.ASLEEP):
        found.append(f"{record.name}: {record.state}, and the server says sleeping={sleeping}")
    if gate.closed is not (record.state is State.ASLEEP):
        found.append(f"{record.name}: {record.state}, and its gate is closed={gate.closed}")
    return found


def overlaps(core: Core) -> Iterator[str]:
    """An engine that died because two used one GPU at once."""
    for path in (core.state_dir / "logs").iterdir() if (core.state_dir / "logs").is_dir() else ():
        if OVERLAP in path.read_text(errors="replace"):
            yield f"overlap: {path.name}"
            os.truncate(path, 0)
