"""What somebody left unfinished: settled by whoever holds the locks next, before anything else.

The truth is the keeper (does the server live?) and the server (does it sleep?), never the record's hope.
"""

from __future__ import annotations

from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.ending import (
    SERVER_GONE,
    cause_in_log,
    cut_off_words,
    fail,
    is_cut_off,
    is_whole,
    stop_server,
)
from vllm_sleep_tui.fleet.keeping import is_kept, read_word
from vllm_sleep_tui.fleet.lost import is_lost, take_back
from vllm_sleep_tui.fleet.operation import Operation, actor
from vllm_sleep_tui.fleet.records import Record
from vllm_sleep_tui.fleet.server import Server
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.telemetry.processes import is_alive


def is_unfinished(core: Core, name: str) -> bool:
    """Whether the record tells of an operation, or of a server that is no more."""
    record = core.records.read(name)
    if record.state in (State.STOPPED, State.FAILED):
        return record.intent is not None or is_lost(core, record)
    return record.intent is not None or owes_sleep(record) or not lives(core, record) or not is_whole(record)


def owes_sleep(record: Record) -> bool:
    """Whether it was restarted because it had died asleep, and is awake still."""
    return record.state is State.AWAKE and record.fell is State.ASLEEP


def needs_care(core: Core, name: str) -> bool:
    """Whether it is unfinished and nobody else is at it; within this process the locks tell."""
    if not is_unfinished(core, name):
        return False
    record = core.records.read(name)
    intent = record.intent
    if is_cut_off(record) and record.reason == cut_off_words(record)[0]:
        return False  # it was said; more cannot be done
    return intent is None or intent.actor == actor() or not is_alive(intent.actor)


def lives(core: Core, record: Record) -> bool:
    """Whether the record's server has its keeper."""
    path = core.keeper_file(record.name)
    return is_kept(path) and read_word(path).launch == record.launch


async def recover(core: Core, name: str, operation: Operation) -> None:
    """Settle what is unfinished on `name`; the caller holds its lock and its GPUs' locks."""
    if not is_unfinished(core, name):
        return
    record = core.records.read(name)
    operation.tell(name, "settling", "what an earlier operation left")
    if is_lost(core, record):
        await take_back(core, record, operation)
    elif record.state in (State.STOPPED, State.FAILED):
        core.write(record, intent=None)  # others were making room for it
    elif record.state is State.STOPPING:
        await finish_stop(core, record)
    elif not lives(core, record) or not is_whole(record):
        await bury(core, record)
    elif record.state is State.STARTING:
        await carry_on_start(core, record, operation)
    elif record.intent is not None:
        await settle(core, record, operation)
    if owes_sleep(core.records.read(name)):
        await back_to_sleep(core, name, operation)


async def back_to_sleep(core: Core, name: str, operation: Operation) -> None:
    """The end of a restart; a model that cannot sleep stays awake, because nobody would wait for it."""
    from vllm_sleep_tui.fleet.actions import step_aside

    try:
        await step_aside(core, name, operation, force=False)
    except PanelError as error:
        record = core.records.read(name)
        if owes_sleep(record) and not operation.is_cancelled:
            core.write(record, fell=None)
        operation.tell(name, record.state, error.what)


async def bury(core: Core, record: Record) -> None:
    """The server or its engine is gone: end what is left of it, write down why."""
    word = read_word(core.keeper_file(record.name))
    if word.launch == record.launch and word.exit is not None and word.exit.asked:
        await finish_stop(core, record)
        return
    found = cause_in_log(core, record, word) or SERVER_GONE
    await fail(core, record, found.reason, found.cure, fell=fell_from(record))


def fell_from(record: Record) -> State | None:
    """The state to come back to after a restart; a start that failed is not tried again."""
    return None if record.state is State.STARTING else record.fell or record.state


async def finish_stop(core: Core, record: Record) -> None:
    """Somebody was stopping it."""
    if record.state is not State.STOPPING:
        record = core.enter(record, Event.STOP)
    await stop_server(core, record, at_once=False)


async def carry_on_start(core: Core, record: Record, operation: Operation) -> None:
    """A start whose starter died goes on where it is; its end is its own and not the operation's.

    Raises CancelledByUser if the operation is cancelled; the start is then left to whoever comes next.
    """
    from vllm_sleep_tui.fleet.starting import Start

    try:
        await Start(core, record.name, operation).carry_on()
    except CancelledByUser:
        if operation.is_cancelled:
            raise
        operation.tell(record.name, "stopped", "somebody stopped its start")
    except (OperationError, RefusedError) as error:
        operation.tell(record.name, "failed", error.what)


async def settle(core: Core, record: Record, operation: Operation) -> None:
    """A sleep, wake or switch was cut off: ask what became of it, and finish what must not stay half.

    A server that cannot be asked because its socket was removed is kept, with that as its reason.
    """
    if is_cut_off(record):
        what, cure = cut_off_words(record)
        left = None if record.state in (State.AWAKE, State.ASLEEP) else record.intent
        core.write(record, intent=left, reason=what, cure=cure)
        operation.tell(record.name, "cut off", what)
        return
    server = Server(core, record, operation)
    try:
        sleeping = await server.is_sleeping()
        if record.state is State.FALLING_ASLEEP:
            await after_sleep(server, sleeping=sleeping)
        elif record.state is State.WAKING:
            await after_wake(server, sleeping=sleeping)
        else:
            if record.state is State.AWAKE:
                await server.open_gate()
            server.record = core.write(server.record, intent=None)
    except OperationError as error:
        operation.tell(record.name, "failed", error.what)  # it is recorded as failed


async def after_sleep(server: Server, *, sleeping: bool) -> None:
    """The sleep happened or it did not; both are fine."""
    if not sleeping:
        await server.undo_sleep()
        return
    level = server.record.intent.level if server.record.intent else None
    server.record = server.core.enter(
        server.record, Event.SLEPT, level=1 if level is None else level, intent=None, fell=None
    )


async def after_wake(server: Server, *, sleeping: bool) -> None:
    """A wake from level 2 is run through again, each step may be repeated; one from level 1 is proven."""
    await server.set_gate(closed=True)  # it may have been cut off after it was opened
    if sleeping or server.record.level == 2:
        await server.bring_back(1 if server.record.level is None else server.record.level)
    verdict = await server.prove()
    await server.open_gate()
    server.record = server.core.enter(server.record, Event.WOKE, level=None, intent=None, proof=verdict)
