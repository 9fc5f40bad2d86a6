"""The end of a server: asked for, or after a failure; never half."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import NoReturn

from vllm_sleep_tui.engine.causes import Diagnosis, diagnose, diagnose_engine
from vllm_sleep_tui.engine.failures import EngineRefused, EngineUnreachable
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import open_regular, path_of
from vllm_sleep_tui.fleet.keeper_client import KeeperStatus, ask_to_stop, end_members, is_kept, read_status
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.failures import CURES, Failure
from vllm_sleep_tui.fleet.operations.room import read_memory
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.sizing.budget import fixed_utilization
from vllm_sleep_tui.telemetry.processes import is_alive

ENGINE_DIED = Diagnosis(*CURES[Failure.ENGINE_DEAD].told())
SERVER_GONE = Diagnosis("Its server ended by itself.", "Look at its log, then start it again.")
RECORD_LOST = Diagnosis(
    "Its record was lost; its server still runs.", "The panel or the next operation on it takes it back."
)
TMP_PREFIX = "/tmp/vst-"
"""Of the servers' temporary folders; short, because a socket's path has 107 characters at most."""
STOP_LIMIT = 30.0
"""Seconds for the keeper to be gone: its grace before SIGKILL, and the kernel's work on tens of GiB."""
MEMORY_LIMIT = 10.0
DEATH_LIMIT = 1.0
"""Seconds from vLLM's word that its engine is dead until its processes are gone."""
LOG_TAIL_BYTES = 512 * 1024


async def end_server(model: Model, *, at_once: bool) -> None:
    """End the server's whole group and see its memory gone; raises OperationError if something survives."""
    path, record = model.keeper_file, model.record
    status = read_status(path)
    processes = [record.keeper, record.server, *record.engines]
    if status.launch == record.launch:
        ask_to_stop(status, at_once=at_once)
        await keeper_gone(path, STOP_LIMIT)
        status = read_status(path)
        processes += [status.keeper, status.server, *status.engines]
    if record.launch is not None and not await end_members(record.launch, *processes):
        raise OperationError(
            f"Processes of {model.name} do not end.",
            "The driver may hang: look at `dmesg`, restart the machine.",
        )
    await memory_gone(model)
    await asyncio.to_thread(end_pools, model)
    await asyncio.to_thread(remove_tmp_dir, record)  # a cache of compiled code may be in it


async def stop_server(model: Model, *, at_once: bool) -> None:
    """The end of a stop, whoever brings it there: the server ended, and nothing told of it any longer."""
    await end_server(model, at_once=at_once)
    model.enter(Event.EXITED)


def end_pools(model: Model) -> None:
    """End the holders of its GPUs' KV pools that no server uses any longer."""
    for pool in model.core.pools(model.record.gpus).values():
        pool.end_unless_used()


def remove_tmp_dir(record: Record) -> None:
    """Do what a killed keeper could not; only a folder that is named and owned as ours are."""
    folder = os.path.normpath(record.tmp_dir or "")
    if not folder.startswith(TMP_PREFIX):
        return
    with contextlib.suppress(OSError):
        if os.lstat(folder).st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)


async def keeper_gone(path: Path, limit: float) -> bool:
    """Wait until no keeper holds `path`; False after `limit` seconds."""
    deadline = time.monotonic() + limit
    while is_kept(path):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def memory_gone(model: Model) -> None:
    """Wait until NVML no longer shows the server's processes, MEMORY_LIMIT seconds at most."""
    deadline, record = time.monotonic() + MEMORY_LIMIT, model.record
    while record.engines and time.monotonic() < deadline:
        memory = await asyncio.to_thread(read_memory, model.core, set(record.gpus))
        if not any(now.held_by(record) for now in memory.values()):
            return
        await asyncio.sleep(0.02)


async def fail(model: Model, reason: str, cure: str, *, died_from: State | None = None) -> None:
    """End the server and write it down as failed, with the reason and the cure.

    `died_from` is the state in which it died by itself: the leader may start it again.
    """
    await end_server(model, at_once=True)
    model.enter(Event.FAIL, reason=reason, cure=cure, fell=died_from)


async def fail_as(model: Model, failure: Failure, why: object = "") -> NoReturn:
    """The end after a failure in an operation: its row's reason, or the log's if the server died.

    Raises OperationError with it. A server that is cut off is kept.
    """
    if is_cut_off(model.record):
        what, cure = cut_off_words(model.record)
        raise OperationError(f"{model.name}: {what}", cure)
    is_engine_dead = await is_dead(model.record, why)
    reason, cure = CURES[Failure.ENGINE_DEAD if is_engine_dead else failure].told(
        *(() if is_engine_dead else (why,))
    )
    cause = cause_in_log(model, read_status(model.keeper_file))
    if cause is not None:
        reason, cure = cause.reason if is_engine_dead else f"{reason} {cause.reason}", cause.cure
    await fail(model, reason, cure)
    raise OperationError(f"{model.name}: {reason}", cure)


async def is_dead(record: Record, why: object) -> bool:
    """Whether its engine is dead; a server that says so or hangs up is given a moment to be seen so."""
    said = isinstance(why, EngineRefused) and why.engine_is_dead
    deadline = time.monotonic() + (DEATH_LIMIT if said or isinstance(why, EngineUnreachable) else 0.0)
    while is_whole(record):
        if time.monotonic() >= deadline:
            return said
        await asyncio.sleep(0.02)
    return True


def is_whole(record: Record) -> bool:
    """Whether the processes that hold the model's memory live."""
    return all(is_alive(engine) for engine in record.engines)


def is_cut_off(record: Record) -> bool:
    """Whether only our way in is gone, by a cleaner of /tmp, say: the server lives and serves clients."""
    return (
        record.socket is not None
        and record.server is not None
        and not os.path.exists(record.socket)
        and is_alive(record.server)
        and is_whole(record)
    )


def cut_off_words(record: Record) -> tuple[str, str]:
    """What and cure of a server that is cut off."""
    return (
        f"The panel's way in, {record.socket}, was removed: clients are served, but it can neither sleep nor"
        " wake nor be looked after.",
        "Stop it with --force and start it again when that is convenient.",
    )


def cause_in_log(model: Model, status: KeeperStatus) -> Diagnosis | None:
    """Why the server or its engine ended, as far as the log tells; None if both live or are not known."""
    cause = _cause_in_log(model.record, status)
    config = model.core.config.models.get(model.name)
    is_planned = config is not None and bool(config.gpus) and fixed_utilization(config) is None
    return cause.for_planned() if cause is not None and is_planned else cause


def _cause_in_log(record: Record, status: KeeperStatus) -> Diagnosis | None:
    if record.log is None or status.launch != record.launch:
        return None
    if status.exit is not None:
        return diagnose(read_tail(path_of(record.log)), exit_code=status.exit.code)
    if not is_whole(record):
        return diagnose_engine(read_tail(path_of(record.log))) or ENGINE_DIED
    return None


def read_tail(path: Path, limit: int = LOG_TAIL_BYTES) -> str:
    """The last `limit` bytes of a log as text; empty if it cannot be read."""
    try:
        with os.fdopen(open_regular(path, follow=True), "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - limit))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
