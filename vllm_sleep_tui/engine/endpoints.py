"""The paths of a server's HTTP that the panel asks: vLLM's own, and the guard's gate."""

from __future__ import annotations

from vllm_sleep_tui.engine.guard import GATE_PATH

HEALTH = "/health"
VERSION = "/version"
MODELS = "/v1/models"
METRICS = "/metrics"
SLEEP = "/sleep"
WAKE_UP = "/wake_up"
IS_SLEEPING = "/is_sleeping"
COLLECTIVE_RPC = "/collective_rpc"
RESET_PREFIX_CACHE = "/reset_prefix_cache"
SERVER_INFO = "/server_info"
GATE = GATE_PATH
