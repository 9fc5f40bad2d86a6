"""What the handlers of one API server share."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sleep_tui.simulator.arguments import Options
from vllm_sleep_tui.simulator.behaviours import Faults
from vllm_sleep_tui.simulator.client import EngineClient
from vllm_sleep_tui.simulator.logs import Log
from vllm_sleep_tui.simulator.metrics import Metrics
from vllm_sleep_tui.simulator.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """One server; what changes in it are the engine's state, the metrics and the faults."""

    options: Options
    settings: Settings
    engine: EngineClient
    metrics: Metrics
    faults: Faults
    log: Log
    world_size: int
