"""What the environment tells the simulator: version, speed, faults, hardware."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_sleep_tui.simulator import devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Read once, at start."""

    version: str
    speed: float
    instant: bool
    faults: tuple[str, ...]
    dev_mode: bool
    keep_alive: bool
    """Stay after the engine's death (VLLM_KEEP_ALIVE_ON_ENGINE_DEATH)."""
    api_key: str
    folder: Path | None
    visible: tuple[int, ...] | None
    """CUDA_VISIBLE_DEVICES as NVML indices; None: all."""

    @property
    def minor(self) -> int:
        """The 32 of 0.32.0."""
        return int(self.version.split(".")[1])

    def wait(self, seconds: float) -> None:
        """Let simulated seconds pass."""
        if not self.instant and seconds > 0:
            time.sleep(seconds / self.speed)

    def visible_gpus(self) -> tuple[devices.SimulatedGpu, ...]:
        """The GPUs this server may use, in its order; none: it plays vLLM on the CPU."""
        if self.folder is None:
            return ()
        by_index = {gpu.index: gpu for gpu in devices.gpus(self.folder)}
        wanted = tuple(by_index) if self.visible is None else self.visible
        return tuple(by_index[index] for index in wanted if index in by_index)


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings of this process."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return Settings(
        version=environment.get("VLLM_SIM_VERSION", "0.32.0"),
        speed=float(environment.get("VLLM_SIM_SPEED", "1")),
        instant=environment.get("VLLM_SIM_TIMES") == "instant",
        faults=tuple(environment.get("VLLM_SIM_FAULTS", "").split(",")),
        dev_mode=environment.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"),
        keep_alive=environment.get("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "0") not in ("", "0"),
        api_key=environment.get("VLLM_API_KEY", ""),
        folder=devices.folder_from_environment(environment),
        visible=None
        if visible is None
        else tuple(int(part) for part in visible.split(",") if part.strip().isdigit()),
    )
