"""Models given by `url:`: servers that somebody else started. They answer, sleep and wake where their server
allows it; they are never started or ended, make no room and are given none: whose GPU they use is not known.

No record's state is kept of them, the server is asked; the record holds the level, the reference of the proof
and what is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm_sleep_tui.engine import proof, sleeping
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused, EngineTimeout, StillAsleep
from vllm_sleep_tui.engine.loaders import why_no_reload
from vllm_sleep_tui.engine.metrics import Page
from vllm_sleep_tui.engine.plain_client import CLOSED
from vllm_sleep_tui.engine.proof import Reference, Verdict
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import OperationError, RefusedError
from vllm_sleep_tui.fleet.attached.probe import (
    LOOK,
    ProbeResult,
    after,
    base_of,
    owns_server,
    probe_all,
    resolved,
    wants_key,
)
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.levels import check_same_level
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.acquire import locked
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.room import GpuMemory
from vllm_sleep_tui.fleet.operations.supervised import Supervised
from vllm_sleep_tui.fleet.peer_checks import check_for_key
from vllm_sleep_tui.fleet.poller import Poller
from vllm_sleep_tui.fleet.snapshot import Prediction, Serving, SwitchTimes, Way
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import holder
from vllm_sleep_tui.fleet.store.records import Intent
from vllm_sleep_tui.units import counted

if TYPE_CHECKING:  # `status` asks no server, and does without it
    from vllm_sleep_tui.engine.client import VllmClient

INTERVAL = 2.0
"""Seconds between two probes for the panel."""
PROBE_SECONDS = 1.5
ASK_SECONDS = 60.0
SURE_SECONDS = 10.0
"""For a server to say or show whether it sleeps, before it is called unknown."""
MOVE_SECONDS = 900.0
"""For a sleep or a wake: the size of the weights is not known here."""
DRAIN_SECONDS = 30.0
DRAIN_POLL = 0.1


def prober(core: Core) -> Poller:
    """Probes the attached servers again and again, for the screen."""
    return Poller("the probe of attached servers", INTERVAL, lambda: probe(core.models()))


async def probe(models: Sequence[Model], seconds: float = PROBE_SECONDS) -> None:
    """Probe those of the models that are attached, `seconds` at most, and keep what is seen."""
    configs = {model.name: model.config for model in models if model.config.is_attached}
    if configs:
        results = models[0].core.probes
        for name, result in (await asyncio.to_thread(probe_all, configs, seconds)).items():
            results[name] = after(results.get(name), result)


class Attached:
    """The backend of a model that the config gives by `url:`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.name = model.name

    @property
    def client(self) -> VllmClient:
        """The client of its server."""
        return self.model.core.client_at(self.model.config)

    @property
    def last_probe(self) -> ProbeResult | None:
        """How the server was when it was last probed; None if it was not yet."""
        return self.model.core.probes.get(self.name)

    # ── observed ─────────────────────────────────────────────────────────────────────────────────────────

    def predict(self, memory: Mapping[int, GpuMemory], serving: Mapping[str, Serving]) -> Prediction:
        """What `switch` would do: nobody else is touched."""
        name, seen = self.name, self.last_probe
        if seen is None or seen.state is State.STOPPED:
            why = seen.reason if seen and seen.reason else "It has not been looked at yet."
            return Prediction(target=name, action="refused", sentence=f"{name} cannot be started here. {why}")
        if seen.state is State.AWAKE:
            return Prediction(target=name, action="nothing", sentence=f"{name} is awake.")
        last = self.model.record.last_switch  # of it alone: nobody sleeps for it
        return Prediction(
            target=name,
            action="wake",
            seconds=last.total if last is not None and last.is_wake else None,
            sentence=f"Wakes {name} on its own server.",
        )

    async def state(self) -> State:
        """Its state, asked now; raises RefusedError if its server does not answer."""
        return (await self.probe()).state

    async def probe(self) -> ProbeResult:
        """How the server is now; raises RefusedError if it does not answer."""
        await probe([self.model])
        result = self.model.core.probes[self.name]
        if result.state is State.STOPPED:
            raise RefusedError(f"{self.name}: {result.reason}", result.cure or LOOK)
        return result

    async def endpoint(self) -> tuple[VllmClient, str]:
        """Its client, and what the server calls the model; raises OperationError if it does not tell."""
        return self.client, await self.served_name()

    async def served_name(self) -> str:
        """What the server calls the model: our name if it has it, else its first; raises OperationError."""
        with self.allowed("ask"):
            cards = await self.client.models()
        names = [card.id for card in cards]
        if not names:
            raise OperationError(f"{self.name}: its server serves no model.", LOOK)
        return self.name if self.name in names else names[0]

    async def way(self) -> Way:
        """By its address, with its key."""
        config, served = self.model.config, await self.served_name()
        key = config.api_key
        return Way(
            launch=f"{config.url} {served}",
            uds=None,
            url=base_of(config.url or ""),
            headers=((b"authorization", b"Bearer " + key.encode()),) if key else (),
            served=served,
            check=check_for_key(config),
        )

    # ── start, stop ──────────────────────────────────────────────────────────────────────────────────────

    def check_startable(self) -> None:
        """Raises RefusedError: it cannot be started from here."""
        raise RefusedError(
            f"{self.name} is attached by `url: {self.model.config.url}`: "
            "its server is not ours to start or stop.",
            "Do it where that server was started, or give `model:` instead of `url:`.",
        )

    async def start(self, operation: Operation) -> None:
        """Raises RefusedError, see `check_startable`."""
        self.check_startable()

    def check_stoppable(self) -> None:
        """Raises RefusedError unless a server that was started here before it got its `url:` still runs."""
        if not owns_server(self.model.read()):
            self.check_startable()

    async def stop(self, operation: Operation, *, force: bool) -> None:
        """End the server that was started here before the model got its `url:`; RefusedError without one."""
        self.check_stoppable()
        await Supervised(self.model).stop(operation, force=force)

    # ── switch, wake ─────────────────────────────────────────────────────────────────────────────────────

    async def switch(self, operation: Operation, *, force: bool = False) -> SwitchTimes:
        """Make it awake; nobody else is put to sleep for it."""
        async with self.alone(operation):
            seen = await self.probe()
            if seen.state is State.ASLEEP or (not seen.tells_sleep and await self.sleeps(operation)):
                await self.wake_from(seen.level or self.model.record.level or 1, operation)
            return operation.ledger()

    async def wake(self, operation: Operation) -> None:
        """The same: what runs elsewhere is awake or asleep."""
        await self.switch(operation)

    async def sleeps(self, operation: Operation) -> bool:
        """Whether it sleeps, of a server that did not tell at once; raises OperationError if that stays so.

        The question waits while the engine falls asleep or wakes. Where it is closed an answer is the proof:
        a sleeper never gives one.
        """
        operation.tell(self.name, "asking", "whether it sleeps")
        with contextlib.suppress(EngineRefused):
            try:
                return await self.client.is_sleeping(SURE_SECONDS)
            except EngineTimeout as error:
                raise self.unsure() from error
        try:
            await proof.one_token(self.client, await self.served_name(), SURE_SECONDS)
        except EngineTimeout as error:
            raise self.unsure() from error
        return False

    def unsure(self) -> OperationError:
        """What to tell of a server that does not say whether it sleeps."""
        return OperationError(
            f"{self.name}: its server answers, and does not tell within {SURE_SECONDS:.0f} s "
            "whether it sleeps.",
            "It may be asleep, or on its way: try again, or wake it where it was started.",
        )

    async def wake_from(self, level: int, operation: Operation) -> None:
        """The wake of a sleeper, and its proof."""
        self.intend(operation, "wake", level)
        with operation.timed("wake"), self.allowed("wake"):
            try:
                await sleeping.wake(self.client, level, MOVE_SECONDS, operation.timed, quick=ASK_SECONDS)
            except StillAsleep as error:
                what = f"{self.name}: its server said yes and still sleeps."
                raise OperationError(what, "Look at its log.") from error
        with operation.timed("prove"), self.allowed("answer"):
            verdict = await self.prove()
        self.model.write(level=None, proof=verdict, last_switch=operation.ledger())

    async def prove(self) -> Verdict:
        """The answer compared with the one before the sleep; raises OperationError if it is nonsense."""
        reference = self.model.record.reference
        if reference is None:
            return Verdict.UNPROVEN
        for _ in range(2):  # the first answer after a wake may be computed in another order
            if proof.is_same(await self.ask(), reference.logprobs):
                return Verdict.PROVEN
        raise OperationError(
            f"{self.name} woke and does not answer as before it slept.", "Restart it where it was started."
        )

    # ── sleep ────────────────────────────────────────────────────────────────────────────────────────────

    async def sleep(
        self,
        level: int | None,
        operation: Operation,
        *,
        force: bool = False,
        unless: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Put it to sleep where its server allows it; done if it sleeps at this level.

        If `unless`, asked at once and when no answer is under way, raises PanelError, it stays awake.
        """
        async with self.alone(operation):
            seen = await self.probe()
            if seen.state is State.ASLEEP:
                if at := seen.level or self.model.record.level:
                    check_same_level(self.model.write(level=at), level)
                return
            wanted = self.own_level() if level is None else level
            if wanted == 0:
                raise RefusedError(
                    f"{self.name} was not started by the panel: its weights cannot stay in VRAM (level 0).",
                    "Sleep it at level 1 or 2.",
                )
            version = await self.check_version()
            if wanted == 2:
                await self.check_reload(version)
            if unless is not None:
                await unless()
            await self.drain(operation, force=force)
            if unless is not None:
                await unless()
            await self.take_reference()
            await self.fall_asleep(wanted, operation)

    def own_level(self) -> int:
        """The level of its config; raises RefusedError for `level: none`."""
        level = resolved(self.model.config)
        if level == "none":
            raise RefusedError(
                f"{self.name} has `level: none` and is attached: it cannot be stopped from here instead.",
                "Name a level: --level 1 or 2, or write it in the config.",
            )
        return int(level)

    async def check_version(self) -> str:
        """Its version; raises RefusedError for a vLLM whose sleep is not reliable."""
        with self.allowed("sleep"):
            version = await self.client.version()
        why_not = capabilities(version).why_not
        if why_not is not None:
            raise RefusedError(f"{self.name}: {why_not}", "Run a newer vLLM there.")
        return version

    async def check_reload(self, version: str) -> None:
        """Raises RefusedError if its server loads the model in a way that level 2 cannot repeat."""
        with self.allowed("sleep"):
            configured = await self.client.configured(ASK_SECONDS)
        if configured is None:
            return
        model = configured.model_config
        if never := why_no_reload(model.model, configured.args, version, model.quantization):
            raise RefusedError(f"Level 2 could not bring {self.name} back: {never}.", "Sleep it at level 1.")

    async def drain(self, operation: Operation, *, force: bool) -> None:
        """Wait for answers under way; without a gate, it is refused after DRAIN_SECONDS unless forced."""
        if force:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        self.intend(operation, "drain")
        with operation.timed("drain"):
            while count := await self.under_way():
                answers = counted(round(count), "answer")
                operation.tell(self.name, "drain", f"{answers} under way")
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"{self.name} still gives {answers} after {DRAIN_SECONDS:.0f} s.",
                        "Wait until they end, or use --force, which breaks them off.",
                    )
                await operation.pause(DRAIN_POLL)

    async def under_way(self) -> float:
        """Answers that the server gives now; 0 where it does not tell."""
        try:
            metrics = await self.client.metrics()
        except EngineRefused:
            return 0.0
        return Page.read(metrics, time.monotonic()).under_way or 0.0

    async def take_reference(self) -> None:
        """The proof's answer while it is well; its cache is emptied first, as the sleep would."""
        logprobs = None
        # A task without completions cannot be asked, nor a server whose key is not known.
        with contextlib.suppress(EngineRefused, RefusedError):
            await self.client.reset_prefix_cache(ASK_SECONDS)
            logprobs = await self.ask()
        self.model.write(reference=None if logprobs is None else Reference(logprobs=logprobs))

    async def ask(self) -> tuple[float, ...] | None:
        """The answer to the proof's question."""
        answer = await self.client.complete(
            proof.PROMPT, model=await self.served_name(), prompt_logprobs=1, timeout=ASK_SECONDS
        )
        return answer.prompt_logprobs

    async def fall_asleep(self, level: int, operation: Operation) -> None:
        """The call, and the question whether it happened."""
        self.intend(operation, "sleep", level)
        with operation.timed("sleep"), self.allowed("sleep"):
            await sleeping.sleep(self.client, level, MOVE_SECONDS, is_own=False)
            sleeps = await self.client.is_sleeping(MOVE_SECONDS)
        if not sleeps:
            raise OperationError(
                f"{self.name}: its server said yes and does not sleep.",
                "It was started without --enable-sleep-mode, or is in use again.",
            )
        # That it sleeps is known; what it freed, on a machine that is not seen from here, is not.
        self.model.write(level=level, proof=Verdict.UNVERIFIED)

    # ── around each ──────────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def alone(self, operation: Operation) -> AsyncIterator[None]:
        """Hold the model's lock; what is under way ends with it, and what is seen then is seen at once."""
        async with locked([self.model.lock], holder(operation.name, self.name), operation, self.name):
            self.model.read()
            try:
                yield
            finally:
                if self.model.read().intent is not None:
                    self.model.write(intent=None)
                await probe([self.model])

    @contextlib.contextmanager
    def allowed(self, verb: str) -> Iterator[None]:
        """Name the model in what goes wrong; RefusedError where the endpoint is closed or not there."""
        try:
            yield
        except EngineRefused as error:
            if error.status == HTTPStatus.UNAUTHORIZED:
                reason, cure = wants_key(self.model.config)
                raise RefusedError(f"{self.name}: {reason}", cure) from error
            if error.status in CLOSED:
                raise RefusedError(
                    f"{self.name}: its server lets nobody from here {verb} it ({error.status}).",
                    "It must run with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1; "
                    "one that another vllm-sleep-tui started obeys that one alone.",
                ) from error
            raise OperationError(f"{self.name} could not {verb}: {error.what}", "Look at its log.") from error
        except EngineError as error:
            raise OperationError(f"{self.name} could not {verb}: {error.what}", error.cure) from error

    def intend(self, operation: Operation, phase: str, level: int | None = None) -> None:
        """Write and tell what is being done."""
        self.model.write(
            intent=Intent(
                operation=operation.name, phase=phase, since=operation.since, actor=actor(), level=level
            )
        )
        operation.tell(self.name, phase)
