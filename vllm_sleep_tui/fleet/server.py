"""One running server in the hands of who holds its locks: drain, sleep, settle, wake, prove.

Before each call to vLLM the intent is on disk, so that a successor can settle it. After a failed call the
truth is asked for, never assumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NoReturn, TypeVar

import msgspec

from vllm_sleep_tui.engine.client import Gate, VllmClient, WakeReply
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused, EngineTimeout, EngineUnreachable
from vllm_sleep_tui.engine.logs import MAX_WHY
from vllm_sleep_tui.errors import OperationError, PanelError, RefusedError
from vllm_sleep_tui.fleet import proof
from vllm_sleep_tui.fleet.arguments import replicas
from vllm_sleep_tui.fleet.core import GIB, Core, gib
from vllm_sleep_tui.fleet.cures import CURES, Failure, may_wake_again, wake_failure
from vllm_sleep_tui.fleet.ending import cut_off_words, fail_as, is_cut_off
from vllm_sleep_tui.fleet.footprints import Footprint
from vllm_sleep_tui.fleet.levels import why_no_level2
from vllm_sleep_tui.fleet.operation import Operation, actor
from vllm_sleep_tui.fleet.patience import patiently
from vllm_sleep_tui.fleet.planning import GpuMemory, has_gone, needed_to_wake, read_memory
from vllm_sleep_tui.fleet.proof import Verdict
from vllm_sleep_tui.fleet.ram import room_to_pin
from vllm_sleep_tui.fleet.records import Intent, Record
from vllm_sleep_tui.fleet.states import Event

SETTLE_POLL = 0.003
GATE_LIMIT = 5.0
FACTS_LIMIT = 10.0
T = TypeVar("T")
MoreRoom = Callable[[], Awaitable[None]]
"""Puts the others on the model's GPUs to sleep."""


def no_level_0(record: Record) -> tuple[str, str]:
    """What and cure: this launch's sleep mode cannot leave the weights in VRAM."""
    why = f": {record.sleep_backend_why}" if record.sleep_backend_why else ""
    return (
        f"{record.name} cannot sleep at level 0 (weights in VRAM): it runs on vLLM's own sleep mode{why}.",
        "Sleep it at level 1 or 2; docs/fast-switch.md tells what our sleep mode needs.",
    )


