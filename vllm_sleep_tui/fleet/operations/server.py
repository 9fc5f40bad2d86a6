"""One running server in the hands of who holds its locks: drain, sleep, settle, wake, prove.

Before each call to vLLM the intent is on disk, so that a successor can settle it. After a failed call the
truth is asked for, never assumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import msgspec

from vllm_sleep_tui.engine import sleeping
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused
from vllm_sleep_tui.engine.logs import MAX_WHY, LogTail, sleepers_in
from vllm_sleep_tui.engine.proof import Verdict
from vllm_sleep_tui.engine.sleeping import Told
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import PanelError, RefusedError
from vllm_sleep_tui.fleet.levels import never_level2, why_no_level2
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.end import cut_off_words, fail_as, is_cut_off, stop_server
from vllm_sleep_tui.fleet.operations.failures import CURES, Failure, may_wake_again, wake_failure
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.patience import patiently
from vllm_sleep_tui.fleet.operations.prove import Proof
from vllm_sleep_tui.fleet.operations.room import (
    LEAST_GONE,
    LEAST_LISTED,
    GpuMemory,
    Memory,
    check_ram,
    give_up,
    give_up_for_weights,
    has_gone,
    has_level_0,
    needed_to_wake,
    own_level,
    read_memory,
)
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.fleet.store.locks import LockBusyError, cure_for, describe, hold, holder
from vllm_sleep_tui.fleet.store.records import Intent, Record
from vllm_sleep_tui.sizing.footprints import Footprint
from vllm_sleep_tui.units import gib

if TYPE_CHECKING:  # `status` asks no server, and does without it
    from vllm_sleep_tui.engine.client import Gate, VllmClient

SETTLE_POLL = 0.003
GATE_LIMIT = 5.0
FACTS_LIMIT = 10.0
T = TypeVar("T")
MoreRoom = Callable[[], Awaitable[None]]
"""Puts the others on the model's GPUs to sleep."""
LONG_DRAIN = 1.0
"""Seconds after which what was asked and told before a drain is asked and told again."""


class Settled(NamedTuple):
    """What was seen after a sleep."""

    verdict: str | None
    """None where there is no memory to free."""
    left: Mapping[int, int]
    """Bytes that it holds still, by GPU index, where known."""
    memory: Memory
    """Of its GPUs."""


class NoLevel0Error(RefusedError):
    """Its sleep mode cannot leave the weights in VRAM."""


def no_level_0(record: Record) -> tuple[str, str]:
    """What and cure: this launch's sleep mode cannot leave the weights in VRAM."""
    why = f": {record.sleep_backend_why}" if record.sleep_backend_why else ""
    what = f"{record.name} cannot sleep at level 0 (weights in VRAM): it runs on vLLM's own sleep mode{why}."
    if has_level_0(record):  # that is known only now: it was asked for by ours
        return what, f"Ask for it again: that of vLLM {record.vllm_version} leaves them there as well."
    return (
        what,
        "Sleep it at level 1 or 2; our sleep mode can (docs/fast-switch.md), vLLM's own from 0.31 on.",
    )


