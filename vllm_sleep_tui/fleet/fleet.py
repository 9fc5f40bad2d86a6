"""The fleet: everything a face may ask for. Screens and verbs use this and nothing below it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from vllm_sleep_tui.config.changes import Change, changes
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.errors import CancelledByUser, OperationError, RefusedError
from vllm_sleep_tui.fleet.attached.backend import probe, prober
from vllm_sleep_tui.fleet.attached.probe import QUICK
from vllm_sleep_tui.fleet.backend import Backend, backend_of
from vllm_sleep_tui.fleet.core import Core, OperationLimits
from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.predict import memory_in, waits
from vllm_sleep_tui.fleet.observe.processes import held_processes
from vllm_sleep_tui.fleet.observe.serving import INTERVAL, ServingPoller
from vllm_sleep_tui.fleet.observe.snapshotter import Snapshotter
from vllm_sleep_tui.fleet.operations import groups
from vllm_sleep_tui.fleet.operations.acquire import waiting_words
from vllm_sleep_tui.fleet.operations.chat import answer, check_sees
from vllm_sleep_tui.fleet.operations.operation import Operation, actor, ended
from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.pictures import Picture
from vllm_sleep_tui.fleet.poller import until_beat
from vllm_sleep_tui.fleet.server_log import ServerLog, log_at, log_of
from vllm_sleep_tui.fleet.snapshot import (
    ChatEvent,
    FleetSnapshot,
    HeldProcess,
    Prediction,
    Report,
    SwitchTimes,
    Way,
)
from vllm_sleep_tui.fleet.states import RUNNING, StartPhase, State
from vllm_sleep_tui.fleet.supervision.leader import LeaderLock
from vllm_sleep_tui.fleet.supervision.supervisor import Leader, Watcher
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive
from vllm_sleep_tui.telemetry.sampler import SAMPLE_SECONDS, Sampler

if TYPE_CHECKING:
    from vllm_sleep_tui.sizing.advice import Advice

T = TypeVar("T")
OTHERS_SECONDS = 1.0
"""Between two looks at what other processes have added to the history."""


class Fleet:
    """The models of one config; an async context manager whose end leaves the servers running.

    With `leads` it tries to be the leader, who restarts, times idleness and looks for hangs. With `read_only`
    it changes no server and no config: what would is refused, nothing is settled, nobody is led. Without
    `looks` nobody draws it: memory is looked at when `measured` is asked and not all the time, which would
    take a verb's processor from its operation.
    Operations raise PanelError with what is wrong and what to do. Cancelling the task that awaits one stops
    it at its next safe point and raises CancelledByUser.
    """

    def __init__(
        self,
        loaded: LoadedConfig,
        state_dir: Path,
        *,
        leads: bool = False,
        read_only: bool = False,
        looks: bool = True,
        limits: OperationLimits | None = None,
    ) -> None:
        self.loaded = loaded
        self.state_dir = state_dir
        self.is_read_only = read_only
        self._looks = looks
        self._core = Core(loaded, state_dir, limits)
        self._snapshotter = Snapshotter(self._core)
        self._sampler = Sampler(self._core.reader, self._core.simulated)
        self._watcher = Watcher(self._core)
        self._prober = prober(self._core)
        self._leader = Leader(self._core) if leads and not read_only else None
        self._serving = ServingPoller(self._core, keeps=lambda: self.is_leader)
        self._flushing: set[asyncio.Future[None]] = set()
        self._subscribers: set[asyncio.Event] = set()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._core.on_written = self._wake_subscribers
        self._sampler.set_roots(self._snapshotter.roots())
        if self._looks:
            self._sampler.start()
        if not self.is_read_only:  # it settles, and ends what is left of servers
            self._watcher.start()
        self._prober.start()
        if self._leader:
            self._leader.start()
        if self._leader or self.is_read_only:
            self._serving.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.resign()
        self._is_closed = True
        for written in self._subscribers:
            written.set()
        await self._serving.close()
        await self._watcher.close()
        await self._prober.close()
        self._sampler.close()
        await asyncio.gather(*self._flushing)
        self._core.on_written = None  # the loop may be gone before the last entries are
        await self._core.close()

    # ── what is ──────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> FleetSnapshot:
        """Everything as of now; reads a few small files and the latest sample."""
        self._sampler.set_roots(self._snapshotter.roots())
        notes = self._leader.notes if self._leader else ()
        notes += tuple(filter(None, [self.history_note]))
        snapshot = self._snapshotter.snapshot(self._sampler.latest(), notes, self._serving.figures)
        return msgspec.structs.replace(snapshot, read_only=True) if self.is_read_only else snapshot

    def look_less(self, less: bool) -> None:
        """Whether figures may be taken half as often: nothing moves and nobody is at the keys.

        What fails is seen and told as soon as ever.
        """
        seconds, times = self._sampler.interval, 2 if less else 1
        self._sampler.interval, self._serving.interval = times * SAMPLE_SECONDS, times * INTERVAL
        if self._sampler.interval < seconds:
            self._sampler.refresh()
            self._serving.hurry()

    @property
    def is_leader(self) -> bool:
        """Whether this process is the one that acts unasked."""
        return self._leader is not None and self._leader.seat.is_mine

    def reload(self, loaded: LoadedConfig, by: str | None = None) -> list[Change]:
        """Go on with a changed config file; what runs is left as it is.

        What differs, which is an event of each model that it is about; `by` is the operation that wrote the
        file, if it is known.
        """
        models = self.snapshot().models
        running = {model.name: model.pid for model in models if model.state in RUNNING}
        found = changes(self.loaded.config, loaded.config, running)
        self.loaded = loaded
        self._core.reload(loaded)
        if not self.is_read_only:
            version = loaded.version()
            for change in found:
                self._core.publish(_told(change, version, by))
            self._flush()
        return found

    async def measured(self) -> FleetSnapshot:
        """Everything, with memory and attached servers looked at after this call."""
        await probe(self._core.models(), QUICK)
        self._sampler.set_roots(self._snapshotter.roots())
        return self._snapshotter.snapshot(await asyncio.to_thread(self._sampler.sample_once))

    def vllm_version(self, name: str) -> str | None:
        """The vLLM that the model's last launch ran on; None before the first."""
        return self._core.model(name).record.vllm_version

    async def past(self, window: float) -> Past:
        """What the history says about the last `window` seconds, and about today."""
        return await asyncio.to_thread(self._past, self._core.models(), window)

    def _past(self, models: Sequence[Model], window: float) -> Past:
        past = self._core.history.past([model.name for model in models], window)
        takes = {model.name: model.footprint.all_typical() for model in models}
        return msgspec.structs.replace(past, takes=takes)

    @property
    def history_note(self) -> str | None:
        """One line on what could not be kept of the past; None if all was, as far as it was written."""
        return self._core.history.note if "history" in self._core.__dict__ else None

    def starts_of_others(self) -> dict[str, int]:
        """The models whose start another living process has under way, with its pid."""
        return {
            name: starter.pid for name, starter in self._starts() if starter != actor() and is_alive(starter)
        }

    def own_starts(self) -> list[str]:
        """The models whose start this process has under way, for whatever it was begun."""
        return [name for name, starter in self._starts() if starter == actor()]

    def _starts(self) -> Iterator[tuple[str, ProcessId]]:
        """Models that start, each with its starter; a record that cannot be read tells of none."""
        for model in self._core.models():
            with contextlib.suppress(OperationError):
                record = model.read()
                if record.state is State.STARTING and record.intent is not None:
                    yield model.name, record.intent.actor

    async def resign(self) -> None:
        """Act unasked no more, and let somebody else lead."""
        if self._leader:
            await self._leader.close()

    def predict(self, name: str) -> Prediction:
        """What a switch to the model would do; refused without its record, or where nothing may change."""
        backend = backend_of(self._core.model(name))
        try:
            prediction = backend.predict(memory_in(self._sampler.latest().gpus), self._serving.figures)
            if prediction.action != "nothing":
                self._must_not_be_read_only(f"switch to {name}")
        except (OperationError, RefusedError) as error:
            return Prediction(target=name, action="refused", sentence=error.what)
        return prediction

    def waits(self, name: str) -> str | None:
        """What an operation on the model would do first: "waits for …"; None if it could begin at once."""
        who = waits(self._core.model(name))
        return None if who is None else waiting_words(who)

    async def advice(self) -> Advice:
        """What to do with each model and GPU, from what was measured here."""
        from vllm_sleep_tui.fleet.advice import advise_fleet  # reads checkpoints; only whoever asks pays

        return await asyncio.to_thread(lambda: advise_fleet(self._core, self._core.history.rates()))

    async def processes(self) -> tuple[HeldProcess, ...]:
        """The processes of our servers, and all others that hold VRAM."""
        roots = self._snapshotter.roots()
        return await asyncio.to_thread(held_processes, self._sampler.latest(), roots, self._core.simulated)

    def log(self, name: str) -> ServerLog:
        """What the model's servers said; raises OperationError if its record cannot be read."""
        return log_of(self._core.records, name, forgets=not self.is_read_only)

    async def log_at(self, name: str, event: FleetEvent) -> ServerLog:
        """As `log`, but it begins with what the server of an event said, if another was started since."""

        def find() -> ServerLog:
            launches = self._core.history.launches_around(name, event.time)
            return log_at(self._core.records, name, event, launches, forgets=not self.is_read_only)

        return await asyncio.to_thread(find)

    # ── for who carries requests to the servers ──────────────────────────────────────────────────────────

    async def way(self, name: str) -> Way:
        """How a client's request gets to the model's server; raises PanelError while it does not run."""
        return await self._backend(name).way()

    def served_names(self, name: str) -> tuple[str, ...]:
        """What a request may call the model: its name, its aliases."""
        return name, *self._core.model_config(name).aliases

    def adapters(self, name: str) -> tuple[str, ...]:
        """The adapters that its server has, each asked for by its name."""
        return tuple(ServeArgs(self._core.model_config(name).args).adapters)

    def want(self, names: Iterable[str]) -> None:
        """Say that requests wait for these models, for some seconds: nobody puts them away."""
        for name in names:
            self._core.model(name).want()

    def seat(self, what: str) -> LeaderLock:
        """The place of who does `what` for this config: one process at a time has it."""
        return LeaderLock(self._core.records.folder.parent / self._core.records.path(what, "lock").name)

    # ── what can be done ─────────────────────────────────────────────────────────────────────────────────

    def _must_not_be_read_only(self, what: str) -> None:
        """The one place of that rule: all below asks here first."""
        if self.is_read_only:
            raise RefusedError(
                f"This panel only looks: no {what} from here.",
                "Open one without --read-only, or use the verbs.",
            )

    async def apply(self, text: str) -> None:
        """Write this text, which `advice` led to, to the config file and go on with it."""
        self._must_not_be_read_only("change of the config")
        from vllm_sleep_tui.fleet.advice import apply_text  # as `advice`

        self.reload(await asyncio.to_thread(apply_text, self.loaded, text, self.state_dir), by="advise")

    async def start(
        self,
        names: Sequence[str],
        *,
        skip: frozenset[StartPhase] = frozenset(),
        report: Report | None = None,
    ) -> None:
        """Start these models, those that share a GPU one after another; the first one named ends awake.

        `skip` leaves out WARMING (its wakes are unproven then) or PRIMING, to measure without them.
        """
        models = self._models(names)
        await self._run("start", ", ".join(names), report, lambda op: groups.start_all(models, op), skip)

    async def stop(self, names: Sequence[str], *, force: bool = False, report: Report | None = None) -> None:
        """Stop these models and see their memory gone; `force` waits for no answer."""
        models = self._models(names)
        await self._run("stop", ", ".join(names), report, lambda op: groups.stop_all(models, op, force))

    async def restart(
        self, names: Sequence[str], *, force: bool = False, report: Report | None = None
    ) -> None:
        """Stop, then start; one that could not be started again is left as it is, and named in the end."""
        models = self._models(names)
        self._must_not_be_read_only(f"restart of {', '.join(names)}")
        chosen, _ = await asyncio.to_thread(groups.startable, models)
        await self.stop([model.name for model in chosen], force=force, report=report)
        await self.start(names, report=report)

    async def sleep(
        self, name: str, *, level: int | None = None, force: bool = False, report: Report | None = None
    ) -> SwitchTimes:
        """Put a model to sleep, at its own level unless told; the ledger of it. Done already is done."""

        async def work(operation: Operation) -> SwitchTimes:
            await self._backend(name).sleep(level, operation, force=force)
            return operation.ledger()

        return await self._run("sleep", name, report, work)

    async def wake(self, name: str, *, report: Report | None = None) -> None:
        """Wake a sleeper, others sleeping first where room is needed; a stopped model is refused."""
        await self._run("wake", name, report, lambda op: self._backend(name).wake(op))

    async def switch(self, name: str, *, force: bool = False, report: Report | None = None) -> SwitchTimes:
        """Make a model awake, from wherever it is; the ledger of what it took."""
        return await self._run("switch", name, report, lambda op: self._backend(name).switch(op, force=force))

    async def chat(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        params: Mapping[str, Any] | None = None,
        report: Report | None = None,
        switches: bool = True,
    ) -> AsyncIterator[ChatEvent]:
        """Stream an answer; a model that is not awake is switched to first, or refused without `switches`.

        Close the iterator to stop it. A message is OpenAI's, and may have `pictures` besides, as
        `pictures.said` makes one.
        """
        model = self._core.model(name)
        async for event in answer(self, model, messages, params or {}, report, switches=switches):
            yield event

    async def check_sees(self, name: str, pictures: Sequence[Picture]) -> None:
        """Raises RefusedError if there are pictures and the model is known to read text alone."""
        if pictures:
            await asyncio.to_thread(check_sees, self._core.model(name), pictures)

    def _models(self, names: Sequence[str]) -> list[Model]:
        """A handle each; an unknown name is found when that one is operated on, and stops no other."""
        return [Model(self._core, name) for name in names]

    def _backend(self, name: str) -> Backend:
        return backend_of(self._core.model(name))

    async def recent_events(self, count: int, *, only_failures: bool = False) -> list[FleetEvent]:
        """The last `count` events, here and elsewhere, the oldest first; `events` goes on after the last."""
        return await asyncio.to_thread(self._core.history.latest_events, count, only_failures=only_failures)

    def events(self, after: int | None = None) -> AsyncGenerator[FleetEvent, None]:
        """What happens from this call on, or since the event with the id `after`, here and elsewhere.

        Without an end: close the iterator, or cancel who waits for it.
        """
        return self._events(after, time.time())

    async def _events(self, after: int | None, since: float) -> AsyncGenerator[FleetEvent, None]:
        written = asyncio.Event()
        self._subscribers.add(written)
        last = after
        try:
            while not self._is_closed:
                written.clear()
                history = self._core.history
                happened: list[FleetEvent] = []
                if last is None:
                    last = await asyncio.to_thread(history.last_event_id, since)
                if last is not None and not self._is_closed:
                    happened, last = await asyncio.to_thread(history.events_after, last)
                for event in happened:
                    yield event
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(written.wait(), until_beat(OTHERS_SECONDS))
        finally:
            self._subscribers.discard(written)

    def _wake_subscribers(self) -> None:
        """Called from the thread that has written."""
        for written in tuple(self._subscribers):
            self._loop.call_soon_threadsafe(written.set)

    async def _run(
        self,
        verb: str,
        target: str,
        report: Report | None,
        work: Callable[[Operation], Awaitable[T]],
        skip: frozenset[StartPhase] = frozenset(),
    ) -> T:
        self._must_not_be_read_only(f"{verb} of {target}")
        operation = Operation(verb, target, report, skip=skip)
        error: BaseException | None = None
        try:
            return await to_safe_point(operation, work(operation))
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._core.publish(ended(operation, error))
            self._sampler.refresh()
            self._flush()

    def _flush(self) -> None:
        """Write what was published, off the loop; the end of the fleet waits for it."""
        flushing = asyncio.get_running_loop().run_in_executor(None, self._core.flush)
        self._flushing.add(flushing)
        flushing.add_done_callback(self._flushing.discard)


