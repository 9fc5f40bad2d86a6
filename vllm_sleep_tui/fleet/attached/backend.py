"""Models given by `url:`: servers that somebody else started. They answer, sleep and wake where their server
allows it; they are never started or ended, make no room and are given none: whose GPU they use is not known.

No record's state is kept of them, the server is asked; the record holds the level, the reference of the proof
and what is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm_sleep_tui.engine import proof, sleeping
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused, EngineTimeout, StillAsleep
from vllm_sleep_tui.engine.metrics import Page
from vllm_sleep_tui.engine.plain_client import CLOSED
from vllm_sleep_tui.engine.proof import Reference, Verdict
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import OperationError, RefusedError
from vllm_sleep_tui.fleet.attached.probe import (
    LOOK,
    Sighting,
    after,
    look_at,
    owns_server,
    resolved,
    wants_key,
)
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.operations.acquire import held
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.snapshot import Prediction, SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import holder
from vllm_sleep_tui.fleet.store.records import Intent
from vllm_sleep_tui.fleet.supervision.go_on import GoOn

if TYPE_CHECKING:
    from vllm_sleep_tui.engine.client import VllmClient

INTERVAL = 2.0
"""Seconds between two looks of the panel."""
LOOK_SECONDS = 1.5
ASK_SECONDS = 60.0
SURE_SECONDS = 10.0
"""For a server to say or show whether it sleeps, before it is called unknown."""
MOVE_SECONDS = 900.0
"""For a sleep or a wake: the size of the weights is not known here."""
DRAIN_SECONDS = 30.0
DRAIN_POLL = 0.1


class Watch:
    """Looks at the attached servers every `INTERVAL` seconds, for the screen."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._task: asyncio.Task[None] | None = None
        self._go_on = GoOn()

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="attached")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            with self._go_on.after("the look at attached servers"):
                await look(self._core, list(self._core.config.models))
            await asyncio.sleep(INTERVAL)


async def look(core: Core, names: list[str]) -> None:
    """Look at those of the models that are attached, and keep what is seen."""
    models = {name: model for name in names if (model := core.model(name)).url is not None}
    if models:
        for name, seen in (await asyncio.to_thread(look_at, models, LOOK_SECONDS)).items():
            core.sightings[name] = after(core.sightings.get(name), seen)


async def see(core: Core, name: str) -> Sighting:
    """How the server is now; raises RefusedError if it does not answer."""
    await look(core, [name])
    seen = core.sightings[name]
    if seen.state is State.STOPPED:
        raise RefusedError(f"{name}: {seen.reason}", seen.cure or LOOK)
    return seen


def has_own_server(core: Core, name: str) -> bool:
    """Whether a server that was started here before the model got its `url:` still runs."""
    return core.model(name).url is not None and owns_server(core.records.read(name))


def refuse_control(core: Core, name: str) -> None:
    """Raises RefusedError for an attached model: it cannot be started or stopped from here."""
    url = core.model(name).url
    if url is not None:
        raise RefusedError(
            f"{name} is attached by `url: {url}`: its server is not ours to start or stop.",
            "Do it where that server was started, or give `model:` instead of `url:`.",
        )


def client_of(core: Core, name: str) -> VllmClient:
    """The client of the attached server."""
    return core.client_at(core.model(name))


async def served_name(core: Core, name: str) -> str:
    """What the server calls the model: our name if it has it, else its first; raises OperationError."""
    with _allowed(core, name, "ask"):
        cards = await client_of(core, name).models()
    names = [card.id for card in cards]
    if not names:
        raise OperationError(f"{name}: its server serves no model.", LOOK)
    return name if name in names else names[0]


async def switch(core: Core, name: str, operation: Operation) -> SwitchTimes:
    """Make it awake; nobody else is put to sleep for it."""
    async with alone(core, name, operation):
        seen = await see(core, name)
        if seen.state is State.ASLEEP or (not seen.tells_sleep and await _sleeps(core, name, operation)):
            await _wake(core, name, seen.level or core.records.read(name).level or 1, operation)
        return operation.ledger()


