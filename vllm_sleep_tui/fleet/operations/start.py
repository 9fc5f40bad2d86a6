"""The start of a server: port, keeper, readiness, warm-up, reference, first sleep; or nothing at all.

The caller holds the model's lock and its GPUs' locks for the whole of it: vLLM's start-up memory check
counts what others take or give back meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.engine import proof
from vllm_sleep_tui.engine.argv import ServeSpec, port_words, serve_argv, serve_environment
from vllm_sleep_tui.engine.causes import OWN_PORT, Diagnosis
from vllm_sleep_tui.engine.endpoints import IS_SLEEPING
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused
from vllm_sleep_tui.engine.guard_files import copy_backend, copy_guard
from vllm_sleep_tui.engine.logs import Backend, LogTail, PhaseReader
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError, UsageError
from vllm_sleep_tui.files import as_text, path_of
from vllm_sleep_tui.fleet.keeper_client import KeeperSpec, is_kept, launch, read_status
from vllm_sleep_tui.fleet.levels import installed_version, never_level2
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.arguments import check_arguments, known_flags
from vllm_sleep_tui.fleet.operations.end import TMP_PREFIX, cause_in_log, fail, stop_server
from vllm_sleep_tui.fleet.operations.operation import Operation, actor
from vllm_sleep_tui.fleet.operations.patience import patiently
from vllm_sleep_tui.fleet.operations.ports import CURE, choose_port, taken
from vllm_sleep_tui.fleet.operations.room import (
    give_up,
    has_level_0,
    kv_cache_note,
    read_memory,
    share_of,
    weights_of,
)
from vllm_sleep_tui.fleet.operations.server import Server
from vllm_sleep_tui.fleet.pool import folder as pool_folder
from vllm_sleep_tui.fleet.pool import joined
from vllm_sleep_tui.fleet.states import Event, StartPhase, State
from vllm_sleep_tui.fleet.store.records import Intent, Record
from vllm_sleep_tui.sizing.budget import level_for, pinned_estimate
from vllm_sleep_tui.sizing.footprints import Footprint, digest
from vllm_sleep_tui.telemetry.gpus import VISIBLE, GpuReading, fault_of, is_hidden
from vllm_sleep_tui.telemetry.host import host_memory
from vllm_sleep_tui.telemetry.processes import ProcessTable, command_of, has_listener, listens
from vllm_sleep_tui.units import GIB

if TYPE_CHECKING:  # `status` asks no server, and does without it
    from vllm_sleep_tui.engine.client import VllmClient

READY_LIMIT = 900.0
"""Seconds for a start, on top of READY_PER_GIB for each GiB of weights."""
READY_PER_GIB = 20.0
READY_POLL = 0.1
LISTEN_LIMIT = 10.0
"""Seconds between the guard's first answer and a listener on the port: milliseconds, if all is well."""
GUARD_POLL = 1.0
GUARD_LIMIT = 10.0
NO_GUARD_CURE = (
    "Look in its log what became of `--middleware`; name a vLLM 0.24 or newer itself in `vllm_command`."
)
WARM_UP_LIMIT = 300.0
"""The first request of a fresh server took 26 s on a CPU (vLLM 0.32); the next, longer, 60 s under load."""


def check_startable(model: Model) -> None:
    """Raises UsageError if what the config names is not there: the vLLM binary, GPUs, a folder."""
    check_command(model)
    check_gpus(model)
    check_arguments(model, known_flags(model))
    check_source(model)
    check_level(model)


def check_command(model: Model) -> None:
    """Raises UsageError if the vLLM binary is not there."""
    program = model.vllm_command[0]
    if shutil.which(program) is None:
        own = f"models.{model.name}." if model.config.vllm_command else ""
        raise UsageError(
            f"{model.core.loaded.path}: {own}vllm_command: {program!r} was not found.",
            "Install vLLM in an environment of its own and give the full path of its `vllm` there.",
        )


