"""Looks after the servers while a panel or `serve` is open.

Everyone settles: what died is written down, what was cut off is finished. Only the leader acts unasked:
restarts, times idleness, looks for hangs and for orphans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine

import msgspec

from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.attached.care import AttachedCare
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.orphans import find_orphans, summary
from vllm_sleep_tui.fleet.operations.acquire import gpus_of
from vllm_sleep_tui.fleet.operations.end import cut_off_words, is_cut_off
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.reconcile import is_unfinished, needs_care, reconcile
from vllm_sleep_tui.fleet.operations.room import kept_pools
from vllm_sleep_tui.fleet.poller import FaultLog, Poller
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import LockBusyError, hold, holder
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.fleet.supervision import idle
from vllm_sleep_tui.fleet.supervision.hang import HangWatch, end_hung
from vllm_sleep_tui.fleet.supervision.leader import LeaderLock
from vllm_sleep_tui.fleet.supervision.restart import PAUSES, Restarter

INTERVAL = 0.5
"""Seconds between two looks at the records, and between two tries for the leader's seat."""
POOLS_INTERVAL = 5.0
"""Seconds between two looks at the KV pools, which every operation looks at besides."""
SETTLING = 5.0
"""Seconds until what is left unsettled counts as an orphan."""
log = logging.getLogger(__name__)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The leader's patience, in seconds."""

    hang: float = 120.0
    hang_poll: float = 5.0
    hang_probe: float = 20.0
    """For one token, before the verdict."""
    orphans_poll: float = 60.0
    restart_pauses: tuple[float, ...] = PAUSES


class Tasks:
    """At most one task for each name."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Do `work`, unless something under this name is still being done."""
        if self.busy(name):
            work.close()
        else:
            self._tasks[name] = asyncio.create_task(work, name=name)

    def busy(self, name: str) -> bool:
        """Whether something under this name is being done."""
        task = self._tasks.get(name)
        return task is not None and not task.done()

    async def close(self) -> None:
        """Cut off what is being done; whoever comes next carries it on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


class Watcher:
    """What every open fleet does: it settles what nobody is at, and sees to the KV pools."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tasks = Tasks()
        self._faults = FaultLog()
        self._pollers = (
            Poller("the look at what is unfinished", INTERVAL, self._look),
            Poller("the look at the KV pools", POOLS_INTERVAL, self._have_pools),
        )

    def start(self) -> None:
        """Begin to look."""
        for poller in self._pollers:
            poller.start()

    async def close(self) -> None:
        """Stop looking; care under way is cut off, to be settled by whoever comes next."""
        for poller in self._pollers:
            await poller.close()
        await self._tasks.close()

    async def _look(self) -> None:
        for model in self._core.models():
            with self._faults.catch(f"the look at {model.name}"):
                if needs_care(model):
                    self._tasks.begin(f"care of {model.name}", self._look_after(model))
        await self._core.close_retired()
        if self._core.has_to_flush:
            await asyncio.to_thread(self._core.flush)

    async def _have_pools(self) -> None:
        """Have holders of the KV pools again, should one have died: without, switches are slower.

        What a switch left in a pool that was cut off is given up, unless the next one is under way.
        """
        pooled = [model for model in self._core.readable() if model.record.sleep_backend == "own"]
        gpus = {gpu for model in pooled for gpu in model.record.gpus}
        if not gpus:
            return
        for gpu, pool in (await asyncio.to_thread(kept_pools, self._core, gpus)).items():
            with contextlib.suppress(LockBusyError):
                async with hold(self._core.gpu_locks({gpu}), holder("settling", f"GPU {gpu}"), limit=0.0):
                    await asyncio.to_thread(pool.give_up)

    async def _look_after(self, model: Model) -> None:
        """Settle one model, unless somebody else holds its locks: then it is in good hands."""
        name, gpus = model.name, gpus_of([model])
        paths = [*self._core.gpu_locks(gpus), model.lock]
        with self._faults.catch(f"the care of {name}"), contextlib.suppress(LockBusyError, PanelError):
            async with hold(paths, holder("settling", name), limit=0.0):
                if is_unfinished(model) and gpus_of([model]) <= gpus:
                    log.info("%s: settling what an earlier operation left", name)
                    await reconcile(model, Operation("settling", name))