async def _sleeps(core: Core, name: str, operation: Operation) -> bool:
    """Whether it sleeps, of a server that did not tell at once; raises OperationError if it cannot be known.

    `/is_sleeping` waits while the engine falls asleep or wakes. Where it is closed an answer is the proof: a
    sleeper never gives one.
    """
    operation.tell(name, "asking", "whether it sleeps")
    client = client_of(core, name)
    with contextlib.suppress(EngineRefused):
        try:
            return await client.is_sleeping(SURE_SECONDS)
        except EngineTimeout as error:
            raise _unsure(name) from error
    try:
        await proof.one_token(client, await served_name(core, name), SURE_SECONDS)
    except EngineTimeout as error:
        raise _unsure(name) from error
    return False


def _unsure(name: str) -> OperationError:
    return OperationError(
        f"{name}: its server answers, and does not tell within {SURE_SECONDS:.0f} s whether it sleeps.",
        "It may be asleep, or on its way: try again, or wake it where it was started.",
    )


async def sleep(
    core: Core,
    name: str,
    level: int | None,
    operation: Operation,
    *,
    force: bool = False,
    unless: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Put it to sleep where its server allows it; done if it sleeps at this level.

    If `unless`, asked at once and when no answer is under way, raises PanelError, it stays awake.
    """
    from vllm_sleep_tui.fleet.operations.switch import check_same_level

    async with alone(core, name, operation):
        seen = await see(core, name)
        record = core.records.read(name)
        if seen.state is State.ASLEEP:
            if seen.level or record.level:
                check_same_level(core.write(record, level=seen.level or record.level), level)
            return
        wanted = _own_level(core, name) if level is None else level
        if wanted == 0:
            raise RefusedError(
                f"{name} was not started by the panel: its weights cannot stay in VRAM (level 0).",
                "Sleep it at level 1 or 2.",
            )
        await _check_version(core, name)
        if unless is not None:
            await unless()
        await drain(core, name, operation, force=force)
        if unless is not None:
            await unless()
        await _take_reference(core, name)
        await _sleep(core, name, wanted, operation)


@contextlib.asynccontextmanager
async def alone(core: Core, name: str, operation: Operation) -> AsyncIterator[None]:
    """Hold the model's lock; what is under way ends with it, and what is seen then is seen at once."""
    async with held(core.model_locks({name}), holder(operation.name, name), operation, name):
        try:
            yield
        finally:
            record = core.records.read(name)
            if record.intent is not None:
                core.write(record, intent=None)
            await look(core, [name])


def _own_level(core: Core, name: str) -> int:
    """The level of its config; raises RefusedError for `level: none`."""
    level = resolved(core.model(name))
    if level == "none":
        raise RefusedError(
            f"{name} has `level: none` and is attached: it cannot be stopped from here instead.",
            "Name a level: --level 1 or 2, or write it in the config.",
        )
    return int(level)


async def _check_version(core: Core, name: str) -> None:
    """Raises RefusedError for a vLLM whose sleep is not reliable."""
    with _allowed(core, name, "sleep"):
        version = await client_of(core, name).version()
    why_not = capabilities(version, None).why_not
    if why_not is not None:
        raise RefusedError(f"{name}: {why_not}", "Run a newer vLLM there.")


async def drain(core: Core, name: str, operation: Operation, *, force: bool) -> None:
    """Wait for answers under way; there is no gate, so after DRAIN_SECONDS it is refused, unless forced."""
    if force:
        return
    client, deadline = client_of(core, name), time.monotonic() + DRAIN_SECONDS
    _intend(core, name, operation, "drain")
    with operation.timed("drain"):
        while count := await _under_way(client):
            operation.tell(name, "drain", f"{count:.0f} answers under way")
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"{name} still gives {count:.0f} answers after {DRAIN_SECONDS:.0f} s.",
                    "Wait until they end, or use --force, which breaks them off.",
                )
            await operation.pause(DRAIN_POLL)


async def _under_way(client: VllmClient) -> float:
    """Answers that the server gives now; 0 where it does not tell."""
    try:
        metrics = await client.metrics()
    except EngineRefused:
        return 0.0
    return Page.read(metrics, time.monotonic()).under_way or 0.0


async def _take_reference(core: Core, name: str) -> None:
    """The proof's answer while it is well; its cache is emptied first, as the sleep would."""
    client, logprobs = client_of(core, name), None
    # A task without completions cannot be asked, nor a server whose key is not known.
    with contextlib.suppress(EngineRefused, RefusedError):
        await client.reset_prefix_cache(ASK_SECONDS)
        logprobs = await _ask(core, name)
    reference = None if logprobs is None else Reference(logprobs=logprobs)
    core.write(core.records.read(name), reference=reference)


