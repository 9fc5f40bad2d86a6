"""The end of a server: asked for, or after a failure; never half."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from pathlib import Path

from vllm_sleep_tui.engine.causes import Diagnosis, diagnose, diagnose_engine
from vllm_sleep_tui.engine.failures import EngineRefused, EngineUnreachable
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import path_of
from vllm_sleep_tui.fleet.budget import fixed_utilization
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.cures import CURES, Failure
from vllm_sleep_tui.fleet.keeping import Word, ask_to_stop, end_members, is_kept, read_word
from vllm_sleep_tui.fleet.planning import read_memory
from vllm_sleep_tui.fleet.records import Record
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.regular import open_regular
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


async def end_server(core: Core, record: Record, *, at_once: bool) -> None:
    """End the server's whole group and see its memory gone; raises OperationError if something survives."""
    path = core.keeper_file(record.name)
    word = read_word(path)
    recorded = [record.keeper, record.server, *record.engines]
    if word.launch == record.launch:
        ask_to_stop(word, at_once=at_once)
        await gone(path, STOP_LIMIT)
        word = read_word(path)
        recorded += [word.keeper, word.server, *word.engines]
    if record.launch is not None and not await end_members(record.launch, *recorded):
        raise OperationError(
            f"Processes of {record.name} do not end.",
            "The driver may hang: look at `dmesg`, restart the machine.",
        )
    await memory_gone(core, record)
    await asyncio.to_thread(remove_tmp_dir, record)  # a cache of compiled code may be in it


async def stop_server(core: Core, record: Record, *, at_once: bool) -> Record:
    """The end of a stop, whoever brings it there: the server ended, and nothing told of it any longer."""
    await end_server(core, record, at_once=at_once)
    return core.enter(
        record,
        Event.EXITED,
        level=None,
        intent=None,
        keeper=None,
        server=None,
        engines=(),
        reason=None,
        cure=None,
        proof=None,
        fell=None,
    )


def remove_tmp_dir(record: Record) -> None:
    """Do what a killed keeper could not; only a folder that is named and owned as ours are."""
    folder = os.path.normpath(record.tmp_dir or "")
    if not folder.startswith(TMP_PREFIX):
        return
    with contextlib.suppress(OSError):
        if os.lstat(folder).st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)


async def gone(path: Path, limit: float) -> bool:
    """Wait until no keeper holds `path`; False after `limit` seconds."""
    deadline = time.monotonic() + limit
    while is_kept(path):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def memory_gone(core: Core, record: Record) -> None:
    """Wait until NVML no longer shows the server's processes, MEMORY_LIMIT seconds at most."""
    deadline = time.monotonic() + MEMORY_LIMIT
    while record.engines and time.monotonic() < deadline:
        memory = await asyncio.to_thread(read_memory, core, set(record.gpus))
        if not any(now.held_by(record) for now in memory.values()):
            return
        await asyncio.sleep(0.02)


async def fail(core: Core, record: Record, reason: str, cure: str, *, fell: State | None = None) -> Record:
    """End the server and write it down as failed, with the reason and the cure.

    `fell` is the state from which it died by itself: the leader may start it again.
    """
    await end_server(core, record, at_once=True)
    return core.enter(
        record,
        Event.FAIL,
        intent=None,
        level=None,
        reason=reason,
        cure=cure,
        keeper=None,
        server=None,
        engines=(),
        fell=fell,
    )


async def fail_as(core: Core, record: Record, failure: Failure, why: object = "") -> Record:
    """The record after a failure in an operation: its row's reason, or the log's if the server died."""
    dead = await is_dead(record, why)
    reason, cure = CURES[Failure.ENGINE_DEAD].told() if dead else CURES[failure].told(why)
    found = cause_in_log(core, record, read_word(core.keeper_file(record.name)))
    if found is not None:
        reason, cure = found.reason if dead else f"{reason} {found.reason}", found.cure
    return await fail(core, record, reason, cure)


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


def cause_in_log(core: Core, record: Record, word: Word) -> Diagnosis | None:
    """Why the server or its engine ended, as far as the log tells; None if both live or are not known."""
    found = _told_by_log(record, word)
    model = core.config.models.get(record.name)
    is_planned = model is not None and bool(model.gpus) and fixed_utilization(model) is None
    return found.for_planned() if found is not None and is_planned else found


def _told_by_log(record: Record, word: Word) -> Diagnosis | None:
    if record.log is None or word.launch != record.launch:
        return None
    if word.exit is not None:
        return diagnose(read_tail(path_of(record.log)), exit_code=word.exit.code)
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
