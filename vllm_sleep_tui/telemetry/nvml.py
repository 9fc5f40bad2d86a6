"""NVIDIA's GPUs through NVML: every figure that a card, a driver or a permission withholds becomes None."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vllm_sleep_tui.telemetry.gpus import GpuFault, GpuReading

RETRY_AFTER = 3.0
"""Seconds between two tries to reach a driver or GPU that went away."""

# Bits of nvmlClocksEventReasons (nvml.h); idle clocks and clocks set by a person are no throttling.
_THROTTLE = (
    (0x04, "power cap"),
    (0x08, "hardware slowdown"),
    (0x10, "sync boost"),
    (0x20, "heat (driver)"),
    (0x40, "heat (hardware)"),
    (0x80, "power brake"),
)
_LOOK = "`nvidia-smi` and `dmesg` say more."
_DRIVER_FAULTS = {
    "NVML_ERROR_DRIVER_NOT_LOADED": (
        "The NVIDIA driver is installed and not loaded",
        "Load it: `sudo modprobe nvidia`; `dmesg` says why it is not.",
    ),
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "The NVIDIA driver was upgraded while the old one runs",
        "Restart the machine, or end what uses the GPUs and load the driver again.",
    ),
    "NVML_ERROR_NO_PERMISSION": (
        "The NVIDIA driver does not let this user in",
        "Ask for access to /dev/nvidia*; start a container with `--gpus all`.",
    ),
}
"""By the name of NVML's error."""
_GPU_FAULTS = {
    "NVML_ERROR_GPU_IS_LOST": (
        "is lost: the driver cannot reach it any more",
        "`dmesg` has its Xid error; restart the machine.",
    ),
    "NVML_ERROR_RESET_REQUIRED": (
        "must be reset",
        "End what uses it, then `sudo nvidia-smi --gpu-reset -i {index}`, or restart the machine.",
    ),
    "NVML_ERROR_NO_PERMISSION": (
        "is not yours to use",
        "Take it out of `gpus:`; a container, a cgroup or a scheduler gives it to somebody else.",
    ),
    "NVML_ERROR_INSUFFICIENT_POWER": ("has no power", "Look at its power cables, then restart the machine."),
    "NVML_ERROR_IRQ_ISSUE": ("gets no interrupts", "Restart the machine; `dmesg` says more."),
}
_MEMORY = "nvmlDeviceGetMemoryInfo"
_PROCESS_LISTS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU and what never changes about it; without a handle it does not answer at present."""

    index: int
    handle: Any | None
    uuid: str
    name: str
    total_bytes: int | None


class NvmlReader:
    """Reads GPUs through the module `pynvml`, and finds them again after the driver or one of them went away.

    One call at a time: NVML's handles die with its shutdown, and a call with a dead handle is a segmentation
    fault, not an error (driver 580, seen).

    Making one raises the module's NVMLError_LibraryNotFound where no NVIDIA driver is installed.
    """

    def __init__(self, nvml: ModuleType, retry_after: float = RETRY_AFTER) -> None:
        self._nvml = nvml
        self._retry_after = retry_after
        self._devices: tuple[_Device, ...] = ()
        self._faults: dict[int | None, GpuFault] = {}
        self._next_try = 0.0
        self._started = False
        self._in_use = threading.RLock()
        self._memory_version: tuple[int, ...] = (nvml.nvmlMemory_v2,)
        self._complaints: dict[tuple[int, str], str] = {}
        self._forbidden: set[tuple[int, str]] = set()
        self._mismatch = getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError)
        self._driver_faults = {getattr(nvml, name): words for name, words in _DRIVER_FAULTS.items()}
        self._gpu_faults = {getattr(nvml, name): words for name, words in _GPU_FAULTS.items()}
        self._gone = frozenset(
            {
                nvml.NVML_ERROR_UNINITIALIZED,
                nvml.NVML_ERROR_DRIVER_NOT_LOADED,
                nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
                nvml.NVML_ERROR_GPU_IS_LOST,
                nvml.NVML_ERROR_RESET_REQUIRED,
            }
        )
        self._connect()

    @property
    def note(self) -> str | None:
        """One line on what cannot be known now and why; None if all is well."""
        if faults := self.faults:
            return " ".join(map(str, faults))
        if not self._devices:
            return "NVML lists no GPU; VRAM is not known."
        for device in self._devices:
            if why := self._complaints.get((device.index, _MEMORY)):
                shared = "one that shares the RAM has none"
                kept = "it is another user's, or divided (MIG)" if self._is_kept(device) else shared
                return f"GPU {device.index} does not tell its memory ({why}); {kept}."
        return None

    @property
    def faults(self) -> tuple[GpuFault, ...]:
        """What does not answer now, the driver first; it is tried again every `retry_after` seconds."""
        if None in self._faults:
            return (self._faults[None],)
        return tuple(self._faults[gpu] for gpu in sorted(gpu for gpu in self._faults if gpu is not None))

    def read(self) -> tuple[GpuReading, ...]:
        """All GPUs now, in NVML's order; figures that cannot be had are None."""
        with self._in_use:
            return tuple(self._reading(device) for device in self._reachable())

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        """Bytes of one GPU that cannot be taken, and bytes by pid; None for what is not known."""
        with self._in_use:
            for device in self._reachable():
                if device.index == index:
                    info = self._memory(device)
                    taken = None if info is None else int(info.total) - int(info.free)
                    return taken, self._processes(device)
            return None, None

    def close(self) -> None:
        """Let go of the driver; a later read finds nothing."""
        with self._in_use:
            self._devices = ()
            self._shutdown()

    def _reachable(self) -> tuple[_Device, ...]:
        if self._faults and time.monotonic() >= self._next_try:
            self._connect()
        return self._devices

    def _connect(self) -> None:
        """Start NVML afresh and look for the GPUs."""
        try:
            self._next_try = time.monotonic() + self._retry_after
            self._shutdown()
            self._nvml.nvmlInit()
            self._started = True
            self._faults.clear()
            self._find_devices(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError_LibraryNotFound:
            raise
        except self._nvml.NVMLError as error:
            what, cure = self._driver_faults.get(error.value, ("The NVIDIA driver does not answer", _LOOK))
            self._faults[None] = GpuFault(what=f"{what} ({error}); VRAM is not known.", cure=cure)

    def _shutdown(self) -> None:
        """Undo our own start and no other: NVML counts them, and another reader here needs its own."""
        if not self._started:
            return
        self._started = False
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            # It was not started, or the driver is gone: there is nothing left to let go of.
            return

    def _find_devices(self, count: int) -> None:
        earlier = {device.index: device for device in self._devices}
        devices = (self._find_device(index, earlier.get(index)) for index in range(count))
        self._devices = tuple(device for device in devices if device)

    def _find_device(self, index: int, earlier: _Device | None) -> _Device | None:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = (
                _text(ask, handle) for ask in (self._nvml.nvmlDeviceGetUUID, self._nvml.nvmlDeviceGetName)
            )
        except self._nvml.NVMLError as error:
            self._faults[index] = self._silent(index, error)
            return _Device(index, None, earlier.uuid, earlier.name, earlier.total_bytes) if earlier else None
        info = self._memory(_Device(index, handle, "", "", None))
        return _Device(index, handle, uuid, name, None if info is None else int(info.total))

    def _ask(self, device: _Device, function: str, *arguments: int) -> Any | None:
        """The one way to ask NVML about a device: None for whatever it does not tell."""
        ask = getattr(self._nvml, function, None)
        if ask is None or device.handle is None:
            return None
        try:
            answer = ask(device.handle, *arguments)
        except self._nvml.NVMLError as error:
            self._complaints[device.index, function] = str(error)
            if error.value == self._nvml.NVML_ERROR_NO_PERMISSION:
                self._forbidden.add((device.index, function))
            if error.value in self._gone:
                self._faults.setdefault(device.index, self._silent(device.index, error))
            return None
        except self._mismatch as error:  # the driver is older than the binding
            self._complaints[device.index, function] = str(error)
            return None
        self._complaints.pop((device.index, function), None)
        self._forbidden.discard((device.index, function))
        return answer

    def _is_kept(self, device: _Device) -> bool:
        """Whether the GPU's memory is told, but not to this user."""
        return (device.index, _MEMORY) in self._forbidden

    def _silent(self, index: int, error: Any) -> GpuFault:
        what, cure = self._gpu_faults.get(error.value, ("does not answer", _LOOK))
        return GpuFault(
            gpu=index,
            what=f"GPU {index} {what} ({error}); its VRAM is not known.",
            cure=cure.format(index=index),
        )

    def _memory(self, device: _Device) -> Any | None:
        info = self._ask(device, _MEMORY, *self._memory_version)
        if info is None and self._memory_version:
            # The first form counts what the driver reserves as used, which nvidia-smi does not.
            info = self._ask(device, _MEMORY)
            if info is not None:
                self._memory_version = ()
        return info

    def _processes(self, device: _Device) -> Mapping[int, int | None] | None:
        """Bytes by pid; a process that computes and draws is in both lists with the same memory."""
        lists = [each for name in _PROCESS_LISTS if (each := self._ask(device, name)) is not None]
        if not lists:
            return None
        used: dict[int, int | None] = {}
        for process in (process for each in lists for process in each):
            amount, before = process.usedGpuMemory, used.get(process.pid)
            used[process.pid] = before if amount is None else max(int(amount), before or 0)
        return used

    def _reading(self, device: _Device) -> GpuReading:
        info = self._memory(device)
        busy = self._ask(device, "nvmlDeviceGetUtilizationRates")
        reasons = self._ask(device, "nvmlDeviceGetCurrentClocksEventReasons")
        return GpuReading(
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            used_bytes=None if info is None else int(info.used),
            free_bytes=None if info is None else int(info.free),
            total_bytes=device.total_bytes,
            utilization=None if busy is None else float(busy.gpu),
            temperature=self._ask(device, "nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            power_watts=_watts(self._ask(device, "nvmlDeviceGetPowerUsage")),
            power_limit_watts=_watts(self._ask(device, "nvmlDeviceGetEnforcedPowerLimit")),
            sm_clock_mhz=self._ask(device, "nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            throttle=None if reasons is None else tuple(word for bit, word in _THROTTLE if reasons & bit),
            processes=self._processes(device),
        )


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _text(ask: Callable[[Any], str | bytes], handle: Any) -> str:
    """A name as text that can be shown.

    The binding fails on one that is not UTF-8, and older ones answer bytes.
    """
    try:
        value = ask(handle)
    except UnicodeDecodeError as error:
        value = error.object
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
