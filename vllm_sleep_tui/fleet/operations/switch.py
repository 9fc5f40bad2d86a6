"""What can be done with models, each from its locks to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError, UsageError
from vllm_sleep_tui.fleet.attached import backend as attached
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.keeper_client import ask_to_stop, read_word
from vllm_sleep_tui.fleet.levels import never_level2
from vllm_sleep_tui.fleet.operations.acquire import locked, others_on
from vllm_sleep_tui.fleet.operations.arguments import check_arguments, learn_flags
from vllm_sleep_tui.fleet.operations.end import is_whole, stop_server
from vllm_sleep_tui.fleet.operations.failures import CURES, Failure
from vllm_sleep_tui.fleet.operations.fetch import fetch
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.patience import patiently
from vllm_sleep_tui.fleet.operations.ports import choose_port
from vllm_sleep_tui.fleet.operations.reconcile import lives
from vllm_sleep_tui.fleet.operations.room import cold_start, own_level, refuse_without_room
from vllm_sleep_tui.fleet.operations.server import GATE_LIMIT, Server, no_level_0
from vllm_sleep_tui.fleet.operations.start import PortRaceError, Start, check_startable
from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.fleet.store.records import Intent, Record
from vllm_sleep_tui.sizing.placement import Room

# ── switch, wake, start ──────────────────────────────────────────────────────────────────────────────────


async def switch(core: Core, name: str, operation: Operation, *, force: bool = False) -> SwitchTimes:
    """Make `name` awake: others sleep first where room is needed, then it wakes or starts."""
    if core.model(name).url is not None:
        return await attached.switch(core, name, operation)
    if core.records.read(name).state in (State.STOPPED, State.FAILED):
        check_startable(core, name)
        check_arguments(core, name, await learn_flags(core, name, operation))
        await fetch(core, name, operation)
    async with locked(core, name, operation, make_room=True, seconds=cold_start(core, name)) as room:
        record = core.records.read(name)
        if record.state is State.AWAKE:
            return operation.ledger()
        if record.state is not State.ASLEEP:
            check_startable(core, name)
            choose_port(core, name)  # a taken one is found before anybody sleeps for it
            record = core.write(record, last_failure=None)
        refuse_without_room(core, name, room)
        try:
            await clear(core, record, room, operation, force=force)
            server = await bring_up(core, name, operation)
        except PanelError as error:
            error.cure = f"{error.cure} {who_left(core, room)}".strip()
            raise
        ledger = server.record.last_switch or operation.ledger()
        core.note(
            lambda past: past.record_switch(
                name, ledger, level=record.level, from_state=record.state, left=room.leaving
            )
        )
        return ledger


def who_left(core: Core, room: Room) -> str:
    """Says who made room for nothing: it may be that nobody is awake now."""
    states = {name: core.records.read(name).state for name in room.leaving}
    return " ".join(
        f"{name} is {state} now: `switch {name}` brings it back."
        for name, state in states.items()
        if state in (State.ASLEEP, State.STOPPED)
    )


async def clear(core: Core, record: Record, room: Room, operation: Operation, *, force: bool) -> None:
    """Put the plan's models to sleep; the target shows that it is being switched to meanwhile."""
    intent = Intent(
        operation=operation.name,
        phase="making room",
        since=operation.since,
        actor=actor(),
        level=record.level,
    )
    core.write(record, intent=intent)
    heard = asyncio.ensure_future(knock(core, record))
    try:
        for leaving in room.leaving:
            operation.checkpoint()
            await step_aside(core, leaving, operation, force=force, unless=heard)
        await heard
        operation.checkpoint()
    except BaseException:
        heard.cancel()
        core.write(core.records.read(record.name), intent=None)
        raise


async def knock(core: Core, record: Record) -> None:
    """Hear from a sleeper before others are put to sleep for it; raises OperationError if it is silent."""
    if record.state is State.ASLEEP:
        await patiently(core, record, lambda: core.client(record).gate(GATE_LIMIT))


async def step_aside(
    core: Core, name: str, operation: Operation, *, force: bool, unless: Awaitable[object] | None = None
) -> None:
    """One model makes room, the way its level says, unless `unless` raises before it is too late."""
    record = core.records.read(name)
    if record.state is State.ASLEEP and record.level == 0:
        await give_up_weights(core, record, operation)
        return
    if record.state is not State.AWAKE:
        return
    if record.resolved_level == "none":
        await end(core, record, operation, force=force, unless=unless)
    else:
        await Server(core, record, operation).fall_asleep(own_level(record), force=force, unless=unless)


async def give_up_weights(core: Core, record: Record, operation: Operation) -> None:
    """A sleeper at level 0 moves its weights to RAM, or gives them up where the RAM is short."""
    server = Server(core, record, operation)
    try:
        await server.deepen(1)
    except RefusedError:
        if never_level2(core.model(record.name), record.vllm_version, core.loaded.path.parent):
            raise
        await server.deepen(2)