def _told(change: Change, version: str, by: str | None) -> FleetEvent:
    return FleetEvent(
        time=time.time(),
        kind=Kind.CONFIG,
        model=change.model,
        operation=by,
        detail=change.words,
        config=version,
        pid=os.getpid(),
    )


async def to_safe_point(operation: Operation, work: Awaitable[T]) -> T:
    """Run `work`; when the awaiting task is cancelled, let it reach its next safe point first.

    Raises CancelledByUser if the work stopped there. Work that was past its last safe point ends normally
    and its result is lost to the canceller, who gets CancelledByUser all the same.
    """
    try:
        return await to_its_end(work, operation.cancel)
    except asyncio.CancelledError:
        if not operation.is_cancelled:
            raise
        raise CancelledByUser(
            f"The {operation.name} of {operation.target} was too far to be cancelled; it was completed."
        ) from None


async def to_its_end(work: Awaitable[T], cancelled: Callable[[], None] = lambda: None) -> T:
    """Run `work` to its end; each time the awaiting task is cancelled meanwhile, `cancelled` is called.

    Raises what the work raises, and CancelledError after work that ended well.
    """
    task = asyncio.ensure_future(work)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # a second one must not leave the work to itself
            is_cancelled = True
            cancelled()
    result = task.result()
    if is_cancelled:
        raise asyncio.CancelledError
    return result
