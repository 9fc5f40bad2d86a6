"""One running server in the hands of who holds its locks: drain, sleep, settle, wake, prove.

Before each call to vLLM the intent is on disk, so that a successor can settle it. After a failed call the
truth is asked for, never assumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator, Mapping

import msgspec

from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused
from vllm_sleep_tui.errors import OperationError, RefusedError
from vllm_sleep_tui.fleet import proof
from vllm_sleep_tui.fleet.core import GIB, Core, gib
from vllm_sleep_tui.fleet.ending import cause_in_log, fail
from vllm_sleep_tui.fleet.footprints import Footprint
from vllm_sleep_tui.fleet.keeping import read_word
from vllm_sleep_tui.fleet.operation import Operation, actor
from vllm_sleep_tui.fleet.planning import GpuMemory, check_ram, needed_to_wake, read_memory
from vllm_sleep_tui.fleet.proof import Verdict
from vllm_sleep_tui.fleet.records import Intent, Record, Reference
from vllm_sleep_tui.fleet.states import Event

SETTLE_POLL = 0.003
GATE_LIMIT = 5.0


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
            operation=self.operation.name,
            phase=phase,
            since=self.operation.since,
            actor=actor(),
            level=level,
            eta=None,
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
        self.check_ram_for(level, pool)
        self.intend("drain", level=level, event=Event.SLEEP)
        before = asyncio.ensure_future(self.read_memory())
        try:
            with self.operation.timed("drain"):
                await self.drain(force=force)
                if unless is not None:
                    await unless
        except BaseException:
            before.cancel()
            await self.undo_sleep()
            raise
        verdict = await self.sleep_and_settle(level, pool, await before)
        self.record = self.core.enter(
            self.record, Event.SLEPT, level=level, intent=None, proof=verdict, reason=None, cure=None
        )

    def check_ram_for(self, level: int, pool: int) -> None:
        """Raises RefusedError if level 1 would cause swapping; a `pool` pinned before is used again."""
        if self.frees_memory and level == 1 and not pool:
            check_ram(self.core, self.name)

    async def read_memory(self) -> dict[int, GpuMemory]:
        """The memory of the model's GPUs now."""
        if not self.frees_memory:
            return {}
        return await asyncio.to_thread(read_memory, self.core, set(self.record.gpus))

    async def sleep_and_settle(self, level: int, pool: int, before: Mapping[int, GpuMemory]) -> str | None:
        """The call, and the memory seen gone: the verdict, None where there is no memory to free.

        `pool` is the bytes of RAM that were pinned `before`, when the GPUs' memory was read.
        """
        self.operation.tell(self.name, "sleep")
        with self.operation.timed("sleep"):
            seconds = await self.call_sleep(level)
        with self.operation.timed("settle"):
            verdict, asleep = await self.settle(before)
        what = "sleep1-first" if level == 1 and not pool else f"sleep{level}"
        self.remember_sleep(what, seconds, before, asleep, pool or self.core.pinned_now(self.record))
        return verdict

    async def prime(self) -> None:
        """One sleep and wake while starting, so that the first real switch need not pin RAM.

        The first level 1 sleep is up to 29 times slower than the next (H100, vLLM 0.24). Raises RefusedError
        if the RAM for it is not there; nothing was done then.
        """
        pool = self.core.pinned_now(self.record)
        self.check_ram_for(1, pool)
        self.intend("priming", level=1)
        await self.drain(force=True)
        await self.sleep_and_settle(1, pool, await self.read_memory())
        try:
            await self.wake_from_1()
        except EngineError as error:
            await self.fail(f"vLLM could not wake it: {error}", "Start it again; look at its log.")
        await self.prove()
        await self.open_gate()

    async def drain(self, *, force: bool) -> None:
        """Close the gate and wait for answers under way, within the limit for it; forced: not at all."""
        gate = await self.client.set_gate(True, GATE_LIMIT)
        deadline = time.monotonic() + self.core.limits.drain
        while gate.in_flight and not force and time.monotonic() < deadline:
            self.operation.tell(self.name, "drain", f"{gate.in_flight} answers under way")
            await self.operation.pause(0.05)
            gate = await self.client.gate(GATE_LIMIT)

    async def undo_sleep(self) -> None:
        """Open the gate again and be awake as before."""
        with contextlib.suppress(EngineError):
            await self.client.set_gate(False, GATE_LIMIT)
        self.record = self.core.enter(self.record, Event.SLEEP_UNDONE, intent=None)

    async def call_sleep(self, level: int) -> float:
        """The call itself; seconds it took. A call that timed out may have worked: it is asked after."""
        began = time.perf_counter()
        try:
            await self.client.sleep(level, self.limit())
        except EngineRefused as error:
            await self.fail(f"vLLM refused to sleep: {error}", "It must be restarted: `start` it again.")
        except EngineError as error:
            if not await self.is_sleeping():
                await self.fail(f"It did not fall asleep: {error}", "Look at its log, then start it again.")
        return time.perf_counter() - began

    async def is_sleeping(self) -> bool:
        """Ask; waits through an operation under way. Fails the model if there is no answer."""
        try:
            return await self.client.is_sleeping(self.limit())
        except EngineError as error:
            await self.fail(f"It does not answer: {error}", "Look at its log, then start it again.")
            raise AssertionError from error  # fail raises

    async def settle(self, before: Mapping[int, GpuMemory]) -> tuple[str | None, dict[int, int]]:
        """Poll until the memory is seen gone: the verdict, and bytes left by GPU index where known."""
        if not self.frees_memory:
            return None, {}
        deadline = time.monotonic() + self.core.limits.settle
        while True:
            now = await self.read_memory()
            gone = [self.has_gone(before[gpu], now[gpu], gpu) for gpu in self.record.gpus]
            if None in gone:
                return Verdict.UNVERIFIED, {}
            if all(gone) or time.monotonic() > deadline:
                left = {gpu: held for gpu, m in now.items() if (held := m.held_by(self.record)) is not None}
                return (Verdict.PROVEN if all(gone) else Verdict.UNVERIFIED), left
            await asyncio.sleep(SETTLE_POLL)

    def has_gone(self, before: GpuMemory, now: GpuMemory, gpu: int) -> bool | None:
        """Whether a GPU shows the sleep, by our processes, else by the device; None if neither is known."""
        held_before, held_now = before.held_by(self.record), now.held_by(self.record)
        if held_before is not None and held_now is not None:
            known = self.core.footprint(self.name).asleep.get(str(gpu))
            return held_now <= (held_before / 2 if known is None else known * 1.1 + GIB / 4)
        if before.used is None or now.used is None:
            return None
        return before.used - now.used >= GIB / 2

    def remember_sleep(
        self,
        what: str,
        seconds: float,
        before: Mapping[int, GpuMemory],
        asleep: Mapping[int, int],
        pinned: int,
    ) -> None:
        """Keep what this sleep showed: VRAM before and after, the pinned pool, seconds."""
        awake = {str(gpu): held for gpu, m in before.items() if (held := m.held_by(self.record))}
        left = {str(gpu): held for gpu, held in asleep.items()}

        def change(known: Footprint) -> Footprint:
            known = known.with_time(what, seconds).with_memory(awake=awake, asleep=left)
            return msgspec.structs.replace(known, pinned=pinned or known.pinned)

        self.core.remember(self.record, change)

    # ── wake ─────────────────────────────────────────────────────────────────────────────────────────────

    async def wake(self) -> None:
        """Wake, prove, open the gate; raises RefusedError without room, OperationError if it failed."""
        self.check_room(await self.read_memory())
        level = self.record.level or 1
        self.operation.checkpoint()
        self.intend("wake", level=level, event=Event.WAKE)
        began = time.perf_counter()
        try:
            await (self.wake_from_2() if level == 2 else self.wake_from_1())
        except EngineError as error:
            await self.fail(f"vLLM could not wake it: {error}", "It must be restarted: `start` it again.")
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
                raise RefusedError(
                    f"{self.name} needs {gib(need)} more on GPU {gpu} to wake; {gib(free)} are free.",
                    "Sleep another model on that GPU first, or `switch` to this one.",
                )

    async def wake_from_1(self) -> None:
        """One call; the weights come back from RAM."""
        with self.operation.timed("wake"):
            reply = await self.client.wake_up(timeout=self.limit())
            await self.check_awake(reply.status)

    async def wake_from_2(self) -> None:
        """The four steps that vLLM wants from its client; any of them may be repeated after a crash."""
        with self.operation.timed("wake"):
            with self.step("weights"):
                await self.client.wake_up(("weights",), timeout=self.limit())
            with self.step("reload"):
                await self.client.collective_rpc("reload_weights", self.limit())
            with self.step("kv_cache"):
                reply = await self.client.wake_up(("kv_cache",), timeout=self.limit())
                await self.check_awake(reply.status)
            with self.step("reset"):
                await self.client.reset_prefix_cache(self.core.limits.call)

    @contextlib.contextmanager
    def step(self, phase: str) -> Iterator[None]:
        """A step of a longer wake: intended, then timed."""
        self.intend(phase, level=2)
        with self.operation.timed(phase):
            yield

    async def check_awake(self, status: str | None) -> None:
        """Raises EngineRefused if vLLM said 200 and yet sleeps; versions before 0.32 must be asked."""
        sleeping = status != "awake" if status is not None else await self.client.is_sleeping(self.limit())
        if sleeping:
            raise EngineRefused(200, "it answered 200 and still sleeps", None)

    # ── proof ────────────────────────────────────────────────────────────────────────────────────────────

    async def ask(self) -> tuple[float, ...] | None:
        """The proof's question, one token; None if this model cannot be asked it."""
        answer = await self.client.complete(
            proof.PROMPT, model=self.name, max_tokens=1, prompt_logprobs=1, timeout=self.core.limits.call
        )
        return answer.prompt_logprobs

    async def take_reference(self) -> None:
        """Ask the proof's question of a model that is known to be well, with nothing cached."""
        try:
            await self.client.reset_prefix_cache(self.core.limits.call)
            logprobs = await self.ask()
        except EngineRefused:
            logprobs = None  # a task without completions: health is all that can be proven
        reference = None if logprobs is None else Reference(logprobs=logprobs)
        self.record = self.core.write(self.record, reference=reference)

    async def prove(self) -> str:
        """The first token after a wake, compared with the reference; twice wrong is reloaded, then failed."""
        self.operation.tell(self.name, "prove")
        with self.operation.timed("prove"):
            try:
                if self.record.reference is None:
                    return Verdict.UNPROVEN if await self.client.health() else await self.fail_silent()
                if await self.answers_as_before() or await self.answers_as_before():
                    return Verdict.PROVEN
                await self.client.collective_rpc("reload_weights", self.limit())
                await self.client.reset_prefix_cache(self.core.limits.call)
                if await self.answers_as_before():
                    return Verdict.PROVEN
            except EngineError as error:
                await self.fail(
                    f"It woke and does not answer: {error}", "Look at its log, then start it again."
                )
        await self.fail("It woke and answers nonsense.", "Start it again; avoid this level for it.")
        raise AssertionError

    async def answers_as_before(self) -> bool:
        """Whether the proof's answer is the reference's."""
        assert self.record.reference is not None
        return proof.is_same(await self.ask(), self.record.reference.logprobs)

    async def fail_silent(self) -> str:
        """A woken server whose health is bad."""
        await self.fail("It woke and its health is bad.", "Look at its log, then start it again.")
        raise AssertionError

    async def open_gate(self) -> None:
        """Let requests in."""
        try:
            await self.client.set_gate(False, GATE_LIMIT)
        except EngineError as error:
            await self.fail(f"Its gate did not open: {error}", "Look at its log, then start it again.")

    async def fail(self, reason: str, cure: str) -> None:
        """End the server, keep the reason, and the log's if it ended by itself; raises OperationError."""
        found = cause_in_log(self.record, read_word(self.core.keeper_file(self.name)))
        if found is not None:
            reason, cure = f"{reason} {found.reason}", found.cure
        self.record = await fail(self.core, self.record, reason, cure)
        raise OperationError(f"{self.name}: {self.record.reason}", self.record.cure or cure)
