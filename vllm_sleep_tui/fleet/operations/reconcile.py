"""What somebody left unfinished: settled by whoever holds the locks next, before anything else.

The truth is the keeper (does the server live?) and the server (does it sleep?), never the record's hope.

A server whose record was lost is taken back: its keeper lives, and the server knows the rest itself. Its
environment and command line, which only this user can read, tell its socket, GPUs and port; whether it
sleeps, it is asked. What cannot be taken back is ended, because nobody could drive it.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.engine.guard import SOCKET_VARIABLE
from vllm_sleep_tui.engine.serve_args import port_in
from vllm_sleep_tui.engine.sleeping import sleep_level, worker_facts
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError
from vllm_sleep_tui.files import as_text
from vllm_sleep_tui.fleet.keeper_client import KeeperStatus, is_kept, read_status
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.discovery import launch_of
from vllm_sleep_tui.fleet.observe.orphans import is_keeper, is_mine, keeper_file
from vllm_sleep_tui.fleet.operations.end import (
    SERVER_GONE,
    cause_in_log,
    cut_off_words,
    end_server,
    fail,
    is_cut_off,
    is_whole,
    keeper_gone,
    stop_server,
)
from vllm_sleep_tui.fleet.operations.failures import Failure
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.patience import patiently
from vllm_sleep_tui.fleet.operations.prove import Proof
from vllm_sleep_tui.fleet.operations.server import GATE_LIMIT, Server
from vllm_sleep_tui.fleet.operations.start import Start
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.telemetry import kernel
from vllm_sleep_tui.telemetry.processes import ProcessId, ProcessTable, command_words, is_alive

if TYPE_CHECKING:  # `status` asks no server, and does without it
    from vllm_sleep_tui.engine.client import VllmClient

ASK_LIMIT = 60.0
WORD_LIMIT = 3.0
"""Seconds for a keeper to end what its dead server left, and to say how that ended."""
OLD_SECRET_VARIABLE = "VLLM_SLEEP_TUI_SECRET"
"""Of a server that the version before started."""


def is_unfinished(model: Model) -> bool:
    """Whether the record tells of an operation, or of a server that is no more."""
    record = model.read()
    if record.state in (State.STOPPED, State.FAILED):
        return record.intent is not None or is_lost(model)
    return record.intent is not None or owes_sleep(record) or not lives(model) or not is_whole(record)


def owes_sleep(record: Record) -> bool:
    """Whether it was restarted because it had died asleep, and is awake still."""
    return record.state is State.AWAKE and record.fell is State.ASLEEP


def needs_care(model: Model) -> bool:
    """Whether it is unfinished and nobody else is at it; within this process the locks tell."""
    if not is_unfinished(model):
        return False
    record = model.record
    intent = record.intent
    if is_cut_off(record) and record.reason == cut_off_words(record)[0]:
        return False  # that is known; more cannot be done
    return intent is None or intent.actor == actor() or not is_alive(intent.actor)


def lives(model: Model) -> bool:
    """Whether the record's server has its keeper."""
    path = model.keeper_file
    return is_kept(path) and read_status(path).launch == model.record.launch


async def reconcile(model: Model, operation: Operation) -> None:
    """Settle what is unfinished on the model; the caller holds its lock and its GPUs' locks."""
    if not is_unfinished(model):
        return
    record = model.record
    operation.tell(model.name, "settling", "what an earlier operation left")
    if is_lost(model):
        await take_back(model, operation)
    elif record.state in (State.STOPPED, State.FAILED):
        model.write(intent=None)  # others were making room for it
    elif record.state is State.STOPPING:
        await finish_stop(model)
    elif not lives(model) or not is_whole(record):
        await record_death(model)
    elif record.state is State.STARTING:
        await carry_on_start(model, operation)
    elif record.intent is not None:
        await settle(model, operation)
    if owes_sleep(model.read()):
        await back_to_sleep(model, operation)


async def back_to_sleep(model: Model, operation: Operation) -> None:
    """The end of a restart; a model that cannot sleep stays awake, because nobody would wait for it."""
    try:
        await Server(model, operation).step_aside(force=False)
    except PanelError as error:
        record = model.read()
        if owes_sleep(record) and not operation.is_cancelled:
            model.write(fell=None)
        operation.tell(model.name, record.state, error.what)


