"""The key that a running server of ours asks for: the one it was started with, whatever the config says now.

It stands in the environment of the server's process, which its own user alone may see, and nowhere on disk.
"""

from __future__ import annotations

import functools

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.argv import LAUNCH_VARIABLES
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.telemetry.processes import ProcessId, environment_value

VARIABLE = "VLLM_API_KEY"
KEY_DIFFERS = "Its server asks for the key that it was started with, not for the config's."


def key_of(record: Record, model: ModelConfig | None) -> str | None:
    """The key of the record's running server; the config's where its process cannot be looked at."""
    launched = _launched(record.server) if record.server is not None else None
    if launched is None:
        return model.api_key if model is not None else None
    return launched or None


def differs(record: Record, model: ModelConfig) -> bool:
    """Whether the running server has another key than the config, which a restart would apply."""
    return key_of(record, model) != model.api_key


def _launched(server: ProcessId) -> str | None:
    try:
        return _read(server)
    except LookupError:
        return None


@functools.lru_cache(maxsize=256)
def _read(server: ProcessId) -> str:
    """It never changes while the process lives; raises LookupError if it cannot be read, not for good."""
    found = environment_value(server, VARIABLE)
    # A process that wiped its environment shows no launch either.
    if found is None or not any(environment_value(server, name) for name in LAUNCH_VARIABLES):
        raise LookupError(server.pid)
    return found
