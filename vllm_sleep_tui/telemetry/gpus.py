"""GPUs as readings, real or simulated, behind one protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
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
    pool_bytes: int | None = None
    """Of what is used, what our KV pool would give up; None without a pool."""

    @property
    def taken_bytes(self) -> int | None:
        """What nobody can take any more: used or reserved by the driver; None if the memory is not known.

        What a pool holds free can be taken: it is given up for that.
        """
        if self.total_bytes is None or self.free_bytes is None:
            return self.used_bytes
        return max(0, self.total_bytes - self.free_bytes - (self.pool_bytes or 0))


class GpuFault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a GPU, or all of them, cannot be seen: a sentence each on what is wrong and what to do."""

    gpu: int | None = None
    """Its index; None: the driver, so no GPU is known at all."""
    usable: bool = False
    """A model may run there all the same: nothing is known, which is not to say that nothing is there."""
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what} {self.cure}".strip()


class GpuReader(Protocol):
    """Reads all GPUs; may be called from several threads and never raises for what a driver does."""

    @property
    def note(self) -> str | None:
        """One line on what cannot be known now and why; None if all is well."""

    @property
    def faults(self) -> tuple[GpuFault, ...]:
        """What does not answer now, the driver first; empty if all is well."""

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

    def __init__(self, fault: GpuFault) -> None:
        self.faults: tuple[GpuFault, ...] = (fault,)
        self.note: str | None = str(fault)

    def read(self) -> tuple[GpuReading, ...]:
        """No GPU."""
        return ()

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        """Nothing is known."""
        return None, None

    def close(self) -> None:
        """Nothing to let go of."""


AMD_DRIVER = Path("/sys/module/amdgpu")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def fault_of(faults: Iterable[GpuFault], gpu: int) -> GpuFault | None:
    """Why a model cannot run on that GPU now, as far as it is known; None if nothing speaks against it."""
    return next((fault for fault in faults if fault.gpu in (None, gpu) and not fault.usable), None)


VISIBLE = "CUDA_VISIBLE_DEVICES"


def is_hidden(gpu: GpuReading, visible: str | None) -> bool:
    """Whether a shell whose CUDA_VISIBLE_DEVICES is `visible` keeps this GPU from CUDA.

    Its numbers are read in PCI order. None hides nothing, an empty one everything, as does what follows a
    name that no GPU has, such as -1; a MIG slice is no whole GPU.
    """
    if visible is None:
        return False
    for word in (word.strip() for word in visible.split(",")):
        if word == str(gpu.index) or (word.startswith("GPU-") and gpu.uuid.startswith(word)):
            return False
        if not word.isdecimal() and not word.startswith(("GPU-", "MIG-")):
            return True
    return True


def open_reader(
    simulated: Path | None, *, amd_driver: Path = AMD_DRIVER, nvidia_driver: Path = NVIDIA_DRIVER
) -> GpuReader:
    """The reader for the simulated GPUs of that folder, or without one for NVIDIA's, if there is a driver."""
    if simulated is not None:
        from vllm_sleep_tui.telemetry.simulated import SimulatedReader

        return SimulatedReader(simulated)
    try:
        import pynvml
    except ImportError:
        what = "No NVML: the Python package nvidia-ml-py is not installed; VRAM is not known."
        return NoGpus(GpuFault(usable=True, what=what, cure="Install vllm-sleep-tui again."))
    from vllm_sleep_tui.telemetry.nvml import NvmlReader

    try:
        return NvmlReader(pynvml)
    except pynvml.NVMLError_LibraryNotFound:
        return NoGpus(_without_library(amd_driver.exists(), nvidia_driver.exists()))


def _without_library(has_amd: bool, has_nvidia: bool) -> GpuFault:
    if has_nvidia:
        what = "The NVIDIA driver runs and its library libnvidia-ml.so.1 was not found; VRAM is not known."
        cure = (
            "Install the driver's user-space part of the same version; start a container with `--gpus all`."
        )
        return GpuFault(usable=True, what=what, cure=cure)
    cure = "Without an NVIDIA driver, models run on the CPU alone: `gpus: []`."
    if has_amd:
        what = "There is an AMD GPU, which is not read yet, and no NVML; VRAM is not known."
        return GpuFault(usable=True, what=what, cure="")
    return GpuFault(usable=True, what="No NVML: libnvidia-ml.so.1 not found; VRAM is not known.", cure=cure)
