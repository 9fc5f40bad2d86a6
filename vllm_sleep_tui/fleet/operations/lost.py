"""A server whose record was lost: its keeper lives, and the server knows the rest itself.

Its environment and command line, which only this user can read, tell its socket, GPUs and port; whether it
sleeps, it is asked. What cannot be taken back is ended, because nobody could drive it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec

from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.engine.guard import SOCKET_VARIABLE
from vllm_sleep_tui.engine.sleeping import sleep_level, worker_facts
from vllm_sleep_tui.errors import OperationError, PanelError
from vllm_sleep_tui.files import as_text
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.keeper_client import Word, is_kept, read_word
from vllm_sleep_tui.fleet.observe.discovery import launch_of
from vllm_sleep_tui.fleet.observe.orphans import is_keeper, is_mine, keeper_file, open_files
from vllm_sleep_tui.fleet.operations.end import end_server
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.patience import patiently
from vllm_sleep_tui.fleet.operations.server import GATE_LIMIT, Server
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.telemetry.processes import ProcessId, ProcessTable, is_alive

ASK_LIMIT = 60.0
OLD_SECRET_VARIABLE = "VLLM_SLEEP_TUI_SECRET"
"""Of a server that the version before started."""


def is_lost(core: Core, record: Record) -> bool:
    """Whether a record that tells of no server is wrong: its model's keeper lives."""
    return record.state in (State.STOPPED, State.FAILED) and is_kept(core.keeper_file(record.name))


async def take_back(core: Core, record: Record, operation: Operation) -> None:
    """Put the record together again, or end the server and say so; the caller holds the locks."""
    word = read_word(core.keeper_file(record.name))
    garbled = word.launch is None
    if garbled:
        word = await asyncio.to_thread(find_keeper, core.keeper_file(record.name))
    record = msgspec.structs.replace(
        record, launch=word.launch, keeper=word.keeper, server=word.server, intent=None, restarts=()
    )
    try:
        if garbled:
            raise ValueError("nor can its keeper's file be read")
        record = identify(core, record, word)
        await ask(core, record, operation)
    except (EngineError, PanelError, OSError, ValueError) as error:
        await end_server(core, record, at_once=True)
        said = f"Its record was lost and its server could not be taken back ({error}): it was ended."
        core.write(
            record,
            state=State.FAILED,
            since=time.time(),
            reason=said,
            cure="Start it again.",
            keeper=None,
            server=None,
            engines=(),
            fell=None,
        )


def find_keeper(path: Path) -> Word:
    """A living keeper whose word cannot be read, by the file that it has open; an empty word if none has."""
    table = ProcessTable.read()
    for pid in table.parents:
        if is_mine(pid) and is_keeper(pid) and keeper_file(pid) == path.resolve():
            server = next(iter(table.descendants(pid)), 0)
            return Word(launch=launch_of(pid), keeper=table.id_of(pid), server=table.id_of(server))
    return Word()


def identify(core: Core, record: Record, word: Word) -> Record:
    """The record with what the server's process tells; raises OSError or ValueError if it does not."""
    if word.server is None or word.keeper is None or not is_alive(word.server):
        raise ValueError("its process is gone")
    folder = Path(f"/proc/{word.server.pid}")
    environment = dict(
        line.split("=", 1)
        for line in (folder / "environ").read_text(errors="replace").split("\0")
        if "=" in line
    )
    argv = (folder / "cmdline").read_text(errors="replace").split("\0")
    socket, secret = environment.get(SOCKET_VARIABLE), environment.get(OLD_SECRET_VARIABLE)
    if (socket or secret) is None or "--port" not in argv:
        raise ValueError("its process does not tell how to reach it")
    return msgspec.structs.replace(
        record,
        port=int(argv[argv.index("--port") + 1]),
        socket=socket,
        secret=None if socket else secret,
        gpus=tuple(int(gpu) for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu),
        tmp_dir=environment.get("TMPDIR"),
        log=as_text(log_of(word.keeper) or core.records.log_path(record.name)),
        digest=core.digest(record.name),
    )


def log_of(keeper: ProcessId) -> str | None:
    """The log that a keeper has open."""
    return next((path for path in open_files(keeper.pid) if path.endswith(".log")), None)


async def ask(core: Core, record: Record, operation: Operation) -> None:
    """Ask the server how it is and write that down; raises if it does not answer as ours would."""
    from vllm_sleep_tui.fleet.operations.start import Start

    client = core.client(record)
    if not await client.health(core.limits.call):
        raise OperationError("it was not ready")
    start = Start(core, record.name, operation)
    start.record = record
    await start.check_listener(client)
    sleeping = await client.is_sleeping(ASK_LIMIT)
    if start.wants_own_backend():
        start.record = await with_backend(start.record, client)
    is_own = start.record.sleep_backend == "own"
    level = await sleep_level(client, ASK_LIMIT, is_own=is_own) if sleeping else None
    await patiently(core, start.record, lambda: client.set_gate(sleeping, GATE_LIMIT))
    # No transition: this is the state it has been in all along.
    record = core.write(
        start.record,
        state=State.ASLEEP if sleeping else State.AWAKE,
        since=time.time(),
        level=level,
        resolved_level=start.resolve_level() if level is None else str(level),
        reference=None,
        reason=None,
        cure=None,
        fell=None,
    )
    if not sleeping:
        await Server(core, record, operation).take_reference()


async def with_backend(record: Record, client: VllmClient) -> Record:
    """The record with whose sleep mode it is, as its workers say; vLLM's own does not know the question."""
    try:
        facts = await worker_facts(client, ASK_LIMIT)
    except EngineError:
        facts = []
    is_own = bool(facts) and all(worker.is_own for worker in facts)
    return msgspec.structs.replace(record, sleep_backend="own" if is_own else "stock")