def check_gpus(model: Model) -> None:
    """Raises UsageError if the model names a GPU that this machine does not have.

    Raises RefusedError if the GPU or the driver does not answer, is not this user's or not this shell's.
    """
    core, name, wanted = model.core, model.name, model.config.gpus
    if core.reader.faults:
        core.reader.read()  # it may be well again
    gpus = core.gpus(wanted)
    for gpu in wanted:
        if fault := fault_of(core.reader.faults, gpu):
            raise RefusedError(f"Cannot start {name}: {fault.what}", fault.cure)
    for gpu in wanted:
        check_visible(name, gpus.get(gpu))
    if not gpus:
        return  # without NVML nothing is known; vLLM will say
    for gpu in wanted:
        if gpu not in gpus:
            raise UsageError(
                f"{core.loaded.path}: models.{name}.gpus: there is no GPU {gpu}.",
                f"This machine has: {', '.join(map(str, sorted(gpus)))}.",
            )


def check_visible(name: str, gpu: GpuReading | None) -> None:
    """Raises RefusedError if the shell was given other GPUs: by a scheduler, or by agreement."""
    visible = os.environ.get(VISIBLE)
    if gpu is None or gpu.simulated or not is_hidden(gpu, visible):
        return
    raise RefusedError(
        f"Cannot start {name}: GPU {gpu.index} is not this shell's; {VISIBLE} is {visible!r} here.",
        f"Give it one of those under `gpus:`, or unset {VISIBLE} if GPU {gpu.index} is yours.",
    )


def check_level(model: Model) -> None:
    """Raises UsageError for `level: 2` where vLLM's loader could not bring the model back."""
    if model.config.level != 2:
        return
    if never := never_level2(model.config, installed_version(model), model.base):
        raise UsageError(
            f"{model.core.loaded.path}: models.{model.name}.level: 2 could not bring it back: {never}.",
            "Set `level: 1` or `level: auto`.",
        )


def check_source(model: Model) -> None:
    """Raises UsageError if the model is a path of this machine where nothing is."""
    source = model.config.model or ""
    if source.startswith("/") and not os.path.exists(source):
        raise UsageError(
            f"{model.core.loaded.path}: models.{model.name}.model: there is no {source}.",
            "Correct the path, or write a hub name such as Qwen/Qwen3-0.6B.",
        )


class PortRaceError(OperationError):
    """A port that vLLM or the panel had picked was taken before it was bound; another start picks another."""


def backend_of(told: Backend | None) -> dict[str, str | None]:
    """The record's fields for what our sleep mode said of itself in the log."""
    if told is None:
        return {"sleep_backend": "stock", "sleep_backend_why": "it said nothing in the log"}
    return {"sleep_backend": "own" if told.is_own else "stock", "sleep_backend_why": told.why or None}


