"""The locks of an operation: the GPUs first, then the models, with what others left unfinished settled.

Whoever might have to make room is locked; if the plan, made under the locks, names somebody who has woken
up meanwhile, they are taken anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.reconcile import is_unfinished, reconcile
from vllm_sleep_tui.fleet.operations.room import (
    Memory,
    give_up,
    have_holders,
    plan_for,
    read_memory,
)
from vllm_sleep_tui.fleet.snapshot import WAITING
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import Holder, LockBusyError, cure_for, describe, hold, holder
from vllm_sleep_tui.sizing.placement import Room

GATE_LIMIT = 1.0
"""Seconds for a neighbour's guard: the answer only ranks who was idle longest."""
CONNECT_SECONDS = 0.2
"""That an operation waits for a connection once it has its locks; a server that hangs is found out later."""
NO_ROOM_NEEDED = Room(sleeps=(), stops=(), free={}, missing={})


def others_on(model: Model, everybody: Iterable[Model] | None = None) -> list[Model]:
    """The other models of the config that share a GPU with this one and whose files can be read.

    `everybody` whose files can be read is looked up unless given.
    """
    mine = set(model.config.gpus)
    near = {other.name for other in model.core.models() if mine & set(other.config.gpus)} - {model.name}
    if not near:
        return []
    return [other for other in everybody or model.core.readable() if other.name in near]


@contextlib.asynccontextmanager
async def connecting(models: Iterable[Model]) -> AsyncIterator[set[asyncio.Future[object]]]:
    """First calls of this process to the servers that run; what is not answered at the end is let go.

    The first call takes 60 ms: it would be paid between the closed gate and the sleep.
    """
    running = [model for model in models if model.record.state in (State.AWAKE, State.ASLEEP)]
    clients = [model.client() for model in running if model.record.launch]
    opening: set[asyncio.Future[object]] = {
        asyncio.ensure_future(client.gate(GATE_LIMIT)) for client in clients if not client.is_warm
    }
    try:
        yield opening
    finally:
        for each in opening:
            each.cancel()
        await asyncio.gather(*opening, return_exceptions=True)


async def idle_of(near: Iterable[Model]) -> dict[str, tuple[float, bool]]:
    """Of each awake neighbour its last request and whether it is answering, where there is a choice at all.

    A guard that does not answer within a second leaves the time of the wake as the best that is known.
    """
    awake = [other for other in near if is_awake(other) and other.record.launch]
    if len(awake) < 2:
        return {}
    gates = await asyncio.gather(
        *(other.client().gate(GATE_LIMIT) for other in awake), return_exceptions=True
    )
    return {
        other.name: (max(other.record.since, gate.last_request or 0.0), gate.in_flight > 0)
        for other, gate in zip(awake, gates, strict=True)
        if not isinstance(gate, BaseException)
    }


async def plan(model: Model, everybody: Sequence[Model]) -> tuple[Room, Memory]:
    """Who of `everybody` must make room for the model, by the memory of its GPUs as it is measured now."""
    idle, memory = await asyncio.gather(
        idle_of(others_on(model, everybody)),
        asyncio.to_thread(read_memory, model.core, set(model.config.gpus)),
    )
    return plan_for(model, memory=memory, idle=idle, everybody=everybody), memory


def is_awake(model: Model) -> bool:
    """Whether its record says so."""
    return model.record.state is State.AWAKE


def awake_in(near: Iterable[Model]) -> set[str]:
    """Those that are awake, or asleep with their weights: any of them may have to make room."""
    return {
        other.name
        for other in near
        if is_awake(other) or (other.record.state is State.ASLEEP and other.record.level == 0)
    }


def gpus_of(models: Iterable[Model]) -> set[int]:
    """The GPUs that these models are to use, and those that they do use."""
    return {gpu for model in models for gpu in (*model.config.gpus, *model.read().gpus)}


def waiting_words(who: Holder | None) -> str:
    """What is waited for; of a holder that is stopped also what continues it."""
    hint = f"; `kill -CONT {who.pid}` continues it" if who is not None and who.stopped else ""
    return f"waits for {describe(who)}{hint}"


@contextlib.asynccontextmanager
async def acquire(
    model: Model, operation: Operation, *, make_room: bool, seconds: float | None = None
) -> AsyncIterator[tuple[Room, Memory]]:
    """Hold what an operation on the model touches; yields the plan, and the memory that it was made by.

    Raises RefusedError if somebody else holds on for too long.
    """
    core, names = model.core, {model.name}
    this = holder(operation.name, model.name, seconds)
    # Once more whenever the locks turn out to be too few: nobody waits for a GPU while holding a model.
    while True:
        near = others_on(model)
        if make_room:
            names |= awake_in(near)
        names |= {other.name for other in near if is_unfinished(other)}
        touched = [core.model(name) for name in sorted(names)]
        gpus = gpus_of(touched)
        paths = [*core.gpu_locks(gpus), *(each.lock for each in touched)]
        async with connecting(touched) as opening, locked(paths, this, operation, model.name):
            if not gpus_of(touched) <= gpus:
                continue  # somebody whose config differs has moved one to another GPU meanwhile
            for each in touched:
                await reconcile(each, operation)
            model.read()  # it may have been reconciled by another handle
            room, needed = NO_ROOM_NEEDED, set[str]()
            memory: Memory = {}
            if make_room:
                everybody = core.readable()  # once: with many models that takes longer than the rest
                room, memory = await plan(model, everybody)
                needed = {*room.leaving, *awake_in(others_on(model, everybody))}
            if needed <= names:
                if opening:
                    await asyncio.wait(opening, timeout=CONNECT_SECONDS)
                starting = asyncio.ensure_future(asyncio.to_thread(have_holders, core, gpus))
                try:
                    yield room, memory
                finally:
                    await starting
                    # What was handed over is taken by now; what is left is nobody's before the next switch.
                    if left := gpus - operation.emptied:
                        await asyncio.to_thread(give_up, core, left)
                return
            names |= needed


@contextlib.asynccontextmanager
async def locked(paths: list[Path], this: Holder, operation: Operation, name: str) -> AsyncIterator[None]:
    """The locks themselves, cancellable while they are waited for; RefusedError that names who holds on."""

    def waiting(who: Holder | None) -> None:
        operation.tell(name, WAITING, waiting_words(who))

    began = time.monotonic()
    try:
        async with hold(paths, this, waiting=waiting, checkpoint=operation.checkpoint):
            operation.waited(time.monotonic() - began)
            yield
    except LockBusyError as error:
        raise RefusedError(
            f"{name}: its GPU or its record is held by {describe(error.holder)}.",
            cure_for(error.holder, error.path),
        ) from error