class Leader:
    """What one process does for all: see the module."""

    def __init__(self, core: Core, limits: Limits | None = None) -> None:
        self._core = core
        self._limits = limits or Limits()
        self.seat = LeaderLock(core.records.folder.parent / core.records.path("leader", "lock").name)
        self.notes: tuple[str, ...] = ()
        """What the person should know: orphans."""
        self._tasks = Tasks()
        self._faults = FaultLog()
        self._poller = Poller("the leader's look", INTERVAL, self._look)
        self._restarter = Restarter(self._limits.restart_pauses, self._leads)
        self._hangs = HangWatch(self._limits.hang, self._limits.hang_probe)
        self._idleness = idle.Idleness()
        self._attached = AttachedCare(self._limits.hang, self._leads)
        self._next_look: dict[str, float] = {}
        self._cut_off: dict[str, str | None] = {}
        self._refused: dict[str, tuple[str | None, float]] = {}

    def start(self) -> None:
        """Begin to try for the seat."""
        self._is_time("orphans", SETTLING)
        self.seat.take()
        self._poller.start()

    async def close(self) -> None:
        """Leave the seat, for good; a restart under way is carried on by whoever comes next."""
        await self._poller.close()
        await self._tasks.close()
        self.seat.leave()

    async def _look(self) -> None:
        if self.seat.take():
            self._lead()

    def _leads(self) -> bool:
        """Asked under the locks, before each act: this process may have been stopped since it decided."""
        return self.seat.is_mine

    def _lead(self) -> None:
        if self._is_time("orphans", self._limits.orphans_poll):
            self._tasks.begin("orphans", self._look_for_orphans())
        for model in self._core.models():
            if not self._tasks.busy(model.name):
                with self._faults.catch(f"the leader's look at {model.name}"):
                    self._lead_one(model)

    def _lead_one(self, model: Model) -> None:
        name, config = model.name, model.config
        poll = idle.poll_seconds(config.idle) or self._limits.hang_poll
        if config.is_attached:
            if self._is_time(name, poll):
                self._tasks.begin(name, self._logged(name, self._attached.look(model)))
            return
        record = model.read()
        if self._restarter.is_due(model):
            self._tasks.begin(name, self._logged(name, self._restarter.act(model)))
        elif (
            record.state in (State.AWAKE, State.ASLEEP)
            and record.intent is None
            and self._is_time(name, poll)
        ):
            self._tasks.begin(name, self._logged(name, self._look_at(model)))

    def _is_time(self, what: str, interval: float) -> bool:
        """Whether `interval` seconds have passed since this was last True for `what`."""
        now = time.monotonic()
        if now < self._next_look.get(what, 0.0):
            return False
        self._next_look[what] = now + interval
        return True

    async def _logged(self, name: str, work: Coroutine[None, None, None]) -> None:
        """`work`, with what went wrong in the log; the record holds it too."""
        with self._faults.catch(f"the leader's care of {name}"):
            try:
                await work
            except EngineError:
                pass  # it is ending, or the watcher finds it dead
            except PanelError as error:
                log.warning("%s: %s", name, error.what)

    async def _look_at(self, model: Model) -> None:
        """Is it idle, does it hang?"""
        record, config = model.record, model.config.idle
        if record.state is State.ASLEEP and not config.stop_after:
            return
        client = model.client()
        try:
            gate = await client.gate()
        except EngineError:
            if self._is_cut_off(record):
                return
            if self._hangs.is_deaf(record):
                await self._end(model, "not a word from it")
            return
        self._hangs.hears(record)
        what = idle.due(config, record.state, idle.now_idle(self._idleness, record, gate))
        key = (record.launch, record.since)
        if what is not None and not model.is_wanted and self._refused.get(record.name) != key:
            log.info("%s: %s, nobody has used it for a while", record.name, what)
            try:
                await idle.put_away(model, what, gate, self._leads)
            except PanelError:
                self._refused[record.name] = key  # no RAM for level 1, say: once is enough
                raise
        elif record.state is State.AWAKE and await self._hangs.is_hung(client, record, gate):
            await self._end(model, f"{gate.in_flight} requests under way and no token")

    def _is_cut_off(self, record: Record) -> bool:
        """Whether only our way in is gone: clients are served as ever; said once a launch."""
        if not is_cut_off(record):
            return False
        if self._cut_off.get(record.name) != record.launch:
            self._cut_off[record.name] = record.launch
            log.warning("%s: %s %s", record.name, *cut_off_words(record))
        return True

    async def _end(self, model: Model, symptom: str) -> None:
        log.warning("%s: it hangs: %s", model.name, symptom)
        await end_hung(model, symptom, self._hangs.limit, self._leads)

    async def _look_for_orphans(self) -> None:
        with self._faults.catch("the look for orphans"):
            found = await asyncio.to_thread(find_orphans, self._core.state_dir)
            self.notes = summary(found)