class Start:
    """One start of one model."""

    def __init__(self, model: Model, operation: Operation) -> None:
        self.model = model
        self.name = model.name
        self.config = model.config
        self.operation = operation
        self.began = time.monotonic()
        self.is_carried_on = False
        self.last_step: tuple[str, str, float | None] | None = None

    @property
    def record(self) -> Record:
        """How far it is."""
        return self.model.record

    async def run(self, *, died_from: State | None = None) -> Server:
        """Start, warm up, measure, prime; raises OperationError and leaves nothing running if it fails.

        `died_from` is ASLEEP for a restart that is to end there.
        """
        check_startable(self.model)
        port = choose_port(self.model)
        self.model.read()
        self.model.enter(Event.START, fell=died_from, digest=self.model.digest, intent=self.intent("loading"))
        return await self.guarded(self.launch(port))

    async def carry_on(self) -> Server:
        """Go on with a start whose starter died; its server lives. Raises as `run` does."""
        return await self.guarded(self.adopt())

    async def adopt(self) -> None:
        """Take the keeper's word for what the dead starter could not write down."""
        status = read_status(self.model.keeper_file)
        self.model.write(keeper=status.keeper, server=status.server)
        self.is_carried_on = True

    async def undo_priming(self) -> None:
        """Undo a first sleep that was cut off with the starter: a request to a sleeper never ends."""
        server = Server(self.model, self.operation)
        if await server.is_sleeping():
            await server.bring_back(1)
            await server.proof.prove()
        await server.open_gate()

    async def guarded(self, begin: Coroutine[None, None, None]) -> Server:
        """`begin`, then all the rest of a start; whatever goes wrong, nothing is left running."""
        try:
            await begin
            client = self.model.client()
            await self.wait_until_ready(client)
            if self.is_carried_on and self.config.level != "none":
                await self.undo_priming()
            return await self.settle_in(client)
        except CancelledByUser as error:
            if not self.is_carried_on:
                await self.abandon()
                raise
            # Somebody else asked for this start; the record says how far it is, for whoever comes next.
            cure = f"{self.name} starts on, as it did before; `stop {self.name}` ends that."
            raise CancelledByUser(error.what, cure) from error
        except EngineError as error:
            reason = f"It did not start well: {error}"
            await fail(self.model, reason, error.cure)
            raise OperationError(f"{self.name}: {reason}", error.cure) from error
        except (OperationError, RefusedError) as error:
            await self.give_up(error)
            raise
        except OSError as error:
            reason, cure = f"Its start broke off: {error}.", "Make room or give permission; start it again."
            self.model.read()
            await fail(self.model, reason, cure)
            raise OperationError(f"{self.name}: {reason}", cure) from error
        except asyncio.CancelledError:
            raise  # this process leaves; whoever comes next carries the start on
        except BaseException as error:
            self.model.read()
            await fail(self.model, f"Its start broke off: {error!r}.", "Start it again.")
            raise

    def intent(self, phase: str, detail: str | None = None) -> Intent:
        """This start as an intent, for whoever looks or must settle it."""
        return Intent(
            operation=self.operation.name,
            phase=phase,
            since=self.operation.since,
            actor=actor(),
            eta=self.model.footprint.typical("start"),
            detail=detail,
        )

    def enter_phase(self, phase: str, detail: str = "", fraction: float | None = None) -> None:
        """Tell and write down what the start is doing, unless that was the last thing told."""
        step = (phase, detail, None if fraction is None else round(fraction, 1))
        if step == self.last_step:
            return
        self.last_step = step
        self.model.write(intent=self.intent(phase, detail or None))
        self.operation.tell(self.name, phase, detail, fraction)

    async def launch(self, port: int) -> None:
        """Hand the server to a keeper."""
        config = self.config
        pools = self.model.core.pools(config.gpus)
        await asyncio.to_thread(give_up, self.model.core, config.gpus)  # vLLM counts it as taken
        memory = await asyncio.to_thread(read_memory, self.model.core, set(config.gpus))
        share = share_of(self.model, memory)
        if note := kv_cache_note(self.model, share):
            self.operation.tell(self.name, "kv cache", note)
        tmp_dir = Path(tempfile.mkdtemp(prefix=Path(TMP_PREFIX).name, dir=Path(TMP_PREFIX).parent))
        spec = ServeSpec(
            command=self.model.vllm_command,
            model=config.model or "",
            served_name=self.name,
            port=port,
            args=config.args,
            env=config.env,
            gpus=config.gpus,
            utilization=share,
            guard_dir=tmp_dir / "guard",
            tmp_dir=tmp_dir,
            socket=tmp_dir / "panel.sock",
            launch_id=secrets.token_hex(16),
            sleep_mode=config.level != "none",
            aliases=config.aliases,
            api_key=config.api_key,
            flags=known_flags(self.model),
            own_backend=self.wants_own_backend(),
            pool=pool_folder() if self.wants_own_backend() else None,
        )
        log = self.model.log_path
        self.model.write(
            launch=spec.launch_id,
            port=port,
            socket=str(spec.socket),
            secret=None,
            gpus=config.gpus,
            log=as_text(log),
            tmp_dir=str(tmp_dir),
            digest=digest(config),
            engines=(),
            reference=None,
            sleep_backend="stock" if config.gpus and spec.sleep_mode else None,
            sleep_backend_why=None,
        )
        copy_guard(spec.guard_dir)
        if spec.own_backend:
            copy_backend(spec.guard_dir)
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with joined(pool.uuid for pool in pools.values() if spec.own_backend) as users:
            status = await launch(self.keeper_spec(spec, log), users)
        self.model.write(keeper=status.keeper, server=status.server)
        if spec.own_backend:
            await asyncio.gather(*(asyncio.to_thread(pool.start_holder) for pool in pools.values()))

    def wants_own_backend(self) -> bool:
        """Whether our sleep mode is to be tried: it decides itself whether it fits this vLLM.

        A worker on another machine, or one that ray starts, would not find it.
        """
        far = ServeArgs(self.config.args).spans_machines
        sleeps = bool(self.config.gpus) and self.config.level != "none"
        return sleeps and self.config.sleep_backend == "auto" and not far

    def keeper_spec(self, spec: ServeSpec, log: Path) -> KeeperSpec:
        """What the keeper is to keep."""
        base = dict(os.environ)
        if self.model.core.simulated:
            base["VLLM_SLEEP_TUI_SIMULATED_GPUS"] = str(self.model.core.simulated)
        return KeeperSpec(
            argv=tuple(serve_argv(spec)),
            env=serve_environment(spec, base, ready_seconds=self.limit()),
            cwd=str(self.model.core.loaded.path.resolve().parent),
            launch=spec.launch_id,
            log=str(log),
            lock=str(self.model.keeper_file),
            tmp_dir=str(spec.tmp_dir),
            mark=port_words(spec.port),
        )

    def limit(self) -> float:
        """Seconds that this start may take."""
        return READY_LIMIT + READY_PER_GIB * (weights_of(self.model) or 0) / GIB

    # ── readiness ────────────────────────────────────────────────────────────────────────────────────────

    async def wait_until_ready(self, client: VllmClient) -> None:
        """Follow the log until health is good and the listener is ours; raises OperationError if it ends."""
        assert self.record.log is not None
        tail, phases = LogTail(path_of(self.record.log)), PhaseReader()
        deadline = time.monotonic() + self.limit()
        next_look = 0.0
        self.enter_phase(StartPhase.LOADING)
        while True:
            for line in tail.read_new():
                if (seen := phases.feed(line)) is not None:
                    self.enter_phase(seen.name, seen.detail, seen.fraction)
            if self.is_asked_to_stop() or not is_kept(self.model.keeper_file):
                self.remember_log(phases)  # who fails for want of memory has told what it takes
                raise OperationError(f"{self.name} ended while it started.", "Look at its log.")
            if await client.health(timeout=1.0):
                break
            if time.monotonic() > next_look:
                await self.check_guard_came()
                next_look = time.monotonic() + GUARD_POLL
            if time.monotonic() > deadline:
                raise OperationError(
                    f"{self.name} was not ready after {self.limit():.0f} s.",
                    "Look at its log; start it again.",
                )
            await self.operation.pause(READY_POLL)
        await self.check_listener(client)
        self.remember_log(phases)
        if self.wants_own_backend():
            self.model.write(**backend_of(phases.facts.backend))

    async def check_listener(self, client: VllmClient) -> None:
        """Raises OperationError if the port is answered by anybody but this launch, or without its guard."""
        assert self.record.port is not None
        assert self.record.keeper is not None
        table = await asyncio.to_thread(ProcessTable.read)
        family = table.descendants(self.record.keeper.pid)
        deadline = time.monotonic() + LISTEN_LIMIT
        # The guard lets us in a moment before vLLM listens.
        while not listens(self.record.port, family):
            if has_listener(self.record.port) and not listens(self.record.port, family):
                raise OperationError(taken(self.record.port, self.name), CURE)
            if time.monotonic() > deadline:
                raise OperationError(f"{self.name} is ready, and nobody listens on its port.", NO_GUARD_CURE)
            await self.operation.pause(READY_POLL)
        await self.check_guard()
        engines = [pid for pid in family if (command_of(pid) or "").startswith("VLLM::")]
        identities = tuple(process for pid in engines if (process := table.id_of(pid)))
        version = await patiently(self.model, client.version)
        # What wraps it may have ended since: the keeper tells whose process it is now.
        server = read_status(self.model.keeper_file).server
        self.model.write(server=server, engines=identities, vllm_version=version)
        if note := capabilities(version).note:
            self.operation.tell(self.name, "version", note)

    async def check_guard_came(self) -> None:
        """Raises OperationError if the server takes requests and its guard opened no socket for the panel."""
        assert self.record.keeper is not None
        port, socket = self.record.port, self.record.socket
        if port is None or socket is None or not has_listener(port):
            return
        table = await asyncio.to_thread(ProcessTable.read)
        # In this order: the guard's socket is there before vLLM listens.
        if listens(port, table.descendants(self.record.keeper.pid)) and not os.path.exists(socket):
            raise OperationError(f"{self.name} runs without its guard: vLLM did not load it.", NO_GUARD_CURE)

    async def check_guard(self) -> None:
        """Raises OperationError unless what is the panel's alone is closed to everybody on the port."""
        assert self.record.port is not None
        status = HTTPStatus.OK.value
        async with self.model.core.client_of_anybody(self.record.port) as anybody:
            try:
                await anybody.is_sleeping(GUARD_LIMIT)
            except EngineRefused as error:
                status = error.status
        if status != HTTPStatus.FORBIDDEN:
            what = f"The guard of {self.name} does not stand: {IS_SLEEPING} answers {status} to everybody."
            raise OperationError(what, NO_GUARD_CURE)

    def remember_log(self, phases: PhaseReader) -> None:
        """Keep what the log told of the weights."""
        weights = phases.facts.weights_bytes
        if weights is not None:
            self.model.remember(lambda known: known.with_weights(weights))

    # ── warm, reference, measure, prime ──────────────────────────────────────────────────────────────────

    async def settle_in(self, client: VllmClient) -> Server:
        """From the first good health to awake: nothing of it is paid by the first real switch."""
        warm = StartPhase.WARMING not in self.operation.skip
        # A stranger's request must neither be cut by priming nor spoil figures.
        await patiently(self.model, lambda: client.set_gate(True))
        if warm:
            await self.warm_up(client)
        self.operation.checkpoint()
        level = self.resolve_level()
        self.model.write(resolved_level=level)
        server = Server(self.model, self.operation)
        if self.is_asked_to_stop():
            raise OperationError(f"{self.name} was asked to stop.")
        if warm:
            await server.proof.take_reference(WARM_UP_LIMIT)
        await self.measure()
        seconds = time.monotonic() - self.began
        self.model.remember(lambda known: known.with_time("start", seconds))
        self.model.core.note(lambda past: past.record_cold_start(self.name, seconds))
        self.operation.checkpoint()
        if level == "1" and server.frees_memory and StartPhase.PRIMING not in self.operation.skip:
            await self.prime(server)
        await server.open_gate()
        self.model.enter(Event.READY, last_switch=self.operation.ledger())
        return server

    async def warm_up(self, client: VllmClient) -> None:
        """One token, so that the person's first question does not pay for what is set up lazily."""
        self.enter_phase(StartPhase.WARMING)
        await proof.one_token(client, self.name, WARM_UP_LIMIT)

    def resolve_level(self) -> str:
        """What the model's `level` means for this launch; an old vLLM cannot sleep at all.

        `level: 0` is taken for `auto` where its sleep mode always gives up the weights' VRAM.
        """
        if self.config.level == "none" or capabilities(self.record.vllm_version or "").why_not:
            return "none"
        host = host_memory(self.model.core.simulated)
        pinned = pinned_estimate(self.model.footprint, weights_of(self.model))
        never = self.never_level2()
        if self.config.level == 2 and never:  # the version was not known before it ran
            self.operation.tell(self.name, "level 1", f"in place of 2: {never}")
        config = self.config
        if config.level == 0 and not has_level_0(self.record):
            config = msgspec.structs.replace(config, level="auto")
        return level_for(config, pinned, host.available_bytes, host.total_bytes, reloads=never is None)

    def never_level2(self) -> str | None:
        """Why this launch could not come back from level 2, in words; None if it can."""
        return never_level2(self.config, self.record.vllm_version, self.model.base)

    async def measure(self) -> None:
        """Keep what the model holds awake."""
        memory = await asyncio.to_thread(read_memory, self.model.core, set(self.config.gpus))
        awake = {str(gpu): held for gpu, now in memory.items() if (held := now.held_by(self.record))}

        def change(known: Footprint) -> Footprint:
            return known.with_memory(awake=awake, asleep={})

        self.model.remember(change)

    async def prime(self, server: Server) -> None:
        """Pay for the first sleep now; without the RAM for it the launch sleeps at level 2, or not at all."""
        try:
            await server.prime()
        except RefusedError as error:
            never = self.never_level2()
            if self.config.level != "auto" and not never:
                raise
            level = "none" if never else "2"
            self.operation.tell(self.name, StartPhase.PRIMING, f"level {level}: {error.what}")
            self.model.write(resolved_level=level)
        self.operation.times.clear()  # the ledger is the switch's, not the priming's

    def is_asked_to_stop(self) -> bool:
        """Whether somebody asked this launch's keeper to stop: vLLM may swallow it and become ready."""
        status = read_status(self.model.keeper_file)
        return status.launch == self.record.launch and status.asked

    # ── the other ends ───────────────────────────────────────────────────────────────────────────────────

    async def abandon(self) -> None:
        """Cancelled: leave nothing half started."""
        self.model.read()
        self.model.enter(Event.STOP)
        await stop_server(self.model, at_once=False)

    async def give_up(self, error: PanelError) -> None:
        """The server ended or never was: stopped if that was asked for, else failed with the log's cause."""
        launch, now = self.record.launch, self.model.read()
        if now.state is State.FAILED and now.launch == launch:
            return  # what failed has ended the server itself, which its keeper was asked for
        if self.is_asked_to_stop():
            await self.abandon()
            raise CancelledByUser(f"The start of {self.name} was stopped.") from error
        cause = cause_in_log(self.model, read_status(self.model.keeper_file))
        raced = cause is not None and self.was_race(cause.port)
        if cause is not None and cause.port == OWN_PORT and self.record.port is not None:
            cause = Diagnosis(taken(self.record.port, self.name), CURE)  # vLLM does not say by whom
        await fail(self.model, cause.reason if cause else error.what, cause.cure if cause else error.cure)
        if cause is not None:
            kind = PortRaceError if raced else OperationError
            raise kind(f"{self.name}: {cause.reason}", cause.cure) from error

    def was_race(self, port: str | None) -> bool:
        """Whether the `port` that was taken is none that the config names: the next start picks another."""
        if port is None or (port == OWN_PORT and self.config.port is not None):
            return False
        numbers = re.findall(r"\d+", port)
        named = re.findall(r"\d+", f"{self.config.args} {self.config.env}")
        return port == OWN_PORT or (bool(numbers) and numbers[-1] not in named)
