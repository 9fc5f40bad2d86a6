"""One worker's sleep and wake: by the mover, or by vLLM's own where that cannot be."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from . import fit, plugin
from .holder import Holder
from .mover import Mover, NoPool
from .plan import KV_CACHE, WEIGHTS

GIB = 2**30
POOL_VARIABLE = "VLLM_SLEEP_TUI_POOL"
"""The folder of the pool holders."""
LAUNCH_VARIABLE = "SLEEP_TUI_LAUNCH"


class Sleeper:
    """Of this process; made at its first sleep, when there are allocations to look at."""

    _here: ClassVar[Sleeper | None] = None

    @classmethod
    def here(cls, own_sleep: Callable[[], object], own_wake: Callable[[Any], object]) -> Sleeper:
        """The process's one, with vLLM's own ways beside it."""
        if cls._here is None:
            cls._here = cls()
        cls._here._own_sleep, cls._here._own_wake = own_sleep, own_wake
        return cls._here

    @classmethod
    def existing(cls) -> Sleeper:
        """The process's one, for whoever only looks or tells it what comes."""
        if cls._here is None:
            cls._here = cls()
        return cls._here

    def __init__(self) -> None:
        from .cuda import CudaDriver

        self._own_sleep: Callable[[], object] = lambda: None
        self._own_wake: Callable[[Any], object] = lambda tags: None
        cumem = importlib.import_module("vllm.device_allocator.cumem")
        device_allocator = importlib.import_module("vllm.device_allocator")
        self._logger = importlib.import_module("vllm.logger").init_logger("vllm.panel_sleep")
        self._allocations = cumem.CuMemAllocator.get_instance().pointer_to_data
        deferrable = getattr(device_allocator, "DEFERRABLE_TAGS", None)
        self.mover = Mover(
            self._allocations,
            CudaDriver(cumem.create_and_map, cumem.unmap_and_release, _holder(), needs_rdma=_hands_kv_on()),
            # Up to 0.26 a sleep keeps the weights at the most, and a wake leaves out whatever is not named.
            tuple(deferrable) if deferrable is not None else Everything(),
        )
        self.uses_own = False
        """Whether vLLM's own sleep mode is used after all, for the life of the process."""

    def sleep(self, level: int) -> None:
        """Sleep at `level`; where allocations do not fit, or without RAM, vLLM's own way from now on."""
        if not self.uses_own and self.mover.level is None and (problems := fit.misfits_of(self._allocations)):
            self._fall_back("; ".join(problems))
        if not self.uses_own:
            try:
                freed, kept = self.mover.sleep(level)
            except NoPool as error:
                if self.mover.level is not None:
                    raise  # half of it sleeps already, in our way
                self._fall_back(str(error))
            else:
                self._tell(freed, kept)
                return
        self._own_sleep()

    def wake(self, tags: Sequence[str] | None) -> None:
        """Bring back what `tags` name; all without."""
        if self.uses_own:
            self._own_wake(tags)
        else:
            self.mover.wake(tags)
            self._logger.info("panel_sleep: woke; %s", _words(self.mover.last))

    def facts(self) -> dict[str, Any]:
        """How it is, as JSON can say it."""
        return {
            "state": "stock" if self.uses_own else "own",
            "why": plugin.State.why,
            "level": self.mover.level,
            "pool_bytes": self.mover.pool_bytes,
            "last": dict(self.mover.last),
        }

    def _fall_back(self, why: str) -> None:
        self.uses_own = True
        self.mover.let_go()
        plugin.State.why = why
        plugin.tell("stock", why)

    def _tell(self, freed: int, kept: int) -> None:
        # In the words of vLLM's own line, which is what the panel reads where it sees no memory.
        self._logger.info(
            "panel_sleep: sleep freed %.2f GiB memory in total, of which %.2f GiB is backed up in CPU and "
            "the rest %.2f GiB is discarded directly; %s",
            freed / GIB,
            kept / GIB,
            (freed - kept) / GIB,
            _words(self.mover.last),
        )


class Everything(tuple[str, ...]):
    """Holds any tag: up to vLLM 0.26 every tag can be left out of a wake."""

    __slots__ = ()

    def __contains__(self, tag: object) -> bool:
        return True


def _holder() -> Holder:
    """That of the device of this worker."""
    import torch

    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return Holder(os.environ.get(POOL_VARIABLE), gpu, os.environ.get(LAUNCH_VARIABLE, ""))


def _hands_kv_on() -> bool:
    """Whether this engine shares its KV cache with others, for which network cards must reach it."""
    try:
        return bool(importlib.import_module("vllm.distributed.kv_transfer").has_kv_transfer_group())
    except (ImportError, AttributeError):
        return True


def _words(last: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value / GIB:.2f} GiB" if name.endswith("_bytes") else f"{name} {value * 1000:.0f} ms"
        for name, value in last.items()
    )


__all__ = ["KV_CACHE", "WEIGHTS", "Everything", "Sleeper"]
