"""The locks of an operation: the GPUs first, then the models, with what others left unfinished settled.

Whoever might have to make room is locked; if the plan, made under the locks, names somebody who has woken
up meanwhile, they are taken anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.locks import Holder, LockBusyError, cure_for, describe, hold, holder
from vllm_sleep_tui.fleet.operation import Operation
from vllm_sleep_tui.fleet.plan import Room
from vllm_sleep_tui.fleet.planning import plan_for
from vllm_sleep_tui.fleet.recovery import is_unfinished, recover
from vllm_sleep_tui.fleet.snapshot import WAITING
from vllm_sleep_tui.fleet.states import State

GATE_LIMIT = 1.0
NO_ROOM_NEEDED = Room(sleeps=(), stops=(), free={}, missing={})


def others_on(core: Core, name: str) -> set[str]:
    """The other models of the config that share a GPU with `name` and whose files can be read."""
    mine = set(core.model(name).gpus)
    models = core.config.models
    near = {key for key, model in models.items() if key != name and mine & set(model.gpus)}
    return near & {record.name for record in core.readable()} if near else near


async def idle_of(core: Core, name: str) -> dict[str, tuple[float, bool]]:
    """Of each awake neighbour its last request and whether it is answering, where there is a choice at all.

    A guard that does not answer within a second leaves the time of the wake as the best that is known.
    """
    records = [core.records.read(key) for key in others_on(core, name)]
    awake = [record for record in records if record.state is State.AWAKE and record.launch]
    if len(awake) < 2:
        return {}
    gates = await asyncio.gather(
        *(core.client(record).gate(GATE_LIMIT) for record in awake), return_exceptions=True
    )
    return {
        record.name: (max(record.since, gate.last_request or 0.0), gate.in_flight > 0)
        for record, gate in zip(awake, gates, strict=True)
        if not isinstance(gate, BaseException)
    }


def awake_on(core: Core, name: str) -> set[str]:
    """The others that are awake there, or asleep with their weights: any of them may have to make room."""
    records = [core.records.read(key) for key in others_on(core, name)]
    return {
        record.name
        for record in records
        if record.state is State.AWAKE or (record.state is State.ASLEEP and record.level == 0)
    }


def gpus_of(core: Core, names: set[str]) -> set[int]:
    """The GPUs that these models are to use, and those that they do use."""
    return {gpu for key in names for gpu in (*core.model(key).gpus, *core.records.read(key).gpus)}


def waiting_words(who: Holder | None) -> str:
    """What is waited for; of a holder that is stopped also what continues it."""
    hint = f"; `kill -CONT {who.pid}` continues it" if who is not None and who.stopped else ""
    return f"waits for {describe(who)}{hint}"


@contextlib.asynccontextmanager
async def locked(
    core: Core, name: str, operation: Operation, *, make_room: bool, seconds: float | None = None
) -> AsyncIterator[Room]:
    """Hold what an operation on `name` touches; yields the plan, made under the locks.

    Raises RefusedError if somebody else holds on for too long.
    """
    names = {name}
    word = holder(operation.name, name, seconds)
    while True:
        if make_room:
            names |= awake_on(core, name)
        names |= {key for key in others_on(core, name) if is_unfinished(core, key)}
        gpus = gpus_of(core, names)
        paths = [*core.gpu_locks(gpus), *core.model_locks(names)]
        async with held(paths, word, operation, name):
            if not gpus_of(core, names) <= gpus:
                continue  # somebody whose config differs has moved one to another GPU meanwhile
            for key in sorted(names):
                await recover(core, key, operation)
            room = plan_for(core, name, idle=await idle_of(core, name)) if make_room else NO_ROOM_NEEDED
            touched = {*room.leaving, *(awake_on(core, name) if make_room else ())}
            if touched <= names:
                yield room
                return
            names |= touched


@contextlib.asynccontextmanager
async def held(paths: list[Path], word: Holder, operation: Operation, name: str) -> AsyncIterator[None]:
    """The locks themselves, cancellable while they are waited for."""

    def waiting(who: Holder | None) -> None:
        operation.tell(name, WAITING, waiting_words(who))

    began = time.monotonic()
    try:
        async with hold(paths, word, waiting=waiting, checkpoint=operation.checkpoint):
            operation.waited(time.monotonic() - began)
            yield
    except LockBusyError as error:
        raise RefusedError(
            f"{name}: its GPU or its record is held by {describe(error.holder)}.",
            cure_for(error.holder, error.path),
        ) from error
