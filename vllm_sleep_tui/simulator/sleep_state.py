"""The sleep state of an engine and what each operation does to it, as vLLM 0.24 and 0.32 were seen to do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from vllm_sleep_tui.simulator.behaviours import Fault, Faults
from vllm_sleep_tui.simulator.logs import Log
from vllm_sleep_tui.simulator.memory import INVALID_ARGUMENT, OUT_OF_MEMORY, Memory, share
from vllm_sleep_tui.simulator.processes import wait_for_ever
from vllm_sleep_tui.simulator.profiles import GIB, Durations, MemoryPlan, pinned_bytes
from vllm_sleep_tui.simulator.settings import Settings

TAGS = ("weights", "kv_cache")
SLOW_SLEEP_SECONDS = 3.0


class OperationFailed(Exception):  # noqa: N818 - the operation's failure, answered as a 500
    """The engine's operation raised; the text is vLLM's."""


def die() -> None:
    """End the engine as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)


class SleepState:
    """What is asleep, and whether what the model says can be trusted."""

    def __init__(
        self,
        *,
        memory: Memory,
        plan: MemoryPlan,
        settings: Settings,
        faults: Faults,
        frees: bool,
        why_no_reload: str | None,
        is_own: bool = False,
    ) -> None:
        self.asleep: list[str] = []
        self.garbage = False
        self.ruined = False
        self.crashes_on_request = False
        self._wedged = False
        self._level: int | None = None
        self.is_own = is_own
        """Whether the panel's own sleep mode is in place of vLLM's."""
        self.keeps_weights_next = False
        self._refused: str | None = None
        """Why it was not put to a deeper level, last time it was asked."""
        self._freed_bytes = 0
        self._memory = memory
        self._plan = plan
        self._settings = settings
        self._faults = faults
        self.frees = frees
        self._why_no_reload = why_no_reload
        self._durations = Durations(
            weights_gib=plan.weights / GIB, kv_gib=plan.kv_cache / GIB if frees else 0
        )
        self._log = Log("EngineCore")

    def sleep(self, level: int) -> None:
        """Fall asleep; raises OperationFailed, after which only a restart helps."""
        if self.asleep and not (self._settings.minor >= 31 and len(self.asleep) < len(TAGS)):
            self._log.warning("abstract.py:385", "Executor is already sleeping.")
            return
        begun = time.perf_counter()
        others = self._memory.used_by_others()
        self._misbehave(Fault.SLEEP_HANGS, Fault.ENGINE_DIES_ON_SLEEP)
        if self._faults.use(Fault.SLEEP_SLOW):
            time.sleep(SLOW_SLEEP_SECONDS)
        if self._faults.use(Fault.SLEEP_500):
            self._fail_half_asleep(OUT_OF_MEMORY)
        if self.frees and not self._faults.use(Fault.SLEEP_FREES_NOTHING):
            self._release(level, others)
        else:
            self._log.info("cumem.py:206", self._freed(0, 0))
        self._level = 0 if self.is_own and self.keeps_weights_next else level
        self.keeps_weights_next = False
        self.asleep = list(TAGS)
        seconds = time.perf_counter() - begun
        self._log.info("abstract.py:390", f"It took {seconds:.6f} seconds to fall asleep.")

    def _release(self, level: int, others: int) -> None:
        before = self._memory.held
        if self.is_own and self.keeps_weights_next:
            level = 0
        backed_up = self._plan.weights if level == 1 else 0
        durations = self._durations.own_sleep if self.is_own else self._durations.sleep
        seconds = durations(level=level, has_pinned=self._memory.has_pinned)
        if level == 1:
            self._pin(seconds)
        else:
            self._settings.wait(seconds)
        for tag in TAGS if level else ("kv_cache",):
            self._memory.unmap(tag)
        if level == 2 and self.is_own:
            self._memory.unpin()
        freed = self._freed_bytes = before - self._memory.held
        self._log.info("cumem.py:206", self._freed(freed, backed_up))
        if self._memory.used_by_others() - others > (freed if self.is_own else 0):
            # vLLM compares what is free on the whole device, so a neighbour's growth during a sleep is taken
            # for its own; the engine does not survive the exception (h100/overlap.jsonl). The panel's sleep
            # mode makes up for it.
            self.crashes_on_request = True
            raise OperationFailed("Memory usage increased after sleeping.")
        if level > 1:
            self.garbage = True
        if level > 2:
            self.ruined = True
        use = (self._memory.held + self._memory.used_by_others()) / GIB
        text = f"Sleep mode freed {freed / GIB:.2f} GiB memory, {use:.2f} GiB memory is still in use."
        self._log.info("gpu_worker.py:181", text)

    def _pin(self, seconds: float) -> None:
        steps = 1 if self._settings.instant or self._memory.has_pinned else 8
        pool = self._plan.weights if self.is_own else pinned_bytes(self._plan.weights)
        for step in range(1, steps + 1):
            if not self._memory.pin(pool * step // steps):
                self._fail_half_asleep("CUDA error: out of memory")
            self._settings.wait(seconds / steps)

    def _fail_half_asleep(self, text: str) -> None:
        self._memory.unmap("kv_cache")
        self.crashes_on_request = True
        raise OperationFailed(text)

    def _freed(self, freed: int, backed_up: int) -> str:
        rest = max(0, freed - backed_up)
        return (
            f"CuMemAllocator: sleep freed {freed / GIB:.2f} GiB memory in total, of which "
            f"{backed_up / GIB:.2f} GiB "
            f"is backed up in CPU and the rest {rest / GIB:.2f} GiB is discarded directly."
        )

    def wake(self, tags: Sequence[str] | None) -> None:
        """Wake these tags, or all; a tag that is not asleep makes the call do nothing."""
        if not self.asleep:
            self._log.warning("abstract.py:400", "Executor is not sleeping.")
            return
        for tag in tags or ():
            if tag not in self.asleep:
                text = f"Tag {tag} is not in sleeping tags {self.asleep}"
                self._log.warning("abstract.py:404", text)
                return
        begun = time.perf_counter()
        self._misbehave(Fault.WAKE_HANGS, Fault.ENGINE_DIES_ON_WAKE)
        if self._wedged:
            raise OperationFailed(INVALID_ARGUMENT)
        if self._faults.use(Fault.WAKE_500):
            raise OperationFailed(OUT_OF_MEMORY)
        chosen = [tag for tag in TAGS if tag in (tags or self.asleep)]
        for tag in chosen:
            self._map(tag)
        if self._faults.use(Fault.GARBAGE_AFTER_WAKE):
            self.garbage = True
        seconds = time.perf_counter() - begun
        shown = list(tags) if tags else set(chosen)
        self._log.info("abstract.py:408", f"It took {seconds:.6f} seconds to wake up tags {shown}.")

    def _map(self, tag: str) -> None:
        if self.frees and self.is_own and tag == "kv_cache":
            made = self._memory.map_shared(
                tag, share(self._plan, tag), stale=self._faults.use(Fault.STALE_CHUNK)
            )
            if made is None:
                raise OperationFailed(OUT_OF_MEMORY)
            self._settings.wait(self._durations.own_kv_cache(made_gib=made / GIB))
        elif self.frees:
            if not self._memory.map(tag, share(self._plan, tag)):
                self._wedged = self._settings.minor <= 24
                raise OperationFailed(OUT_OF_MEMORY)
            stayed = tag == "weights" and self._level == 0
            self._settings.wait(0 if stayed else self._weights_seconds(tag))
        self.asleep.remove(tag)

    def _weights_seconds(self, tag: str) -> float:
        if self.is_own and self._level == 1:
            return self._durations.own_weights()
        return self._durations.wake(tag, level=self._level or 1)

    def release(self) -> None:
        """vLLM's own level 0 (0.31): the KV cache alone; raises OperationFailed if any of it sleeps."""
        if self.asleep:
            raise OperationFailed("release_kv_cache_memory() requires all executor memory to be resident")
        self._misbehave(Fault.SLEEP_HANGS, Fault.ENGINE_DIES_ON_SLEEP)
        if self.frees:
            self._memory.unmap("kv_cache")
        self._level = 0
        self.asleep = ["kv_cache"]

    def deepen(self, level: int) -> None:
        """The panel's sleep mode, asked by a worker's own method: from level 0 to 1 or 2, if it is there."""
        if self._level != 0 or not self.asleep:
            return
        others = self._memory.used_by_others()
        self._misbehave(Fault.SLEEP_HANGS, Fault.ENGINE_DIES_ON_SLEEP)
        self._refused = None
        if level == 1 and self._faults.use(Fault.NO_POOL):
            self._refused = f"{self._plan.weights} bytes of RAM: Cannot allocate memory"
            return
        if self.frees:
            self._release(level, others)
        self._level = level

    def facts(self) -> dict[str, object]:
        """What a worker with the panel's extension answers."""
        if not self.is_own:
            return {"state": "stock", "why": "simulated"}
        level = self._level if self.asleep else None
        refused = {"refused": self._refused} if self._refused else {}
        last = {"freed_bytes": self._freed_bytes}
        return {"state": "own", "why": "", "level": level, "last": last, **refused}

    def reload(self) -> None:
        """`reload_weights`: cures garbage, but not what level 3 did; raises OperationFailed."""
        if self._faults.use(Fault.RELOAD_500):
            raise OperationFailed("simulated failure of reload_weights")
        if self._faults.use(Fault.RELOAD_UNKNOWN):
            raise OperationFailed("Model reloading with `auto` format")
        if self._why_no_reload is not None:
            raise OperationFailed(self._why_no_reload)
        if self.frees and "weights" in self.asleep:
            raise OperationFailed("CUDA error: an illegal memory access was encountered")
        self._log.info("gpu_model_runner.py:5433", "Reloading weights inplace...")
        begun = time.perf_counter()
        self._settings.wait(self._durations.reload() if self.frees else 0.04)
        self.garbage = self.ruined
        seconds = time.perf_counter() - begun
        self._log.info(
            "gpu_model_runner.py:5455", f"Reloading and processing weights took {seconds:.2f} seconds"
        )

    def _misbehave(self, hangs: Fault, dies: Fault) -> None:
        if self._faults.use(dies):
            die()
        if self._faults.use(hangs):
            wait_for_ever()
