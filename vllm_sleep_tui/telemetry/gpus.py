"""GPUs as readings, real or simulated, behind one protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One GPU at one moment; what is not known is None."""

    index: int
    """NVML's, in PCI order."""
    uuid: str
    name: str
    used_bytes: int | None = None
    """As nvidia-smi shows it, without what the driver reserves for itself."""
    free_bytes: int | None = None
    """What can still be taken; less than total minus used where the driver reserves some."""
    total_bytes: int | None = None
    utilization: float | None = None
    """Per cent."""
    temperature: float | None = None
    """Degrees Celsius."""
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    throttle: tuple[str, ...] | None = None
    """Why the clocks are held back; empty: they are not."""
    processes: Mapping[int, int | None] | None = None
    """VRAM bytes by pid, None where only the pid is known; None as a whole: not known who uses it."""
    simulated: bool = False

    @property
    def taken_bytes(self) -> int | None:
        """What nobody can take any more: used or reserved by the driver; None if the memory is not known."""
        if self.total_bytes is None or self.free_bytes is None:
            return self.used_bytes
        return self.total_bytes - self.free_bytes


class GpuReader(Protocol):
    """Reads all GPUs; may be called from several threads and never raises for what a driver does."""

    @property
    def note(self) -> str | None:
        """One line on what cannot be known now and why; None if all is well."""

    def read(self) -> tuple[GpuReading, ...]:
        """All GPUs now."""

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        """Taken bytes of one GPU, the driver's reserve included, and bytes by pid: quick, for polls.

        Total minus taken is what a start can have, which total minus `used_bytes` is not.
        """

    def close(self) -> None:
        """Let go of the driver."""


class NoGpus:
    """The reader where there is nothing to read."""

    def __init__(self, note: str) -> None:
        self.note: str | None = note

    def read(self) -> tuple[GpuReading, ...]:
        """No GPU."""
        return ()

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        """Nothing is known."""
        return None, None

    def close(self) -> None:
        """Nothing to let go of."""


AMD_DRIVER = Path("/sys/module/amdgpu")


def open_reader(simulated: Path | None, *, amd_driver: Path = AMD_DRIVER) -> GpuReader:
    """The reader for the simulated GPUs of that folder, or without one for NVIDIA's, if there is a driver."""
    if simulated is not None:
        from vllm_sleep_tui.telemetry.simulated import SimulatedReader

        return SimulatedReader(simulated)
    try:
        import pynvml
    except ImportError:
        return NoGpus("No NVML: the Python package nvidia-ml-py is not installed; VRAM is not known.")
    from vllm_sleep_tui.telemetry.nvml import NvmlReader

    try:
        return NvmlReader(pynvml)
    except pynvml.NVMLError_LibraryNotFound:
        if amd_driver.exists():
            return NoGpus("There is an AMD GPU, which is not read yet, and no NVML; VRAM is not known.")
        return NoGpus("No NVML: libnvidia-ml.so.1 not found; VRAM is not known.")
