"""A fleet as another process has it: its records on disk, clients of its servers, handles of its models.

In a module of its own, because pytest loads conftest.py under another name than who imports it: what is
opened here must be known to both.
"""

from __future__ import annotations

from pathlib import Path

from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.store.records import Record, RecordStore

_OPENED: dict[Fleet, Core] = {}


def record_of(fleet: Fleet, name: str) -> Record:
    """The model's record as it is on disk now."""
    return RecordStore(fleet.state_dir, fleet.loaded.path).read(name)


def record_path(fleet: Fleet, name: str) -> Path:
    """The file of the model's record."""
    return RecordStore(fleet.state_dir, fleet.loaded.path).path(name)


def core_of(fleet: Fleet) -> Core:
    """A second core over the fleet's files, closed at the end of the test."""
    if fleet not in _OPENED:
        _OPENED[fleet] = Core(fleet.loaded, fleet.state_dir)
    core = _OPENED[fleet]
    core.reload(fleet.loaded)
    return core


def model_of(fleet: Fleet, name: str) -> Model:
    """A handle of the model, of the second core."""
    return core_of(fleet).model(name)


def client_of(fleet: Fleet, name: str) -> VllmClient:
    """A client of the server that the model's record tells of now."""
    return model_of(fleet, name).client()


async def close() -> None:
    """Close what was opened for this test."""
    while _OPENED:
        _, core = _OPENED.popitem()
        await core.close()