async def bring_up(core: Core, name: str, operation: Operation, *, fell: State | None = None) -> Server:
    """Wake the sleeper or start the stopped one, see `Start.run`; the room for it has been made."""
    record = core.records.read(name)
    if record.state is not State.ASLEEP:
        try:
            return await start_twice(core, name, operation, fell=fell)
        except (RefusedError, UsageError):
            core.write(core.records.read(name), intent=None)
            raise
    server = Server(core, record, operation)

    async def more_room() -> None:
        for other in sorted(others_on(core, name)):
            await step_aside(core, other, operation, force=False)

    try:
        await server.wake(more_room)
    except (RefusedError, CancelledByUser):
        core.write(server.record, intent=None)
        raise
    return server


async def start_twice(core: Core, name: str, operation: Operation, *, fell: State | None) -> Server:
    """Start it, once more if only the race for a port was lost."""
    try:
        return await Start(core, name, operation).run(fell=fell)
    except PortRaceError as error:
        operation.tell(name, "once more", f"{error.what} It was free a moment ago.")
        return await Start(core, name, operation).run(fell=fell)


async def wake(core: Core, name: str, operation: Operation) -> None:
    """Wake a sleeper; done if it is awake, refused if it does not run."""
    if core.model(name).url is not None:
        await attached.switch(core, name, operation)
        return
    record = core.records.read(name)
    if record.state in (State.STOPPED, State.FAILED):
        cure = f"Start it (key u, or `start {name}`)."
        raise RefusedError(f"Cannot wake {name}: it is {record.state}.", cure)
    await switch(core, name, operation)


async def start_all(core: Core, names: Sequence[str], operation: Operation) -> None:
    """Start models, those that share a GPU one after another, others side by side; the first ends awake.

    Whoever cannot be started is left out, and named in what is raised once the others have.
    """
    chosen, errors = startable(core, names)
    if len(names) == 1:
        await start(core, names[0], operation)
        return
    for name in names:
        if name not in chosen:
            operation.tell(name, "left out", "it cannot be started as the config has it")
    results = await asyncio.gather(
        *(start_group(core, group, operation) for group in groups(core, chosen)), return_exceptions=True
    )
    failed = [error for found in results for error in (found if isinstance(found, list) else [found])]
    raise_worst([*errors, *failed])


def startable(core: Core, names: Sequence[str]) -> tuple[list[str], list[PanelError]]:
    """The models that the config lets start, and why the others cannot; raises that if none can."""

    def check(name: str) -> None:
        attached.refuse_control(core, name)
        check_startable(core, name)

    return sifted(names, check)


def sifted(names: Sequence[str], check: Callable[[str], None]) -> tuple[list[str], list[PanelError]]:
    """The names that pass `check`, and what it raised for the others; raises that if none passes."""
    chosen: list[str] = []
    errors: list[PanelError] = []
    for name in names:
        try:
            check(name)
        except PanelError as error:
            errors.append(error)
        else:
            chosen.append(name)
    if errors and not chosen:
        first = errors[0]
        raise type(first)(with_others(errors), first.cure)
    return chosen, errors


def groups(core: Core, names: Sequence[str]) -> list[list[str]]:
    """The names, divided so that no two groups have a GPU in common; order kept. The CPU counts as one."""
    found: list[tuple[set[int], list[str]]] = []
    for name in names:
        gpus = set(core.model(name).gpus) or {-1}
        touching = [group for group in found if group[0] & gpus]
        merged = (
            gpus.union(*(g for g, _ in touching)),
            [n for _, members in touching for n in members] + [name],
        )
        found = [group for group in found if group not in touching] + [merged]
    return [sorted(members, key=list(names).index) for _, members in found]


async def start_group(core: Core, names: Sequence[str], operation: Operation) -> list[BaseException]:
    """Start the last first, so that the first is the one that stays awake; go on after a failure."""
    errors: list[BaseException] = []
    for name in reversed(names):
        if name != names[0] and core.model(name).level == "none":
            operation.tell(name, "left stopped", "level: none; the next one would stop it again")
            continue
        try:
            await start(core, name, operation.part(name))
        except CancelledByUser:
            raise
        except PanelError as error:
            errors.append(error)
    if core.records.read(names[0]).state is State.ASLEEP:
        await switch(core, names[0], operation.part(names[0]))
    return errors


def raise_worst(errors: Sequence[BaseException | None]) -> None:
    """Raise what went wrong: the first of them, with the others named."""
    real = [error for error in errors if error is not None]
    for error in real:
        if not isinstance(error, PanelError) or isinstance(error, CancelledByUser):
            raise error
    if real:
        known = [error for error in real if isinstance(error, PanelError)]
        raise OperationError(with_others(known), known[0].cure)


def with_others(errors: Sequence[PanelError]) -> str:
    """What is wrong first, and after it, each once, what else is."""
    first, *rest = dict.fromkeys(error.what for error in errors)
    return f"{first}{''.join(f' Also: {what}' for what in rest)}"


