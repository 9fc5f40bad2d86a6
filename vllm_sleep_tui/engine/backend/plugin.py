"""What vLLM calls in each of its processes: puts the backend in place, or says why not.

vLLM 0.25 and newer: registered as the backend ``panel``, and under the name of the default, because
``--sleep-mode-backend`` came later (0.33) than the registry. 0.24: the two methods of the allocator.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from . import fit

NAME = "panel"
DEFAULT = "cumem"
SIGN = "panel-sleep-backend"
"""Begins the one line of the log that tells of the backend, as JSON: state (own, stock), why, vllm."""


def register() -> None:
    """The entry point; vLLM may call it more than once."""
    if State.told:
        return
    State.told = True
    try:
        problems = _put_in_place()
    except Exception as error:  # whatever it is, vLLM goes on with what is its own
        problems = [f"{type(error).__name__}: {error}"]
    State.why = "; ".join(problems)
    tell("stock" if problems else "own", State.why)


class State:
    """Of this process."""

    told = False
    why = ""
    vllm = ""


def tell(state: str, why: str) -> None:
    """Say in the log how it is; on standard error, because a log level would hide it."""
    word = {"state": state, "why": why, "vllm": State.vllm}
    print(f"{SIGN} {json.dumps(word)}", file=sys.stderr, flush=True)


def _put_in_place() -> list[str]:
    import vllm
    from vllm.platforms import current_platform

    State.vllm = vllm.__version__
    cumem = _module("vllm.device_allocator.cumem") if current_platform.is_cuda() else None
    allocation = getattr(_module("vllm.device_allocator"), "AllocationData", None)
    factory = getattr(_module("vllm.device_allocator.sleep_mode_backend"), "SleepModeBackendFactory", None)
    problems = fit.misfits(vllm.__version__, current_platform, cumem, allocation)
    if factory is not None:
        problems += _register(factory, fits=not problems)
    elif not problems:
        _replace_methods(cumem)
    return problems


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _register(factory: Any, *, fits: bool) -> list[str]:
    """Both names lead to the backend if it fits, else both to vLLM's own."""
    registry = getattr(factory, "_registry", None)
    wanted = ["name", "module_path", "class_name"]
    if (
        not isinstance(registry, dict)
        or DEFAULT not in registry
        or fit.parameters(factory.register_backend) != wanted
    ):
        return ["vLLM's registry of sleep-mode backends is another one"]
    if NAME in registry:
        return []
    if fits:
        factory.register_backend(NAME, f"{__package__}.registered", "PanelBackend")
        registry[DEFAULT] = registry[NAME]
    else:
        registry[NAME] = registry[DEFAULT]
    return []


def _replace_methods(cumem: Any) -> None:
    from .sleeper import Sleeper

    allocator = cumem.CuMemAllocator
    own_sleep, own_wake = allocator.sleep, allocator.wake_up

    def sleep(self: Any, offload_tags: Any = None) -> None:
        tags = (self.default_tag,) if offload_tags is None else offload_tags
        level = 1 if "weights" in ((tags,) if isinstance(tags, str) else tags) else 2
        Sleeper.here(lambda: own_sleep(self, offload_tags), lambda tags: own_wake(self, tags)).sleep(level)

    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        Sleeper.here(lambda: None, lambda tags: own_wake(self, tags)).wake(tags)

    allocator.sleep, allocator.wake_up = sleep, wake_up
