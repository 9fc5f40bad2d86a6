"""The paths of a server's HTTP: those that the panel asks, and those that the guard lets clients ask."""

from __future__ import annotations

from vllm_sleep_tui.engine.guard import (
    GATE_CLOSED,
    GATE_PATH,
    INFERENCE,
    is_inference,
    is_read_only,
    is_stored,
    why_foreign,
)

__all__ = ["GATE_CLOSED", "INFERENCE", "is_inference", "is_read_only", "is_stored", "why_foreign"]

HEALTH = "/health"
VERSION = "/version"
MODELS = "/v1/models"
METRICS = "/metrics"
SLEEP = "/sleep"
RELEASE_KV_CACHE = "/release_kv_cache_memory"
WAKE_UP = "/wake_up"
IS_SLEEPING = "/is_sleeping"
COLLECTIVE_RPC = "/collective_rpc"
RESET_PREFIX_CACHE = "/reset_prefix_cache"
SERVER_INFO = "/server_info"
GATE = GATE_PATH
