"""The config file: its types. Reading it, with line numbers in every complaint, is `load`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Level = Literal["auto", 1, 2, "none"]


class IdleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a model may be idle, counted from the end of its last answer."""

    sleep_after: str | None = None
    stop_after: str | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the file; its name is its key under ``models:``."""

    model: str | None = None
    """What `vllm serve` is given: a hub name or a folder."""
    url: str | None = None
    """A server that somebody else started; attached, never started or ended."""
    gpus: tuple[int, ...] = (0,)
    """NVML indices. Empty: vLLM on the CPU, where sleeping frees no memory."""
    level: Level = "auto"
    args: dict[str, Any] = {}
    """Flags of `vllm serve` without the dashes."""
    env: dict[str, str] = {}
    port: int | None = None
    autostart: bool = False
    idle: IdleConfig = IdleConfig()


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenAI endpoint of `serve`."""

    port: int = 8800


class SimulatedGpuConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU of the demo."""

    name: str
    memory: str


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    models: dict[str, ModelConfig]
    vllm_command: tuple[str, ...] = ("vllm",)
    gateway: GatewayConfig | None = None
    simulated_gpus: tuple[SimulatedGpuConfig, ...] = ()
