"""A model whose server we start: vLLM under a keeper, with our guard; each operation with its locks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from vllm_sleep_tui.engine.guard import CLIENT_HEADER
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import CancelledByUser, PanelError, RefusedError, UsageError
from vllm_sleep_tui.fleet.keeper_client import ask_to_stop, read_status
from vllm_sleep_tui.fleet.levels import check_same_level, never_level2
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.predict import predict
from vllm_sleep_tui.fleet.observe.supervised import observed_state
from vllm_sleep_tui.fleet.operations.acquire import acquire, others_on
from vllm_sleep_tui.fleet.operations.arguments import check_arguments, learn_flags
from vllm_sleep_tui.fleet.operations.end import is_whole
from vllm_sleep_tui.fleet.operations.failures import CURES, Failure
from vllm_sleep_tui.fleet.operations.fetch import fetch
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.patience import patiently
from vllm_sleep_tui.fleet.operations.ports import choose_port
from vllm_sleep_tui.fleet.operations.reconcile import lives
from vllm_sleep_tui.fleet.operations.room import (
    GpuMemory,
    Memory,
    has_level_0,
    own_level,
    refuse_without_room,
)
from vllm_sleep_tui.fleet.operations.server import GATE_LIMIT, Server, no_level_0
from vllm_sleep_tui.fleet.operations.start import PortRaceError, Start, check_startable
from vllm_sleep_tui.fleet.peer_checks import check_own
from vllm_sleep_tui.fleet.server_keys import key_of
from vllm_sleep_tui.fleet.snapshot import Prediction, Serving, SwitchTimes, Way
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Intent
from vllm_sleep_tui.sizing.placement import Room

if TYPE_CHECKING:  # `status` asks no server, and does without it
    from vllm_sleep_tui.engine.client import VllmClient


class Supervised:
    """The backend of a model that the config gives by `model:`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.name = model.name

    # ── observed ─────────────────────────────────────────────────────────────────────────────────────────

    def predict(self, memory: Mapping[int, GpuMemory], serving: Mapping[str, Serving]) -> Prediction:
        """What `switch` would do, in numbers."""
        state, _ = observed_state(self.model)
        return predict(self.model, state, memory, serving)

    async def state(self) -> State:
        """Its state; failed if its server is gone, though nobody has written that down yet."""
        record = self.model.read()
        if record.state is State.AWAKE and not (lives(self.model) and is_whole(record)):
            return State.FAILED  # and somebody else may be on its port by now
        return record.state

    async def endpoint(self) -> tuple[VllmClient, str]:
        """The client of its server, which serves it under the model's own name."""
        self.model.read()
        return self.model.client(), self.name

    async def way(self) -> Way:
        """By its guard's socket, as a client: counted, and refused while the gate is closed."""
        record = self.model.read()
        if record.launch is None or record.port is None or record.state not in (State.AWAKE, State.ASLEEP):
            raise RefusedError(f"{self.name} is {record.state}.", "Start it or wake it.")
        key = key_of(record, self.model.config)
        headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
        if record.socket is not None:
            headers.append((CLIENT_HEADER, b"1"))
        return Way(
            launch=record.launch,
            uds=record.socket,
            url=f"http://127.0.0.1:{record.port}",
            headers=tuple(headers),
            served=self.name,
            check=check_own,
        )

    # ── switch, wake, start ──────────────────────────────────────────────────────────────────────────────

    async def switch(self, operation: Operation, *, force: bool = False) -> SwitchTimes:
        """Make it awake: others sleep first where room is needed, then it wakes or starts."""
        model = self.model
        if model.read().state in (State.STOPPED, State.FAILED):
            check_startable(model)
            check_arguments(model, await learn_flags(model, operation))
            await fetch(model, operation)
        seconds = model.footprint.typical("start")
        async with acquire(model, operation, make_room=True, seconds=seconds) as (room, memory):
            origin = model.record
            if origin.state is State.AWAKE:
                return operation.ledger()
            if origin.state is not State.ASLEEP:
                check_startable(model)
                choose_port(model)  # a taken one is found before anybody sleeps for it
                model.write(last_failure=None)
            refuse_without_room(model, room)
            try:
                seen = await self.clear(room, memory, operation, force=force)
                await self.bring_up(operation, seen=seen)
            except PanelError as error:
                error.cure = f"{error.cure} {self.who_left(room)}".strip()
                raise
            ledger = model.record.last_switch or operation.ledger()
            model.core.note(
                lambda past: past.record_switch(
                    self.name, ledger, level=origin.level, from_state=origin.state, left=room.leaving
                )
            )
            return ledger

    def who_left(self, room: Room) -> str:
        """Says who made room for nothing: it may be that nobody is awake now."""
        states = {name: Model(self.model.core, name).record.state for name in room.leaving}
        return " ".join(
            f"{name} is {state} now: `switch {name}` brings it back."
            for name, state in states.items()
            if state in (State.ASLEEP, State.STOPPED)
        )

    async def clear(self, room: Room, seen: Memory, operation: Operation, *, force: bool) -> Memory:
        """Put the plan's models to sleep; the target shows that it is being switched to meanwhile.

        `seen` is the memory of GPUs before that; it returns how it is after it, as far as that is known.
        """
        model = self.model
        model.write(
            intent=Intent(
                operation=operation.name,
                phase="making room",
                since=operation.since,
                actor=actor(),
                level=model.record.level,
            )
        )
        responds = asyncio.ensure_future(self.check_responds())
        try:
            for leaving in room.leaving:
                operation.checkpoint()
                server = Server(model.core.model(leaving), operation)
                before, seen = seen, {}
                with suppress(RefusedError) if leaving in room.gives_way else nullcontext():
                    keeps = leaving in room.keeps
                    seen = await server.step_aside(
                        force=force, unless=responds, keep_weights=keeps, seen=before
                    )
            await responds
            operation.checkpoint()
            return await self.clear_more(room, operation, seen)
        except BaseException:
            responds.cancel()
            model.read()
            model.write(intent=None)
            raise

    async def clear_more(self, room: Room, operation: Operation, seen: Memory) -> Memory:
        """Have weights that were to stay give way, should they take more than was reckoned with."""
        model = self.model
        target = Server(model, operation)
        for name in sorted(room.keeps) if model.record.state is State.ASLEEP else ():
            seen = await target.memory_after(seen)
            if target.shortage(seen):
                seen = await Server(model.core.model(name), operation).step_aside(force=False)
        return seen

    async def check_responds(self) -> None:
        """Hear from a sleeper before others sleep for it; raises OperationError if it is silent."""
        if self.model.record.state is State.ASLEEP:
            client = self.model.client()
            await patiently(self.model, lambda: client.gate(GATE_LIMIT))

    async def bring_up(
        self, operation: Operation, *, died_from: State | None = None, seen: Memory | None = None
    ) -> None:
        """Wake the sleeper or start the stopped one, see `Start.run`; the room for it has been made.

        `seen` is the memory of GPUs now, as far as it is known.
        """
        model = self.model
        if model.read().state is not State.ASLEEP:
            try:
                await self.start_twice(operation, died_from=died_from)
            except (RefusedError, UsageError):
                model.read()
                model.write(intent=None)
                raise
            return

        async def more_room() -> None:
            for other in others_on(model):
                await Server(other, operation).step_aside(force=False)

        try:
            await Server(model, operation).wake(more_room, seen or {})
        except (RefusedError, CancelledByUser):
            model.write(intent=None)
            raise

    async def start_twice(self, operation: Operation, *, died_from: State | None) -> None:
        """Start it, once more if only the race for a port was lost."""
        try:
            await Start(self.model, operation).run(died_from=died_from)
        except PortRaceError as error:
            operation.tell(self.name, "once more", f"{error.what} It was free a moment ago.")
            await Start(self.model, operation).run(died_from=died_from)

    async def wake(self, operation: Operation) -> None:
        """Wake a sleeper; done if it is awake, refused if it does not run."""
        state = self.model.read().state
        if state in (State.STOPPED, State.FAILED):
            cure = f"Start it (key u, or `start {self.name}`)."
            raise RefusedError(f"Cannot wake {self.name}: it is {state}.", cure)
        await self.switch(operation)

    def check_startable(self) -> None:
        """Raises UsageError if what the config names is not there: the vLLM binary, GPUs, a folder."""
        check_startable(self.model)

    async def start(self, operation: Operation) -> None:
        """Start it; done if it runs, awake or asleep, and not only its record says so."""
        record = self.model.read()
        state = record.state if lives(self.model) and is_whole(record) else State.FAILED
        if state is State.ASLEEP:
            operation.tell(self.name, "asleep", "it runs already; `wake` wakes it")
        elif state is State.AWAKE:
            operation.tell(self.name, "awake", "it runs already")
        else:
            await self.switch(operation)

    # ── sleep ────────────────────────────────────────────────────────────────────────────────────────────

    async def sleep(self, level: int | None, operation: Operation, *, force: bool = False) -> None:
        """Put it to sleep at `level`, or its own; with `level: none` it is stopped instead."""
        async with acquire(self.model, operation, make_room=False):
            record, server = self.model.record, Server(self.model, operation)
            if record.state is State.ASLEEP and record.level == 0 and level in (1, 2):
                self.check_can_sleep(level)
                await server.deepen(level)
                return
            if record.state is State.ASLEEP:
                check_same_level(record, level)
                return
            if record.state is not State.AWAKE:
                raise RefusedError(
                    f"Cannot put {self.name} to sleep: it is {record.state}.",
                    f"Start it (key u, or `start {self.name}`).",
                )
            if record.resolved_level == "none" and level is None:
                await server.stop(force=force)
                return
            wanted = own_level(record) if level is None else level
            self.check_can_sleep(wanted)
            await server.fall_asleep(wanted, force=force)

    def check_can_sleep(self, level: int) -> None:
        """Raises RefusedError where vLLM could not bring the model back."""
        model, record = self.model, self.model.record
        if record.resolved_level == "none":
            if why_not := capabilities(record.vllm_version or "").why_not:
                raise RefusedError(
                    *CURES[Failure.TOO_OLD].told(f"Cannot put {self.name} to sleep. {why_not}")
                )
            raise RefusedError(
                f"{self.name} was started without sleep mode (`level: none`).",
                "Set `level: auto` and restart it.",
            )
        if level == 0 and not has_level_0(record):
            raise RefusedError(*no_level_0(record))
        never = never_level2(model.config, record.vllm_version, model.base)
        if level == 2 and never:
            raise RefusedError(f"Level 2 could not bring {self.name} back: {never}.", "Sleep it at level 1.")

    # ── stop ─────────────────────────────────────────────────────────────────────────────────────────────

    def check_stoppable(self) -> None:
        """It is ours: it may always be stopped."""

    async def stop(self, operation: Operation, *, force: bool) -> None:
        """Stop it; a start under way is broken off."""
        model = self.model
        if model.read().state is State.STARTING:
            status = read_status(model.keeper_file)
            if status.launch == model.record.launch:
                ask_to_stop(status, at_once=False)
        async with acquire(model, operation, make_room=False):
            if model.record.state is not State.STOPPED:
                await Server(model, operation).stop(force=force)
            if model.read().last_failure is not None:
                model.write(last_failure=None)