async def start(core: Core, name: str, operation: Operation) -> None:
    """Start a model; done if it runs, awake or asleep, and not only its record says so."""
    record = core.records.read(name)
    state = record.state if lives(core, record) and is_whole(record) else State.FAILED
    if state is State.ASLEEP:
        operation.tell(name, "asleep", "it runs already; `wake` wakes it")
    elif state is State.AWAKE:
        operation.tell(name, "awake", "it runs already")
    else:
        await switch(core, name, operation)


# ── sleep ────────────────────────────────────────────────────────────────────────────────────────────────


async def sleep(
    core: Core, name: str, level: int | None, operation: Operation, *, force: bool = False
) -> None:
    """Put a model to sleep at `level`, or its own; with `level: none` it is stopped instead."""
    if core.model(name).url is not None:
        await attached.sleep(core, name, level, operation, force=force)
        return
    async with locked(core, name, operation, make_room=False):
        record = core.records.read(name)
        if record.state is State.ASLEEP and record.level == 0 and level in (1, 2):
            check_can_sleep(core, record, level)
            await Server(core, record, operation).deepen(level)
            return
        if record.state is State.ASLEEP:
            check_same_level(record, level)
            return
        if record.state is not State.AWAKE:
            raise RefusedError(
                f"Cannot put {name} to sleep: it is {record.state}.", f"Start it (key u, or `start {name}`)."
            )
        if record.resolved_level == "none" and level is None:
            await end(core, record, operation, force=force)
            return
        wanted = own_level(record) if level is None else level
        check_can_sleep(core, record, wanted)
        await Server(core, record, operation).fall_asleep(wanted, force=force)


def check_same_level(record: Record, level: int | None) -> None:
    """Raises RefusedError if a sleeper is asked to sleep at another level."""
    if level is not None and level != record.level:
        raise RefusedError(
            f"{record.name} sleeps at level {record.level}; vLLM cannot go to level {level} without a wake.",
            f"Wake it first, then sleep it at level {level}; its pinned RAM stays until it is stopped.",
        )


def check_can_sleep(core: Core, record: Record, level: int) -> None:
    """Raises RefusedError where vLLM could not bring the model back."""
    if record.resolved_level == "none":
        if why_not := capabilities(record.vllm_version or "").why_not:
            raise RefusedError(*CURES[Failure.TOO_OLD].told(f"Cannot put {record.name} to sleep. {why_not}"))
        raise RefusedError(
            f"{record.name} was started without sleep mode (`level: none`).",
            "Set `level: auto` and restart it.",
        )
    if level == 0 and record.sleep_backend != "own":
        raise RefusedError(*no_level_0(record))
    never = never_level2(core.model(record.name), record.vllm_version, core.loaded.path.parent)
    if level == 2 and never:
        raise RefusedError(f"Level 2 could not bring {record.name} back: {never}.", "Sleep it at level 1.")


# ── stop ─────────────────────────────────────────────────────────────────────────────────────────────────


async def stop_all(core: Core, names: Sequence[str], operation: Operation, force: bool) -> None:
    """Stop models; a start under way, anybody's of this user, is broken off.

    One that is not ours to stop is left out, and named in what is raised once the others have stopped.
    """

    def check(name: str) -> None:
        if not attached.has_own_server(core, name):
            attached.refuse_control(core, name)

    chosen, errors = sifted(names, check)
    results = await asyncio.gather(
        *(stop(core, name, operation, force=force) for name in chosen), return_exceptions=True
    )
    raise_worst([*errors, *results])


async def stop(core: Core, name: str, operation: Operation, *, force: bool) -> None:
    """Stop one model; done if it is stopped."""
    if core.records.read(name).state is State.STARTING:
        word = read_word(core.keeper_file(name))
        if word.launch == core.records.read(name).launch:
            ask_to_stop(word, at_once=False)
    async with locked(core, name, operation, make_room=False):
        record = core.records.read(name)
        if record.state is not State.STOPPED:
            await end(core, record, operation, force=force)
        if (record := core.records.read(name)).last_failure is not None:
            core.write(record, last_failure=None)


async def end(
    core: Core,
    record: Record,
    operation: Operation,
    *,
    force: bool,
    unless: Awaitable[object] | None = None,
) -> None:
    """Close the gate, let answers finish unless forced, end the server, see its memory gone.

    If `unless`, awaited before the end, raises PanelError, the model is awake as before.
    """
    operation.tell(record.name, "stopping")
    intent = Intent(operation=operation.name, phase="drain", since=operation.since, actor=actor())
    if record.state is State.AWAKE:
        server = Server(core, core.write(record, intent=intent), operation)
        try:
            with contextlib.suppress(EngineError):  # a server that does not answer is ended all the same
                await server.drain(force=force)
            if unless is not None:
                await unless
        except PanelError:
            await server.open_gate()
            core.write(record, intent=None)
            raise
    record = core.enter(record, Event.STOP, intent=intent)
    await stop_server(core, record, at_once=force)