class Server:
    """The server of one record; the caller holds the model's lock and its GPUs' locks."""

    def __init__(self, core: Core, record: Record, operation: Operation) -> None:
        self.core = core
        self.record = record
        self.operation = operation
        self.client: VllmClient = core.client(record)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.record.name

    @property
    def frees_memory(self) -> bool:
        """False for vLLM on the CPU, where sleep is a state and nothing else."""
        return bool(self.record.gpus)

    def intend(self, phase: str, *, level: int | None = None, event: Event | None = None) -> None:
        """Write what is about to be done; with `event`, enter its state as well.

        Steps of milliseconds are told and not written: a successor asks the server, not the phase.
        """
        intent = Intent(
            operation=self.operation.name, phase=phase, since=self.operation.since, actor=actor(), level=level
        )
        if event is None:
            self.record = self.core.write(self.record, intent=intent)
        else:
            self.record = self.core.enter(self.record, event, intent=intent)
        self.operation.tell(self.name, phase)

    def limit(self) -> float:
        """Seconds that a call which moves the weights may take."""
        footprint = self.core.footprint(self.name)
        weights = footprint.weights or footprint.backed_up or max(footprint.awake.values(), default=0)
        return self.core.limits.call + self.core.limits.call_per_gib * weights / GIB

    # ── sleep ────────────────────────────────────────────────────────────────────────────────────────────

    async def fall_asleep(
        self, level: int, *, force: bool = False, unless: Awaitable[object] | None = None
    ) -> None:
        """Drain, sleep, see the memory gone; raises OperationError and leaves the model failed if vLLM fails.

        Raises RefusedError before anything is done if level 1 has no RAM, and CancelledByUser if the person
        asked for the end while it was draining; the model is awake then, its gate open. So it is if `unless`,
        awaited between drain and sleep, raises.
        """
        pool = self.core.pinned_now(self.record)
        async with self.room_to_pin(level, pool):
            self.intend("drain", level=level, event=Event.SLEEP)
            if level == 2 and (risk := self.level_2_risk()):
                self.operation.tell(self.name, "drain", f"level 2: {risk}; the wake is proven")
            before = asyncio.ensure_future(self.read_memory())
            try:
                with self.operation.timed("drain"):
                    await self.drain(force=force)
                    if unless is not None:
                        await unless
                if level == 0:
                    await self.keep_weights()
            except BaseException:
                before.cancel()
                await self.undo_sleep()
                raise
            verdict, left = await self.sleep_and_settle(level, pool, await before)
            reason, cure = self.kept_memory(verdict, left)
            self.record = self.core.enter(
                self.record,
                Event.SLEPT,
                level=level,
                intent=None,
                proof=verdict,
                reason=reason,
                cure=cure,
                fell=None,
            )

    def level_2_risk(self) -> str | None:
        """What level 2 would lose of it, in words."""
        base = self.core.loaded.path.parent
        return why_no_level2(self.core.model(self.name), self.record.vllm_version, base)

    def room_to_pin(self, level: int, pool: int) -> AbstractAsyncContextManager[None]:
        """RAM for level 1, checked and held; a `pool` pinned before is used again."""
        needed = self.frees_memory and level == 1 and not pool
        return room_to_pin(self.core, self.name, self.operation, needed=needed)

    async def read_memory(self) -> dict[int, GpuMemory]:
        """The memory of the model's GPUs now."""
        if not self.frees_memory:
            return {}
        return await asyncio.to_thread(read_memory, self.core, set(self.record.gpus))

    async def sleep_and_settle(
        self, level: int, pool: int, before: Mapping[int, GpuMemory]
    ) -> tuple[str | None, dict[int, int]]:
        """The call, and the memory seen gone: the verdict, None where there is no memory to free, and what
        is left by GPU index.

        `pool` is the bytes of RAM that were pinned `before`, when the GPUs' memory was read.
        """
        self.operation.tell(self.name, "sleep")
        with self.operation.timed("sleep"):
            seconds = await self.call_sleep(level)
        with self.operation.timed("settle"):
            verdict, left = await self.settle(before, level)
        what = "sleep1-first" if level == 1 and not pool else f"sleep{level}"
        asleep = left if verdict == Verdict.PROVEN else {}
        self.remember_sleep(what, seconds, before, asleep, pool or self.core.pinned_now(self.record), level)
        return verdict, left

    async def prime(self) -> None:
        """One sleep and wake while starting, so that the first real switch need not pin RAM.

        The first level 1 sleep is up to 29 times slower than the next (H100, vLLM 0.24). Raises RefusedError
        if the RAM for it is not there; nothing was done then.
        """
        pool = self.core.pinned_now(self.record)
        async with self.room_to_pin(1, pool):
            self.intend("priming", level=1)
            await self.drain(force=True)
            await self.sleep_and_settle(1, pool, await self.read_memory())
        await self.bring_back(1)
        await self.prove()

    async def drain(self, *, force: bool) -> None:
        """Close the gate and wait for answers under way, within the limit for it; forced: not at all."""
        gate = await self.set_gate(closed=True)
        deadline = time.monotonic() + self.core.limits.drain
        while gate.in_flight and not force and time.monotonic() < deadline:
            self.operation.tell(self.name, "drain", f"{gate.in_flight} answers under way")
            await self.operation.pause(0.05)
            gate = await self.patiently(lambda: self.client.gate(GATE_LIMIT))

    async def undo_sleep(self) -> None:
        """Open the gate again and be awake as before; if it does not open, the intent stays to be settled."""
        left = self.record.intent
        with contextlib.suppress(EngineError):
            await self.set_gate(closed=False)
            left = None
        self.record = self.core.enter(self.record, Event.SLEEP_UNDONE, intent=left)

    async def deepen(self, level: int) -> None:
        """From level 0 to 1 or 2 without a wake; raises RefusedError without RAM, else as `fall_asleep`.

        The level is written before the call: whoever finds the record after a crash wakes it the longer way.
        """
        pool = self.core.pinned_now(self.record)
        async with self.room_to_pin(level, pool):
            before = await self.read_memory()
            self.intend("sleep", level=level)
            self.record = self.core.write(self.record, level=level)
            with self.operation.timed("sleep"):
                try:
                    answers = await self.client.collective_rpc("panel_sleep_deeper", self.limit(), (level,))
                except EngineError as error:
                    await self.fail(Failure.SLEEP_REFUSED, error)
            if any(answer.get("level") != level for answer in answers):
                await self.fail(Failure.SLEEP_REFUSED, "its workers do not sleep at one level.")
            with self.operation.timed("settle"):
                verdict, left = await self.settle(before, level)
            self.remember_sleep(
                "",
                0.0,
                {},
                left if verdict == Verdict.PROVEN else {},
                self.core.pinned_now(self.record),
                level,
            )
            reason, cure = self.kept_memory(verdict, left)
            self.record = self.core.write(self.record, intent=None, proof=verdict, reason=reason, cure=cure)

    async def keep_weights(self) -> None:
        """Tell each worker that the sleep that comes now gives up the KV cache alone.

        Raises RefusedError if one of them has fallen back to vLLM's own sleep mode meanwhile.
        """
        answers = await self.client.collective_rpc("panel_keep_weights", FACTS_LIMIT)
        other = [answer for answer in answers if answer.get("state") != "own"]
        if other or not answers:
            why = str(other[0].get("why", ""))[:MAX_WHY] if other else None
            self.record = self.core.write(self.record, sleep_backend="stock", sleep_backend_why=why)
            raise RefusedError(*no_level_0(self.record))

    async def call_sleep(self, level: int) -> float:
        """The call itself; seconds it took. A call that timed out may have worked: it is asked after.

        To vLLM level 0 is a sleep at level 1, of which our sleep mode was told to leave the weights.
        """
        began = time.perf_counter()
        try:
            asked = level or 1
            reply = await self.waited_for(lambda: self.client.sleep(asked, self.limit()), asleep=True)
            if reply is None and not await self.is_sleeping():
                await self.fail(Failure.SILENT, "it gave no answer to /sleep and is awake.")
        except EngineRefused as error:
            await self.fail(Failure.SLEEP_REFUSED, error)
        except EngineError as error:
            await self.fail(Failure.SILENT, error)
        return time.perf_counter() - began

    async def is_sleeping(self) -> bool:
        """Ask; waits through an operation under way. Fails the model if there is no answer."""
        try:
            return await self.client.is_sleeping(self.limit())
        except EngineError as error:
            await self.fail(Failure.SILENT, error)

    async def settle(self, before: Mapping[int, GpuMemory], level: int) -> tuple[str | None, dict[int, int]]:
        """Poll until the memory is seen gone: the verdict, and bytes left by GPU index where known."""
        if not self.frees_memory:
            return None, {}
        deadline = time.monotonic() + self.core.limits.settle
        while True:
            now = await self.read_memory()
            gone = [
                has_gone(self.core, self.record, before[gpu], now[gpu], gpu, level)
                for gpu in self.record.gpus
            ]
            if None in gone:
                return Verdict.UNVERIFIED, {}
            if all(gone) or time.monotonic() > deadline:
                left = {gpu: held for gpu, m in now.items() if (held := m.held_by(self.record)) is not None}
                return (Verdict.PROVEN if all(gone) else Verdict.UNVERIFIED), left
            await asyncio.sleep(SETTLE_POLL)

    def kept_memory(self, verdict: str | None, left: Mapping[int, int]) -> tuple[str | None, str | None]:
        """What to tell of a sleep after which the memory was seen to be still held; None of any other."""
        if verdict != Verdict.UNVERIFIED or not left:
            return None, None
        what = " and ".join(f"{gib(size)} on GPU {gpu}" for gpu, size in left.items())
        reason, cure = CURES[Failure.MEMORY_KEPT].told(what)
        self.operation.tell(self.name, "settle", reason)
        return reason, cure

    def remember_sleep(
        self,
        what: str,
        seconds: float,
        before: Mapping[int, GpuMemory],
        asleep: Mapping[int, int],
        pinned: int,
        level: int,
    ) -> None:
        """Keep what this sleep showed: VRAM before and after, the pinned pool, seconds."""
        awake = {str(gpu): held for gpu, m in before.items() if (held := m.held_by(self.record))}
        left = {str(gpu): held for gpu, held in asleep.items()}

        def change(known: Footprint) -> Footprint:
            known = known.with_time(what, seconds) if what else known
            known = known.with_memory(awake=awake, asleep={} if level == 0 else left)
            if level == 0:
                known = msgspec.structs.replace(known, resident={**known.resident, **left})
            return msgspec.structs.replace(known, pinned=pinned or known.pinned)

        self.core.remember(self.record, change)

    # ── wake ─────────────────────────────────────────────────────────────────────────────────────────────

    async def wake(self, more_room: MoreRoom | None = None) -> None:
        """Wake, prove, open the gate; raises RefusedError without room or way in, OperationError if it fails.

        `more_room` is made if vLLM runs out of memory all the same and may be asked again.
        """
        if is_cut_off(self.record):
            what, cure = cut_off_words(self.record)
            raise RefusedError(f"{self.name}: {what}", cure)
        self.check_room(await self.read_memory())
        level = 1 if self.record.level is None else self.record.level
        self.operation.checkpoint()
        self.intend("wake", level=level, event=Event.WAKE)
        began = time.perf_counter()
        await self.bring_back(level, more_room)
        seconds = time.perf_counter() - began
        verdict = await self.prove()
        await self.open_gate()
        self.core.remember(self.record, lambda known: known.with_time(f"wake{level}", seconds))
        self.record = self.core.enter(
            self.record,
            Event.WOKE,
            level=None,
            intent=None,
            proof=verdict,
            reason=None,
            cure=None,
            last_switch=self.operation.ledger(),
        )

    def check_room(self, memory: Mapping[int, GpuMemory]) -> None:
        """Raises RefusedError if the VRAM is not there: a wake without room wedges the engine (vLLM 0.24)."""
        for gpu, need in needed_to_wake(self.core, self.record, memory).items():
            free = memory[gpu].free
            if free is not None and need > free:
                figures = f"{self.name} needs {gib(need)} more on GPU {gpu} to wake; {gib(free)} are free."
                raise RefusedError(*CURES[Failure.NO_ROOM].told(figures))

    async def bring_back(self, level: int, more_room: MoreRoom | None = None) -> None:
        """The wake itself, once more after it ran out of memory; raises OperationError if it failed."""
        for attempt in (1, 2):
            try:
                await (self.wake_from_2() if level == 2 else self.wake_from_1())
                return
            except EngineRefused as error:
                again = may_wake_again(self.record, error)
                if not again or attempt == 2:
                    await self.fail(wake_failure(self.record, error), error)
            except EngineError as error:
                await self.fail(Failure.SILENT, error)
            self.operation.tell(self.name, "wake", "out of memory: others make room, then once more")
            if more_room is not None:
                # Whatever hinders the others: half awake is no place to stop at.
                with contextlib.suppress(PanelError):
                    await more_room()

    async def wake_from_1(self) -> None:
        """One call; the weights come back from RAM."""
        with self.operation.timed("wake"):
            reply = await self.waited_for(lambda: self.client.wake_up(timeout=self.limit()))
            await self.check_awake(reply)

    async def wake_from_2(self) -> None:
        """The four steps that vLLM wants from its client; any of them may be repeated after a crash."""
        with self.operation.timed("wake"):
            with self.step("weights"):
                await self.waited_for(lambda: self.client.wake_up(("weights",), timeout=self.limit()))
            with self.step("reload"):
                await self.waited_for(lambda: self.client.collective_rpc("reload_weights", self.limit()))
            with self.step("kv_cache"):
                reply = await self.waited_for(
                    lambda: self.client.wake_up(("kv_cache",), timeout=self.limit())
                )
                await self.check_awake(reply)
            with self.step("reset"):
                await self.client.reset_prefix_cache(self.core.limits.call)

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[None]:
        """A step of a longer wake: intended, then timed."""
        self.intend(phase, level=2)
        with self.operation.timed(phase):
            yield

    async def waited_for(self, call: Callable[[], Awaitable[T]], *, asleep: bool = False) -> T | None:
        """The reply to `call`; None if it was lost, once the engine is through with it.

        A call whose connection broke may never have come there: it is made again if nothing came of it.
        """
        try:
            return await call()
        except EngineTimeout:
            await self.is_sleeping()
            return None
        except EngineUnreachable as error:
            if not error.sent:
                raise
        return None if await self.is_sleeping() is asleep else await call()

    async def check_awake(self, reply: WakeReply | None) -> None:
        """Raises EngineRefused if it still sleeps; without a word of that it is asked (before vLLM 0.32)."""
        status = reply.status if reply is not None else None
        sleeping = status != "awake" if status is not None else await self.client.is_sleeping(self.limit())
        if sleeping:
            raise EngineRefused(200, "it answered 200 and still sleeps", None)

    # ── proof ────────────────────────────────────────────────────────────────────────────────────────────

    async def take_reference(self) -> None:
        """Ask the proof's question of a model that is known to be well, with nothing cached."""
        with contextlib.suppress(EngineRefused):
            await self.client.reset_prefix_cache(self.core.limits.call)
        reference = await proof.ask(self.client, self.name, self.core.limits.call)
        self.record = self.core.write(self.record, reference=reference)

    async def prove(self) -> str:
        """The first token after a wake, compared with the reference; twice wrong is reloaded, then failed."""
        self.operation.tell(self.name, "prove")
        with self.operation.timed("prove"):
            try:
                if self.record.reference is None:
                    if not await self.client.health(self.core.limits.call):
                        await self.fail(Failure.PROOF_REFUSED, "its health is bad.")
                    return Verdict.UNPROVEN
                if await self.is_itself() or await self.is_itself():
                    return proof.proven(self.replicas, self.record.reference)
            except EngineError as error:
                await self.fail(Failure.PROOF_REFUSED, error)
            return await self.reload_and_prove()

    async def reload_and_prove(self) -> str:
        """The cure of wrong answers, tried once; raises OperationError if they stay wrong."""
        self.operation.tell(self.name, "prove", "wrong answers: its weights are loaded again")
        try:
            await self.client.collective_rpc("reload_weights", self.limit())
            await self.client.reset_prefix_cache(self.core.limits.call)
            if await self.is_itself() and self.record.reference is not None:
                return proof.proven(self.replicas, self.record.reference)
        except EngineError as error:
            await self.fail(Failure.ANSWER_WRONG, f"Its weights could not be loaded again: {error}")
        return await self.fail(Failure.ANSWER_WRONG)

    async def is_itself(self) -> bool:
        """Whether it answers as it did when it was known to be well."""
        assert self.record.reference is not None
        return await proof.is_itself(
            self.client, self.name, self.record.reference, self.core.limits.call, self.replicas
        )

    @property
    def replicas(self) -> int:
        """How many data parallel replicas are to be proven."""
        return replicas(self.core, self.name)

    async def set_gate(self, *, closed: bool) -> Gate:
        """Close or open the gate; raises EngineError if the server is silent or refuses."""
        return await self.patiently(lambda: self.client.set_gate(closed, GATE_LIMIT))

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer of a server that may have much to do, see `patience`."""
        return await patiently(self.core, self.record, ask)

    async def open_gate(self) -> None:
        """Let requests in."""
        try:
            await self.set_gate(closed=False)
        except EngineError as error:
            await self.fail(Failure.SILENT, error)

    async def fail(self, failure: Failure, why: object = "") -> NoReturn:
        """End the server, keep the reason; raises OperationError with it. One that is cut off is kept."""
        if is_cut_off(self.record):
            what, cure = cut_off_words(self.record)
            raise OperationError(f"{self.name}: {what}", cure)
        self.record = await fail_as(self.core, self.record, failure, why)
        raise OperationError(f"{self.name}: {self.record.reason}", self.record.cure or "")