async def record_death(model: Model) -> None:
    """The server or its engine is gone: end what is left of it, write down why."""
    record, status = model.record, read_status(model.keeper_file)
    if status.exit is None and record.server is not None and not is_alive(record.server):
        # Its engine dies with the server, and that is all to be seen until the keeper says how that ended.
        await keeper_gone(model.keeper_file, WORD_LIMIT)
        status = read_status(model.keeper_file)
    if status.launch == record.launch and status.exit is not None and status.exit.asked:
        await finish_stop(model)
        return
    cause = cause_in_log(model, status) or SERVER_GONE
    await fail(model, cause.reason, cause.cure, died_from=died_from(record))


def died_from(record: Record) -> State | None:
    """The state to come back to after a restart; a start that failed is not tried again."""
    return None if record.state is State.STARTING else record.fell or record.state


async def finish_stop(model: Model) -> None:
    """Somebody was stopping it."""
    if model.record.state is not State.STOPPING:
        model.enter(Event.STOP)
    await stop_server(model, at_once=False)


async def carry_on_start(model: Model, operation: Operation) -> None:
    """A start whose starter died goes on where it is; its end is its own and not the operation's.

    Raises CancelledByUser if the operation is cancelled; the start is then left to whoever comes next.
    """
    try:
        await Start(model, operation).carry_on()
    except CancelledByUser:
        if operation.is_cancelled:
            raise
        operation.tell(model.name, "stopped", "somebody stopped its start")
    except (OperationError, RefusedError) as error:
        operation.tell(model.name, "failed", error.what)


async def settle(model: Model, operation: Operation) -> None:
    """A sleep, wake or switch was cut off: ask what became of it, and finish what must not stay half.

    A server that cannot be asked because its socket was removed is kept, with that as its reason.
    """
    server, state = Server(model, operation), model.record.state
    if is_cut_off(model.record):
        what, cure = cut_off_words(model.record)
        left = None if state in (State.AWAKE, State.ASLEEP) else model.record.intent
        model.write(intent=left, reason=what, cure=cure)
        operation.tell(model.name, "cut off", what)
        return
    try:
        sleeping = await server.is_sleeping()
        if state is State.FALLING_ASLEEP:
            await after_sleep(server, sleeping=sleeping)
        elif state is State.WAKING:
            await after_wake(server, sleeping=sleeping)
        else:
            if state is State.AWAKE:
                await server.open_gate()
            elif sleeping:
                await after_deepening(server)
            model.write(intent=None)
    except OperationError as error:
        operation.tell(model.name, "failed", error.what)  # it is recorded as failed


async def after_sleep(server: Server, *, sleeping: bool) -> None:
    """The sleep happened or it did not; both are fine."""
    intent = server.model.record.intent
    level = intent.level if intent else None
    if not sleeping:
        await server.undo_sleep(level)
        return
    server.model.enter(Event.SLEPT, level=1 if level is None else level)


async def after_deepening(server: Server) -> None:
    """A sleeper was asked to go from level 0 to another without a wake; it knows how far it came."""
    record = server.model.record
    if record.intent is None or record.intent.level in (None, record.level):
        return
    try:
        reached = await sleep_level(
            server.client, ASK_LIMIT, is_own=server.is_own, otherwise=record.level or 0
        )
    except EngineError as error:
        await server.fail(Failure.SILENT, error)
    server.model.write(level=reached)


async def after_wake(server: Server, *, sleeping: bool) -> None:
    """A wake from level 2 is run through again, each step may be repeated; one from level 1 is proven."""
    await server.set_gate(closed=True)  # it may have been cut off after it was opened
    level = server.model.record.level
    if sleeping or level == 2:
        await server.bring_back(1 if level is None else level)
    verdict = await server.proof.prove()
    await server.open_gate()
    server.model.enter(Event.WOKE, proof=verdict)


# ── a lost record ────────────────────────────────────────────────────────────────────────────────────────


def is_lost(model: Model) -> bool:
    """Whether a record that tells of no server is wrong: its model's keeper lives."""
    return model.record.state in (State.STOPPED, State.FAILED) and is_kept(model.keeper_file)


