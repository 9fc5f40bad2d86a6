"""Questions about this machine and a state folder that need no open fleet; light, for verbs that only look.

What runs now, what a server said, which vLLMs, GPUs and cached models are here, whose servers the others are.
Nothing is started, and only `end_orphans` ends anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sleep_tui.config.flags import FlagTable
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.engine.serve_line import ServeLine, arguments_in, read_arguments
from vllm_sleep_tui.files import is_text
from vllm_sleep_tui.fleet import server_log
from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.observe.discovery import (
    CachedModel,
    ForeignServer,
    VllmEnvironment,
    find_foreign_servers,
    find_models,
    find_vllm,
    vllm_version,
)
from vllm_sleep_tui.fleet.observe.orphans import Orphan, end_orphans, find_orphans
from vllm_sleep_tui.fleet.observe.snapshotter import looking, read_once
from vllm_sleep_tui.fleet.operations.arguments import flags_of, simulated_flags
from vllm_sleep_tui.fleet.server_log import ServerLog
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.sizing.hub import has_token, hub_cache
from vllm_sleep_tui.telemetry.gpus import GpuFault, GpuReading, open_reader

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.store.history import History

POLL_SECONDS = 0.5
"""Between two looks for events of other processes: a person reads along."""

__all__ = [
    "CachedModel",
    "ForeignServer",
    "GpuFault",
    "GpuReading",
    "Orphan",
    "ServeLine",
    "Surroundings",
    "VllmEnvironment",
    "arguments_in",
    "coming_events",
    "end_orphans",
    "find_orphans",
    "find_strangers",
    "flag_tables",
    "latest_events",
    "log_of",
    "look_around",
    "looking",
    "read_arguments",
    "read_once",
    "vllm_version",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What there is to work with."""

    environments: tuple[VllmEnvironment, ...]
    gpus: tuple[GpuReading, ...]
    gpu_note: str | None
    gpu_faults: tuple[GpuFault, ...] = ()
    models: tuple[CachedModel, ...]
    token: bool

    @property
    def best_environment(self) -> VllmEnvironment | None:
        """The first one that can sleep, else the first."""
        able = [environment for environment in self.environments if environment.can_sleep]
        return next(iter(able or self.environments), None)


def look_around(here: Path) -> Surroundings:
    """Look for vLLM, GPUs and cached models; starts nothing."""
    with closing(open_reader(None)) as reader:
        gpus, note, faults = reader.read(), reader.note, reader.faults
    return Surroundings(
        environments=tuple(env for env in find_vllm(os.environ, here) if is_text(env.command)),
        gpus=gpus,
        gpu_note=note,
        gpu_faults=faults,
        models=tuple(model for model in find_models(hub_cache(os.environ)) if is_text(model.name)),
        token=has_token(os.environ),
    )


def find_strangers() -> tuple[ForeignServer, ...]:
    """vLLM servers that were not started here, with their VRAM where NVML tells."""
    with closing(open_reader(None)) as reader:
        return find_foreign_servers(reader.read())


def log_of(loaded: LoadedConfig, state_dir: Path, name: str) -> ServerLog:
    """The log of one of the config's models; raises OperationError if its record cannot be read."""
    return server_log.log_of(RecordStore(state_dir, loaded.path), name)


def flag_tables(loaded: LoadedConfig, state_dir: Path, *, may_ask: bool) -> list[FlagTable]:
    """The flags of each vLLM that a config names, asked if it may be."""
    own = [model for model in loaded.config.models.values() if not model.is_attached]
    if loaded.config.simulated_gpus:
        return [simulated_flags({**os.environ, **model.env}) for model in own[:1]]
    commands = dict.fromkeys(model.vllm_command or loaded.config.vllm_command for model in own)
    return [flags_of(command, loaded.path.parent, state_dir, may_ask=may_ask) for command in commands]


def latest_events(loaded: LoadedConfig, state_dir: Path, count: int) -> list[FleetEvent]:
    """The last `count` events of the config's models, the oldest first."""
    with _history(loaded, state_dir) as history:
        return history.latest_events(count)


def coming_events(
    loaded: LoadedConfig, state_dir: Path, after: FleetEvent | None, since: float
) -> Iterator[FleetEvent]:
    """The events after this one, if it is None from the moment `since` on; waits for them without an end."""
    last = None if after is None else after.id
    with _history(loaded, state_dir) as history:
        while True:
            if last is None:
                last = history.last_event_id(since)
            else:
                events, last = history.events_after(last)
                yield from events
            time.sleep(POLL_SECONDS)


@contextmanager
def _history(loaded: LoadedConfig, state_dir: Path) -> Iterator[History]:
    from vllm_sleep_tui.fleet.store.history import History  # only who asks for it needs a database

    with closing(History(state_dir, loaded.path)) as history:
        yield history