async def _ask(core: Core, name: str) -> tuple[float, ...] | None:
    answer = await client_of(core, name).complete(
        proof.PROMPT, model=await served_name(core, name), prompt_logprobs=1, timeout=ASK_SECONDS
    )
    return answer.prompt_logprobs


async def _sleep(core: Core, name: str, level: int, operation: Operation) -> None:
    """The call, and the question whether it happened."""
    _intend(core, name, operation, "sleep", level)
    client = client_of(core, name)
    with operation.timed("sleep"), _allowed(core, name, "sleep"):
        await sleeping.sleep(client, level, MOVE_SECONDS)
        sleeps = await client.is_sleeping(MOVE_SECONDS)
    if not sleeps:
        raise OperationError(
            f"{name}: its server said yes and does not sleep.",
            "It was started without --enable-sleep-mode, or is in use again.",
        )
    # That it sleeps is known; what it freed, on a machine that is not seen from here, is not.
    core.write(core.records.read(name), level=level, proof=Verdict.UNVERIFIED)


async def _wake(core: Core, name: str, level: int, operation: Operation) -> None:
    """The call, or the four steps of level 2; then the proof."""
    _intend(core, name, operation, "wake", level)
    client = client_of(core, name)
    with operation.timed("wake"), _allowed(core, name, "wake"):
        try:
            await sleeping.wake(client, level, MOVE_SECONDS, operation.timed, quick=ASK_SECONDS)
        except StillAsleep as error:
            what = f"{name}: its server said yes and still sleeps."
            raise OperationError(what, "Look at its log.") from error
    with operation.timed("prove"), _allowed(core, name, "answer"):
        verdict = await _prove(core, name)
    core.write(core.records.read(name), level=None, proof=verdict, last_switch=operation.ledger())


async def _prove(core: Core, name: str) -> Verdict:
    """The answer compared with the one before the sleep; raises OperationError if it is nonsense."""
    reference = core.records.read(name).reference
    if reference is None:
        return Verdict.UNPROVEN
    for _ in range(2):
        if proof.is_same(await _ask(core, name), reference.logprobs):
            return Verdict.PROVEN
    raise OperationError(
        f"{name} woke and does not answer as before it slept.", "Restart it where it was started."
    )


@contextlib.contextmanager
def _allowed(core: Core, name: str, verb: str) -> Iterator[None]:
    """Name the model in what goes wrong; RefusedError where the endpoint is closed or not there."""
    try:
        yield
    except EngineRefused as error:
        if error.status == HTTPStatus.UNAUTHORIZED:
            reason, cure = wants_key(core.model(name))
            raise RefusedError(f"{name}: {reason}", cure) from error
        if error.status in CLOSED:
            raise RefusedError(
                f"{name}: its server lets nobody from here {verb} it ({error.status}).",
                "It must run with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1; "
                "one that another vllm-sleep-tui started obeys that one alone.",
            ) from error
        raise OperationError(f"{name} could not {verb}: {error.what}", "Look at its log.") from error
    except EngineError as error:
        raise OperationError(f"{name} could not {verb}: {error.what}", error.cure) from error


def _intend(core: Core, name: str, operation: Operation, phase: str, level: int | None = None) -> None:
    """Write and tell what is being done."""
    intent = Intent(operation=operation.name, phase=phase, since=operation.since, actor=actor(), level=level)
    core.write(core.records.read(name), intent=intent)
    operation.tell(name, phase)


def predict(core: Core, name: str) -> Prediction:
    """What a switch to an attached model would do: nobody else is touched."""
    seen = core.sightings.get(name)
    if seen is None or seen.state is State.STOPPED:
        why = seen.reason if seen and seen.reason else "It has not been looked at yet."
        return Prediction(target=name, action="refused", sentence=f"{name} cannot be started here. {why}")
    if seen.state is State.AWAKE:
        return Prediction(target=name, action="nothing", sentence=f"{name} is awake.")
    return Prediction(target=name, action="wake", sentence=f"Wakes {name} on its own server.")