async def take_back(model: Model, operation: Operation) -> None:
    """Put the record together again, or end the server and say so; the caller holds the locks."""
    status = read_status(model.keeper_file)
    garbled = status.launch is None
    if garbled:
        status = await asyncio.to_thread(find_keeper, model.keeper_file)
    model.record = msgspec.structs.replace(
        model.record,
        launch=status.launch,
        keeper=status.keeper,
        server=status.server,
        intent=None,
        restarts=(),
    )
    try:
        if garbled:
            raise ValueError("nor can its keeper's file be read")
        model.record = identify(model, status)
        await ask(model, operation)
    except (EngineError, PanelError, OSError, ValueError) as error:
        await end_server(model, at_once=True)
        reason = f"Its record was lost and its server could not be taken back ({error}): it was ended."
        model.record = model.record.reset(Event.FAIL)
        # No transition: it may have been recorded as stopped or failed all along.
        model.write(state=State.FAILED, since=time.time(), reason=reason, cure="Start it again.")
        model.publish(operation.name)


def find_keeper(path: Path) -> KeeperStatus:
    """A living keeper whose word cannot be read, by the file that it has open; an empty word if none has."""
    table = ProcessTable.read()
    for pid in table.parents:
        if is_mine(pid) and is_keeper(pid) and keeper_file(pid) == path.resolve():
            server = next(iter(table.descendants(pid)), 0)
            return KeeperStatus(launch=launch_of(pid), keeper=table.id_of(pid), server=table.id_of(server))
    return KeeperStatus()


def identify(model: Model, status: KeeperStatus) -> Record:
    """The record with what the server's process tells; raises OSError or ValueError if it does not."""
    if status.server is None or status.keeper is None or not is_alive(status.server):
        raise ValueError("its process is gone")
    pairs = (os.fsdecode(word).partition("=") for word in kernel.environment(status.server.pid) or ())
    environment = {name: value for name, _, value in pairs}
    argv = command_words(status.server.pid)
    socket, secret = environment.get(SOCKET_VARIABLE), environment.get(OLD_SECRET_VARIABLE)
    if (socket or secret) is None:
        raise ValueError("its process does not tell how to reach it")
    return msgspec.structs.replace(
        model.record,
        port=port_in(argv),
        socket=socket,
        secret=None if socket else secret,
        gpus=tuple(int(gpu) for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu),
        tmp_dir=environment.get("TMPDIR"),
        log=as_text(log_of(status.keeper) or model.log_path),
        digest=model.digest,
    )


def log_of(keeper: ProcessId) -> str | None:
    """The log that a keeper has open."""
    return next((path for path in kernel.open_files(keeper.pid) if path.endswith(".log")), None)


async def ask(model: Model, operation: Operation) -> None:
    """Ask the server how it is and write that down; raises if it does not answer as ours would."""
    client = model.client()
    if not await client.health(model.core.limits.call):
        raise OperationError("it was not ready")
    start = Start(model, operation)
    await start.check_listener(client)
    is_asleep = await client.is_sleeping(ASK_LIMIT)
    if start.wants_own_backend():
        model.record = await with_backend(model.record, client)
    is_own, level = model.record.sleep_backend == "own", None
    if is_asleep:
        level = await sleep_level(client, ASK_LIMIT, is_own=is_own)
    await patiently(model, lambda: client.set_gate(is_asleep, GATE_LIMIT))
    # No transition: this is the state it has been in all along.
    model.write(
        state=State.ASLEEP if is_asleep else State.AWAKE,
        since=time.time(),
        level=level,
        resolved_level=start.resolve_level() if level is None else str(level),
        reference=None,
        reason=None,
        cure=None,
        fell=None,
    )
    if not is_asleep:
        await Proof(model, operation).take_reference()


async def with_backend(record: Record, client: VllmClient) -> Record:
    """The record with whose sleep mode it is, as its workers say; vLLM's own does not know the question."""
    try:
        facts = await worker_facts(client, ASK_LIMIT)
    except EngineError:
        facts = []
    is_own = bool(facts) and all(worker.is_own for worker in facts)
    return msgspec.structs.replace(record, sleep_backend="own" if is_own else "stock")
