"""NVML through a stand-in for NVIDIA's binding that can withhold any figure, go away and come back."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

from vllm_sleep_tui.telemetry.gpus import NoGpus, open_reader
from vllm_sleep_tui.telemetry.nvml import NvmlReader

GIB = 1 << 30


class FakeNvml(ModuleType):
    """Two 80 GiB GPUs. `withheld` maps a function, or (function, GPU), to the error code it answers."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.withheld: dict[str | tuple[str, int], int] = {}
        self.inits = 0
        self.users = 0
        self.started = False
        self.binary_text = False
        self.compute: list[SimpleNamespace] = [SimpleNamespace(pid=11, usedGpuMemory=60 * GIB)]
        self.graphics: list[SimpleNamespace] = []
        self.reasons = 0x01

    def __getattr__(self, name: str) -> Any:
        # Constants and errors are the real binding's.
        if name.startswith("nvmlDevice"):
            raise AttributeError(name)
        return getattr(pynvml, name)

    def _answer(self, function: str, handle: int, answer: Any) -> Any:
        if not self.started:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        for key in (function, (function, handle), ("all", handle)):
            if key in self.withheld:
                raise pynvml.NVMLError(self.withheld[key])
        return answer

    def nvmlInit(self) -> None:  # noqa: N802
        self.inits += 1
        if "nvmlInit" in self.withheld:
            raise pynvml.NVMLError(self.withheld["nvmlInit"])
        self.started = True
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._answer("nvmlShutdown", 0, None)
        self.users -= 1  # the real one counts its starts too
        self.started = self.users > 0

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return self._answer("nvmlDeviceGetHandleByIndex", index, index)

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        return self._text(f"GPU-{handle}")

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return self._text("NVIDIA H100")

    def _text(self, text: str) -> str | bytes:
        return text.encode() if self.binary_text else text

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:  # noqa: N802
        if version:
            info = SimpleNamespace(total=80 * GIB, used=61 * GIB, free=18 * GIB)
            return self._answer("v2", handle, info)
        return self._answer("v1", handle, SimpleNamespace(total=80 * GIB, used=62 * GIB, free=18 * GIB))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return self._answer("utilization", handle, SimpleNamespace(gpu=87))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        return self._answer("temperature", handle, 61)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self._answer("power", handle, 412_000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:  # noqa: N802
        return self._answer("limit", handle, 700_000)

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:  # noqa: N802
        return self._answer("clock", handle, 1980)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:  # noqa: N802
        return self._answer("reasons", handle, self.reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        return self._answer("compute", handle, self.compute if handle == 0 else [])

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        return self._answer("graphics", handle, self.graphics if handle == 0 else [])


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml()


def test_every_function_that_is_asked_is_in_the_real_binding() -> None:
    asked = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(asked) == 15
    assert [name for name in asked if not callable(getattr(pynvml, name, None))] == []


def test_a_healthy_gpu_gives_every_figure(nvml: FakeNvml) -> None:
    reader = NvmlReader(nvml)
    gpu, idle = reader.read()
    assert (gpu.index, gpu.uuid, gpu.name, gpu.simulated) == (0, "GPU-0", "NVIDIA H100", False)
    assert (gpu.used_bytes, gpu.free_bytes, gpu.total_bytes) == (61 * GIB, 18 * GIB, 80 * GIB)
    assert (gpu.utilization, gpu.temperature, gpu.sm_clock_mhz) == (87.0, 61, 1980)
    assert (gpu.power_watts, gpu.power_limit_watts) == (412.0, 700.0)
    assert gpu.processes == {11: 60 * GIB}
    assert idle.processes == {}
    assert reader.note is None
    assert reader.memory(0) == (62 * GIB, {11: 60 * GIB})
    assert reader.memory(7) == (None, None)


@pytest.mark.parametrize(
    ("withheld", "field"),
    [
        ("utilization", "utilization"),
        ("temperature", "temperature"),
        ("power", "power_watts"),
        ("limit", "power_limit_watts"),
        ("clock", "sm_clock_mhz"),
        ("reasons", "throttle"),
    ],
)
def test_a_figure_that_is_withheld_is_unknown_and_the_others_stay(
    nvml: FakeNvml, withheld: str, field: str
) -> None:
    nvml.withheld[withheld] = pynvml.NVML_ERROR_NOT_SUPPORTED
    gpu = NvmlReader(nvml).read()[0]
    names = ["utilization", "temperature", "power_watts", "power_limit_watts", "sm_clock_mhz", "throttle"]
    assert [name for name in names if getattr(gpu, name) is None] == [field]
    assert gpu.used_bytes == 61 * GIB


@pytest.mark.parametrize("withheld", [{}, {"v2": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}])
def test_what_the_driver_reserves_is_not_free_for_a_start(nvml: FakeNvml, withheld: dict[Any, int]) -> None:
    nvml.withheld = withheld
    reader = NvmlReader(nvml)
    gpu = reader.read()[0]
    taken, _ = reader.memory(0)
    assert taken == gpu.taken_bytes == 62 * GIB
    assert gpu.total_bytes is not None
    assert gpu.total_bytes - taken == gpu.free_bytes == 18 * GIB


def test_an_old_driver_without_the_second_memory_form_still_tells_its_memory(nvml: FakeNvml) -> None:
    nvml.withheld["v2"] = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    reader = NvmlReader(nvml)
    assert reader.read()[0].used_bytes == 62 * GIB
    assert reader.note is None


def test_unified_memory_is_unknown_and_the_note_says_so(nvml: FakeNvml) -> None:
    nvml.withheld |= {"v1": pynvml.NVML_ERROR_NOT_SUPPORTED, "v2": pynvml.NVML_ERROR_NOT_SUPPORTED}
    reader = NvmlReader(nvml)
    gpu = reader.read()[0]
    assert (gpu.used_bytes, gpu.free_bytes, gpu.total_bytes) == (None, None, None)
    assert reader.note == "GPU 0 does not tell its memory (Not Supported); one that shares the RAM has none."


def test_memory_that_is_kept_from_this_user_is_not_told_as_shared_ram(nvml: FakeNvml) -> None:
    nvml.withheld |= {"v1": pynvml.NVML_ERROR_NO_PERMISSION, "v2": pynvml.NVML_ERROR_NO_PERMISSION}
    reader = NvmlReader(nvml)
    assert reader.read()[0].used_bytes is None
    assert "it is another user's, or divided (MIG)" in (reader.note or "")
    nvml.withheld.clear()
    reader.read()
    assert reader.note is None


def test_a_process_that_computes_and_draws_is_counted_once(nvml: FakeNvml) -> None:
    nvml.graphics = [
        SimpleNamespace(pid=11, usedGpuMemory=61 * GIB),
        SimpleNamespace(pid=12, usedGpuMemory=GIB),
    ]
    assert NvmlReader(nvml).read()[0].processes == {11: 61 * GIB, 12: GIB}


def test_memory_by_process_that_wsl_does_not_tell_is_unknown_by_pid(nvml: FakeNvml) -> None:
    nvml.compute = [SimpleNamespace(pid=11, usedGpuMemory=None)]
    nvml.graphics = [SimpleNamespace(pid=12, usedGpuMemory=None), SimpleNamespace(pid=11, usedGpuMemory=None)]
    assert NvmlReader(nvml).memory(0) == (62 * GIB, {11: None, 12: None})


def test_processes_are_unknown_only_if_both_lists_are_withheld(nvml: FakeNvml) -> None:
    nvml.withheld["graphics"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    reader = NvmlReader(nvml)
    assert reader.read()[0].processes == {11: 60 * GIB}
    nvml.withheld["compute"] = pynvml.NVML_ERROR_NO_PERMISSION
    assert reader.read()[0].processes is None


def test_names_that_come_as_bytes_are_text(nvml: FakeNvml) -> None:
    nvml.binary_text = True
    gpu = NvmlReader(nvml).read()[0]
    assert (gpu.uuid, gpu.name) == ("GPU-0", "NVIDIA H100")


def test_only_true_throttling_is_named(nvml: FakeNvml) -> None:
    reader = NvmlReader(nvml)
    assert reader.read()[0].throttle == ()
    nvml.reasons = 0x01 | 0x02 | 0x04 | 0x40
    assert reader.read()[0].throttle == ("power cap", "heat (hardware)")


def test_a_driver_that_went_away_leaves_unknowns_and_is_found_again(nvml: FakeNvml) -> None:
    reader = NvmlReader(nvml, retry_after=0.0)
    nvml.started = False
    nvml.withheld["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    gone = reader.read()[0]
    assert (gone.uuid, gone.used_bytes, gone.total_bytes, gone.processes) == ("GPU-0", None, 80 * GIB, None)
    assert reader.read()[0].used_bytes is None
    assert reader.note == (
        "The NVIDIA driver is installed and not loaded (Driver Not Loaded); VRAM is not known. "
        "Load it: `sudo modprobe nvidia`; `dmesg` says why it is not."
    )
    nvml.withheld.clear()
    assert reader.read()[0].used_bytes == 61 * GIB
    assert reader.note is None


def test_a_driver_that_is_not_there_is_not_asked_for_all_the_time(nvml: FakeNvml) -> None:
    reader = NvmlReader(nvml, retry_after=3600.0)
    nvml.started = False
    for _ in range(5):
        reader.read()
        reader.memory(0)
    assert nvml.inits == 1, "the hour is not over"


def test_a_driver_that_is_loaded_only_later_is_found(nvml: FakeNvml) -> None:
    nvml.withheld["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    reader = NvmlReader(nvml, retry_after=0.0)
    assert reader.read() == ()
    assert reader.note is not None
    nvml.withheld.clear()
    assert len(reader.read()) == 2


def test_a_lost_gpu_does_not_take_the_other_with_it(nvml: FakeNvml) -> None:
    reader = NvmlReader(nvml, retry_after=0.0)
    for function in ("nvmlDeviceGetHandleByIndex", "v1", "v2", "compute", "graphics", "utilization"):
        nvml.withheld[function, 1] = pynvml.NVML_ERROR_GPU_IS_LOST
    reader.read()
    good, lost = reader.read()
    assert good.used_bytes == 61 * GIB
    assert (lost.uuid, lost.used_bytes, lost.processes) == ("GPU-1", None, None)
    assert reader.note == (
        "GPU 1 is lost: the driver cannot reach it any more (GPU is lost); its VRAM is not known. "
        "`dmesg` has its Xid error; restart the machine."
    )
    nvml.withheld.clear()
    assert reader.read()[1].used_bytes == 61 * GIB
    assert reader.note is None


def test_a_missing_library_is_told_when_the_reader_is_made(nvml: FakeNvml) -> None:
    nvml.withheld["nvmlInit"] = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    with pytest.raises(pynvml.NVMLError_LibraryNotFound):
        NvmlReader(nvml)


def test_a_closed_reader_reads_nothing(nvml: FakeNvml) -> None:
    reader = NvmlReader(nvml)
    reader.close()
    assert reader.read() == ()
    assert not nvml.started


def test_a_second_reader_takes_nothing_from_the_first_when_it_comes_and_goes(nvml: FakeNvml) -> None:
    first = NvmlReader(nvml)
    second = NvmlReader(nvml)
    assert nvml.users == 2
    second.close()
    assert nvml.started
    assert len(first.read()) == 2


@pytest.mark.parametrize(
    ("is_there", "note"),
    [
        (
            False,
            "No NVML: libnvidia-ml.so.1 not found; VRAM is not known. "
            "Without an NVIDIA driver, models run on the CPU alone: `gpus: []`.",
        ),
        (True, "There is an AMD GPU, which is not read yet, and no NVML; VRAM is not known."),
    ],
)
def test_a_machine_without_gpu_or_with_amds_gets_a_reader_that_says_why(
    tmp_path: Path, is_there: bool, note: str
) -> None:
    driver = tmp_path / "amdgpu"
    if is_there:
        driver.mkdir()
    reader = open_reader(None, amd_driver=driver)
    if not isinstance(reader, NoGpus):
        pytest.skip("this machine has an NVIDIA driver")
    assert reader.note == note
    assert reader.read() == ()
    assert reader.memory(0) == (None, None)