class Server:
    """The server of one record; the caller holds the model's lock and its GPUs' locks."""

    def __init__(self, model: Model, operation: Operation) -> None:
        self.model = model
        self.core = model.core
        self.name = model.name
        self.operation = operation
        self.proof = Proof(model, operation)

    @property
    def record(self) -> Record:
        """What is known of it."""
        return self.model.record

    @property
    def client(self) -> VllmClient:
        """Asks it."""
        return self.model.client()

    @property
    def frees_memory(self) -> bool:
        """False for vLLM on the CPU, where sleep is a state and nothing else."""
        return bool(self.record.gpus)

    @property
    def is_own(self) -> bool:
        """Whether it sleeps by our sleep mode."""
        return self.record.sleep_backend == "own"

    def intend(self, phase: str, *, level: int | None = None, event: Event | None = None) -> None:
        """Write what is about to be done; with `event`, enter its state as well.

        Steps of milliseconds are told and not written: a successor asks the server, not the phase.
        """
        intent = Intent(
            operation=self.operation.name, phase=phase, since=self.operation.since, actor=actor(), level=level
        )
        if event is None:
            self.model.write(intent=intent)
        else:
            target = self.operation.target
            self.model.enter(event, None if target == self.name else f"for {target}", intent=intent)
        self.operation.tell(self.name, phase)

    # ── sleep ────────────────────────────────────────────────────────────────────────────────────────────

    async def fall_asleep(
        self,
        level: int,
        *,
        force: bool = False,
        unless: Awaitable[object] | None = None,
        seen: Memory | None = None,
    ) -> Memory:
        """Drain, sleep, see the memory gone: it was as `seen` just now; how its GPUs' memory is then.

        Raises OperationError and leaves the model failed if vLLM fails; RefusedError before anything is done
        if level 1 has no RAM; CancelledByUser if the person asked for the end while it was draining: it is
        awake then, its gate open. So it is if `unless`, awaited between drain and sleep, raises.
        """
        pool = self.model.pinned_now() if level else 0
        async with self.room_to_pin(level, pool):
            self.intend("drain", level=level, event=Event.SLEEP)
            if level == 2 and (risk := self.level_2_risk()):
                self.operation.tell(self.name, "drain", f"level 2: {risk}; the wake is proven")
            began, before = time.monotonic(), asyncio.ensure_future(self.memory_after(seen or {}))
            try:
                with self.operation.timed("drain"):
                    await self.drain_for(level, force=force, unless=unless)
                memory = await before
                if time.monotonic() - began > LONG_DRAIN:
                    memory = await self.read_memory()
            except BaseException:
                before.cancel()
                await self.undo_sleep(level)
                raise
            settled = await self.sleep_and_settle(level, pool, memory)
            reason, cure = self.kept_memory(settled)
            self.model.enter(Event.SLEPT, level=level, proof=settled.verdict, reason=reason, cure=cure)
            return settled.memory

    async def drain_for(self, level: int, *, force: bool, unless: Awaitable[object] | None) -> None:
        """Drain; the workers are told meanwhile if the weights are to stay. See `fall_asleep`."""
        began = time.monotonic()
        wish = asyncio.ensure_future(self.keep_weights()) if level == 0 and self.is_own else None
        try:
            await self.drain(force=force, unless=wish)
            if unless is not None:
                await unless
            if wish is not None:
                await wish
                if time.monotonic() - began > LONG_DRAIN:
                    await self.keep_weights()  # it forgets after some seconds
        except BaseException:
            if wish is not None:
                wish.cancel()
                await asyncio.gather(wish, return_exceptions=True)
            raise

    def level_2_risk(self) -> str | None:
        """What level 2 would lose of it, in words."""
        return why_no_level2(self.model.config, self.record.vllm_version, self.model.base)

    @contextlib.asynccontextmanager
    async def room_to_pin(self, level: int, pool: int) -> AsyncIterator[None]:
        """RAM for level 1, checked and held; a `pool` pinned before is used again.

        One first level 1 sleep at a time on the whole machine: two on different GPUs would both find the RAM
        free, and the second would fail in the middle of its sleep. Raises RefusedError if it is short.
        """
        if not self.frees_memory or level != 1 or pool:
            yield
            return
        lock, this = self.core.ram_lock(), holder("pinning", self.name)
        try:
            async with hold([lock], this, checkpoint=self.operation.checkpoint):
                check_ram(self.model)
                yield
        except LockBusyError as error:
            raise RefusedError(
                f"{self.name}: the right to pin RAM is held by {describe(error.holder)}.",
                cure_for(error.holder, error.path),
            ) from error

    async def read_memory(self) -> dict[int, GpuMemory]:
        """The memory of the model's GPUs now."""
        if not self.frees_memory:
            return {}
        return await asyncio.to_thread(read_memory, self.core, set(self.record.gpus))

    async def sleep_and_settle(self, level: int, pool: int, before: Mapping[int, GpuMemory]) -> Settled:
        """The call, and the memory seen gone.

        `pool` is the bytes of RAM that were pinned `before`, when the GPUs' memory was read.
        """
        self.operation.tell(self.name, "sleep")
        log = self.log_instead(before)
        began = time.perf_counter()
        with self.operation.timed("sleep"):
            await self.call_sleep(level)
        with self.operation.timed("settle"):
            settled = await self.settle(before, level, log)
        seconds = time.perf_counter() - began
        what = "sleep1-first" if level == 1 and not pool else f"sleep{level}"
        pinned = pool if pool or level == 0 else self.model.pinned_now()
        self.remember_sleep(what, seconds, before, settled, pinned, level)
        return settled

    async def prime(self) -> None:
        """One sleep and wake while starting: the first real switch need not pin RAM, and its time is known.

        The first level 1 sleep is up to 29 times slower than the next (H100, vLLM 0.24). Raises RefusedError
        if the RAM for it is not there; nothing was done then.
        """
        pool = self.model.pinned_now()
        async with self.room_to_pin(1, pool):
            self.intend("priming", level=1)
            await self.drain(force=True)
            await self.sleep_and_settle(1, pool, await self.read_memory())
        began = time.perf_counter()
        await self.bring_back(1)
        await self.proof.prove()
        seconds = time.perf_counter() - began
        self.model.remember(lambda known: known.with_time("wake1", seconds))

    async def drain(self, *, force: bool, unless: asyncio.Future[None] | None = None) -> None:
        """Close the gate and wait for answers under way, within the limit for it; forced: not at all.

        What `unless` raises meanwhile is raised at once.
        """
        gate = await self.set_gate(closed=True)
        deadline, client = time.monotonic() + self.core.limits.drain, self.client
        while gate.in_flight and not force and time.monotonic() < deadline:
            if unless is not None and unless.done():
                await unless
            self.operation.tell(self.name, "drain", f"{gate.in_flight} answers under way")
            await self.operation.pause(0.05)
            gate = await self.patiently(lambda: client.gate(GATE_LIMIT))

    async def undo_sleep(self, level: int | None) -> None:
        """Open the gate again and be awake as before the sleep at `level`, of which nobody shall know.

        If the gate does not open, the intent stays to be settled.
        """
        left = self.record.intent
        if level == 0:  # of some workers it may be ours still
            await sleeping.forget_weights(self.client, FACTS_LIMIT)
        with contextlib.suppress(EngineError):
            await self.set_gate(closed=False)
            left = None
        self.model.enter(Event.SLEEP_UNDONE, intent=left)

    async def deepen(self, level: int) -> Memory:
        """From level 0 to 1 or 2 without a wake; raises RefusedError without RAM, else as `fall_asleep`.

        Without RAM it sleeps on as it did. The level that is meant stands in the intent alone until it is
        reached: whoever finds that after a crash asks the workers.
        """
        pool = self.model.pinned_now()
        async with self.room_to_pin(level, pool):
            before = await self.read_memory()
            self.intend("sleep", level=level)
            log = self.log_instead(before)
            with self.operation.timed("sleep"):
                try:
                    workers = await sleeping.sleep_deeper(
                        self.client, level, self.model.moving_seconds, is_own=self.is_own
                    )
                except EngineError as error:
                    await self.fail(Failure.SLEEP_REFUSED, error)
            reached = sleeping.deepest(workers)
            if reached is None:
                await self.fail(Failure.SLEEP_REFUSED, "its workers do not tell how they sleep.")
            self.model.write(level=reached)
            if refused := [worker.refused for worker in workers if worker.refused]:
                self.model.write(intent=None)
                some = "" if len(refused) == len(workers) else f" of {len(refused)} of {len(workers)} workers"
                raise RefusedError(
                    f"{self.name} cannot move its weights{some} to RAM: {refused[0][:MAX_WHY]}.",
                    "Free RAM, or sleep it at level 2; it sleeps on, and those weights stay in VRAM.",
                )
            with self.operation.timed("settle"):
                settled = await self.settle(before, level, log)
            self.remember_sleep("", 0.0, {}, settled, self.model.pinned_now(), level)
            reason, cure = self.kept_memory(settled)
            self.model.write(intent=None, proof=settled.verdict, reason=reason, cure=cure)
            return settled.memory

    async def keep_weights(self) -> None:
        """Tell each worker that the sleep that comes now gives up the KV cache alone.

        Raises RefusedError if one of them has fallen back to vLLM's own sleep mode meanwhile.
        """
        facts = await sleeping.keep_weights(self.client, FACTS_LIMIT)
        other = [worker for worker in facts if not worker.is_own]
        if other or not facts:
            why = (other[0].why or "")[:MAX_WHY] if other else None
            self.model.write(sleep_backend="stock", sleep_backend_why=why)
            raise NoLevel0Error(*no_level_0(self.record))

    async def call_sleep(self, level: int) -> None:
        """The call itself."""
        try:
            await sleeping.sleep(self.client, level, self.model.moving_seconds, is_own=self.is_own)
        except EngineRefused as error:
            await self.fail(Failure.SLEEP_REFUSED, error)
        except EngineError as error:
            await self.fail(Failure.SILENT, error)

    async def is_sleeping(self) -> bool:
        """Ask; waits through an operation under way. Fails the model if there is no answer."""
        try:
            return await self.client.is_sleeping(self.model.moving_seconds)
        except EngineError as error:
            await self.fail(Failure.SILENT, error)

    def log_instead(self, before: Mapping[int, GpuMemory]) -> LogTail | None:
        """What the server logs from now on, where the GPUs' memory `before` a sleep does not tell."""
        known = [now.used is not None or now.held_by(self.record) is not None for now in before.values()]
        if all(known) or self.record.log is None:
            return None
        log = LogTail(Path(self.record.log))
        try:
            log.last(0)
        except OSError:
            return None
        return log

    async def settle(self, before: Mapping[int, GpuMemory], level: int, log: LogTail | None) -> Settled:
        """Poll until the memory is seen gone.

        By our processes, else by the device's change; where neither is known, by what each worker has written
        into the `log`: vLLM's own account.
        """
        if not self.frees_memory:
            return Settled(None, {}, {})
        deadline, sleepers = time.monotonic() + self.core.limits.settle, 0
        least, has_asked = LEAST_GONE, level != 0
        while True:
            now = await self.read_memory()
            gone = [
                has_gone(self.model, before[gpu], now[gpu], gpu, level, least) for gpu in self.record.gpus
            ]
            if None in gone:
                if log is None or time.monotonic() > deadline:
                    return Settled(Verdict.UNVERIFIED, {}, now)
                sleepers += sleepers_in(log.read_new())
                if sleepers >= len(self.record.gpus):
                    return Settled(Verdict.PROVEN, {}, now)
            elif all(gone) or time.monotonic() > deadline:
                left = {gpu: held for gpu, m in now.items() if (held := m.held_by(self.record)) is not None}
                return Settled(Verdict.PROVEN if all(gone) else Verdict.UNVERIFIED, left, now)
            if not has_asked:
                least, has_asked = await self.told_gone(now), True
            await asyncio.sleep(SETTLE_POLL)

    async def told_gone(self, now: Memory) -> int:
        """What must be seen gone after a sleep at level 0: of a small KV cache half of what it tells.

        vLLM's own sleep mode tells nothing, and gives up nothing else either: what has gone of its processes'
        memory, `now` listed, is its KV cache.
        """
        if not self.is_own:
            is_listed = all(memory.held_by(self.record) is not None for memory in now.values())
            return LEAST_LISTED if is_listed else LEAST_GONE
        with contextlib.suppress(EngineError):
            workers = await sleeping.worker_facts(self.client, FACTS_LIMIT)
            told = [worker.freed_bytes // 2 for worker in workers if worker.freed_bytes is not None]
            return min([LEAST_GONE, *told])
        return LEAST_GONE

    def kept_memory(self, settled: Settled) -> tuple[str | None, str | None]:
        """What to tell of a sleep after which the memory was seen to be still held; None of any other."""
        if settled.verdict != Verdict.UNVERIFIED or not settled.left:
            return None, None
        what = " and ".join(f"{gib(size)} on GPU {gpu}" for gpu, size in settled.left.items())
        reason, cure = CURES[Failure.MEMORY_KEPT].told(what)
        self.operation.tell(self.name, "settle", reason)
        return reason, cure

    def remember_sleep(
        self,
        what: str,
        seconds: float,
        before: Mapping[int, GpuMemory],
        settled: Settled,
        pinned: int,
        level: int,
    ) -> None:
        """Keep what this sleep showed: VRAM before and after, the pinned pool, seconds."""
        awake = {str(gpu): held for gpu, m in before.items() if (held := m.held_by(self.record))}
        is_proven = settled.verdict == Verdict.PROVEN
        left = {str(gpu): held for gpu, held in settled.left.items()} if is_proven else {}

        def change(known: Footprint) -> Footprint:
            known = known.with_time(what, seconds) if what else known
            known = known.with_memory(awake=awake, asleep={} if level == 0 else left)
            if level == 0:
                known = msgspec.structs.replace(known, resident={**known.resident, **left})
            return msgspec.structs.replace(known, pinned=pinned or known.pinned)

        self.model.remember(change)

    # ── makes room, stops ────────────────────────────────────────────────────────────────────────────────

    async def step_aside(
        self,
        *,
        force: bool,
        unless: Awaitable[object] | None = None,
        keep_weights: bool = False,
        seen: Memory | None = None,
    ) -> Memory:
        """Make room, the way its level says, unless `unless` raises before it is too late.

        `keep_weights`: there is room for them, so its KV cache is enough. `seen` is the memory of GPUs just
        now, as far as it is known; it returns how it is then.
        """
        record = self.record
        if record.state is State.ASLEEP and record.level == 0:
            return await self.give_up_weights()
        if record.state is State.AWAKE and record.resolved_level == "none":
            await self.stop(force=force, unless=unless)
        elif record.state is State.AWAKE:
            if keep_weights:
                with contextlib.suppress(NoLevel0Error):  # vLLM's own sleep mode, by now
                    return await self.fall_asleep(0, force=force, unless=unless, seen=seen)
            return await self.fall_asleep(own_level(record), force=force, unless=unless, seen=seen)
        return {}

    async def give_up_weights(self) -> Memory:
        """A sleeper at level 0 moves its weights to RAM, or gives them up where the RAM is short."""
        try:
            return await self.deepen(1)
        except RefusedError:
            if never_level2(self.model.config, self.record.vllm_version, self.model.base):
                raise
            return await self.deepen(2)

    async def stop(self, *, force: bool, unless: Awaitable[object] | None = None) -> None:
        """Close the gate, let answers finish unless forced, end the server, see its memory gone.

        If `unless`, awaited before the end, raises PanelError, the model is awake as before.
        """
        self.operation.tell(self.name, "stopping")
        intent = Intent(
            operation=self.operation.name, phase="drain", since=self.operation.since, actor=actor()
        )
        if self.record.state is State.AWAKE:
            self.model.write(intent=intent)
            try:
                with contextlib.suppress(EngineError):  # a server that does not answer is ended all the same
                    await self.drain(force=force)
                if unless is not None:
                    await unless
            except PanelError:
                await self.open_gate()
                self.model.write(intent=None)
                raise
        self.model.enter(Event.STOP, intent=intent)
        await stop_server(self.model, at_once=force)

    # ── wake ─────────────────────────────────────────────────────────────────────────────────────────────

    async def wake(self, more_room: MoreRoom | None = None, seen: Memory | None = None) -> None:
        """Wake, prove, open the gate; raises RefusedError without room or way in, OperationError if it fails.

        `more_room` is made if vLLM runs out of memory all the same and may be asked again; `seen` is the
        memory of GPUs now, as far as it is known.
        """
        if is_cut_off(self.record):
            what, cure = cut_off_words(self.record)
            raise RefusedError(f"{self.name}: {what}", cure)
        memory = await self.memory_after(seen or {})
        if self.shortage(memory) is not None:
            await asyncio.to_thread(give_up, self.core, self.record.gpus)
            memory = await self.read_memory()
        self.check_room(memory)
        level = 1 if self.record.level is None else self.record.level
        self.operation.checkpoint()
        self.intend("wake", level=level, event=Event.WAKE)
        began = time.perf_counter()
        await self.leave_room(memory, level)
        async with self.proof.asked_along(level) as asked:
            await self.bring_back(level, more_room, is_asked=asked is not None)
            # What of the pool nobody has taken is given up beside the proof, not after it.
            giving_up = asyncio.ensure_future(asyncio.to_thread(give_up, self.core, self.record.gpus))
            try:
                verdict = await self.proof.prove(asked)
            finally:
                await giving_up
        seconds = time.perf_counter() - began
        self.operation.emptied |= set(self.record.gpus)
        await self.open_gate()
        self.model.remember(lambda known: known.with_time(f"wake{level}", seconds))
        self.model.enter(
            Event.WOKE,
            proof=verdict,
            last_switch=self.operation.ledger(),
        )

    async def memory_after(self, seen: Memory) -> Memory:
        """The memory of the model's GPUs as it was `seen` just now, else as it is now."""
        return seen if seen.keys() >= set(self.record.gpus) else await self.read_memory()

    def check_room(self, memory: Mapping[int, GpuMemory]) -> None:
        """Raises RefusedError if the VRAM is not there: a wake without room wedges the engine (vLLM 0.24)."""
        if (figures := self.shortage(memory)) is not None:
            raise RefusedError(*CURES[Failure.NO_ROOM].told(figures))

    def shortage(self, memory: Mapping[int, GpuMemory]) -> str | None:
        """Where VRAM is short for a wake, in a sentence; None if it is there, or not known."""
        for gpu, need in needed_to_wake(self.model, memory).items():
            free = memory[gpu].free
            if free is not None and need > free:
                return f"{self.name} needs {gib(need)} more on GPU {gpu} to wake; {gib(free)} are free."
        return None

    async def leave_room(self, memory: Mapping[int, GpuMemory], level: int) -> None:
        """Have the pools give up what the wake cannot take from them: copies of weights go to new memory."""
        if self.record.sleep_backend != "own":
            await asyncio.to_thread(give_up, self.core, self.record.gpus)
            return
        await asyncio.to_thread(give_up_for_weights, self.model, memory, level)

    async def bring_back(
        self, level: int, more_room: MoreRoom | None = None, *, is_asked: bool = False
    ) -> None:
        """The wake itself, once more after it ran out of memory; raises OperationError if it failed.

        Whether all of it is awake is left to the proof if its question `is_asked` already.
        """
        told = Told.LATER if is_asked else Told.ALONG
        if capabilities(self.record.vllm_version or "").wake_tells:
            told = Told.AFTER  # the reply says it
        for attempt in (1, 2):
            try:
                with self.operation.timed("wake"):
                    await sleeping.wake(
                        self.client,
                        level,
                        self.model.moving_seconds,
                        self.step,
                        quick=self.core.limits.call,
                        told=told,
                    )
                return
            except EngineRefused as error:
                again = may_wake_again(self.record, error)
                if not again or attempt == 2:
                    await self.fail(wake_failure(self.record, error), error)
            except EngineError as error:
                await self.fail(Failure.SILENT, error)
            self.operation.tell(self.name, "wake", "out of memory: others make room, then once more")
            await asyncio.to_thread(give_up, self.core, self.record.gpus)
            if more_room is not None:
                # Whatever hinders the others: half awake is no place to stop at.
                with contextlib.suppress(PanelError):
                    await more_room()

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[None]:
        """A step of a longer wake: intended, then timed."""
        self.intend(phase, level=2)
        with self.operation.timed(phase):
            yield

    # ── its gate, its end ────────────────────────────────────────────────────────────────────────────────

    async def set_gate(self, *, closed: bool) -> Gate:
        """Close or open the gate; raises EngineError if the server is silent or refuses."""
        client = self.client
        return await self.patiently(lambda: client.set_gate(closed, GATE_LIMIT))

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer of a server that may have much to do, see `patience`."""
        return await patiently(self.model, ask)

    async def open_gate(self) -> None:
        """Let requests in."""
        try:
            await self.set_gate(closed=False)
        except EngineError as error:
            await self.fail(Failure.SILENT, error)

    async def fail(self, failure: Failure, why: object = "") -> NoReturn:
        """End the server, keep the reason; raises OperationError with it."""
        await fail_as(self.model, failure, why)
