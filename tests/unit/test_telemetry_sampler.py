"""The sampling thread, on simulated GPUs in real files and on readers that break."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.attribution import ModelMemory
from vllm_sleep_tui.telemetry.gpus import GpuFault, GpuReading, NoGpus, open_reader
from vllm_sleep_tui.telemetry.sampler import Sample, Sampler

GIB = 1 << 30


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One simulated 24 GiB GPU of which this process holds 3, and 64 GiB of RAM of which it holds 5."""
    devices.create(tmp_path / "gpus", [("Demo", 24 * GIB)], ram_total_bytes=64 * GIB)
    devices.claim(
        tmp_path / "gpus",
        vram={0: 3 * GIB},
        pinned_bytes=4 * GIB,
        private_bytes=GIB,
        title="VLLM::EngineCore",
    )
    return tmp_path / "gpus"


class BreakingReader:
    """A driver that raises what nobody expects while `broken`, and hangs while `hang` is set."""

    note: str | None = None

    def __init__(self) -> None:
        self.broken = True
        self.hanging = threading.Event()
        self.let_go = threading.Event()
        self.let_go.set()
        self.went_on = False

    def read(self) -> tuple[GpuReading, ...]:
        if not self.let_go.is_set():
            self.hanging.set()
            self.let_go.wait(120)
            self.went_on = True
        if self.broken:
            raise RuntimeError("the driver fell over")
        return (GpuReading(index=0, uuid="GPU-0", name="X", used_bytes=1),)

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        return None, None

    def close(self) -> None:
        pass


def test_one_sample_holds_gpus_models_and_ram(folder: Path) -> None:
    sampler = Sampler(open_reader(folder), folder)
    assert sampler.latest() == Sample()
    sampler.set_roots({"qwen": os.getpid()})
    sample = sampler.sample_once()
    assert [gpu.used_bytes for gpu in sample.gpus] == [3 * GIB]
    assert sample.models == {"qwen": ModelMemory({0: 3 * GIB}, 5 * GIB, 4 * GIB)}
    assert sample.strangers == {0: ()}
    assert (sample.host.available_bytes, sample.host.total_bytes) == (59 * GIB, 64 * GIB)
    assert sample.notes == ()
    assert sampler.latest() == sample
    assert abs(time.time() - sample.time) < 60


def test_without_a_root_the_holder_is_a_stranger_with_a_name(folder: Path) -> None:
    (stranger,) = Sampler(open_reader(folder), folder).sample_once().strangers[0]
    assert (stranger.pid, stranger.bytes) == (os.getpid(), 3 * GIB)
    assert "python" in stranger.command or "pytest" in stranger.command


def test_without_gpus_the_ram_of_real_processes_is_still_measured() -> None:
    sampler = Sampler(NoGpus(GpuFault(usable=True, what="No NVML.", cure="")), None)
    sampler.set_roots({"cpu": os.getpid(), "gone": 1 << 30})
    sample = sampler.sample_once()
    model = sample.models["cpu"]
    assert model.vram_by_gpu is None
    assert model.ram_bytes is not None
    assert model.ram_bytes > 1 << 20
    assert sample.models["gone"] == ModelMemory(None, None, None)
    assert sample.notes == ("No NVML.",)


def test_the_thread_sees_a_process_that_starts_and_one_that_ends(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vllm_sleep_tui.simulator import devices;"
        "devices.claim(Path(sys.argv[1]), vram={0: 7 << 30}, pinned_bytes=0, private_bytes=0, title='x');"
        "sys.stdin.read()"
    )
    sampler = Sampler(open_reader(folder), folder, interval=0.02)
    sampler.start()
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE)
    assert process.stdin is not None
    sampler.set_roots({"new": process.pid})
    try:
        wait_for(
            lambda: "new" in (models := sampler.latest().models) and models["new"].vram_by_gpu == {0: 7 * GIB}
        )
        process.stdin.close()
        process.wait(60)
        wait_for(lambda: sampler.latest().models["new"].vram_by_gpu is None)
        wait_for(lambda: sampler.latest().gpus[0].used_bytes == 3 * GIB)
    finally:
        process.kill()
        process.wait()
        sampler.close()


def test_a_refresh_does_not_wait_for_the_interval(folder: Path) -> None:
    sampler = Sampler(open_reader(folder), folder, interval=3600.0)
    sampler.start()
    try:
        wait_for(lambda: sampler.latest().time > 0)
        first = sampler.latest().time
        sampler.refresh()
        wait_for(lambda: sampler.latest().time > first)
    finally:
        sampler.close()


def test_a_reader_that_breaks_costs_its_part_and_says_so_until_it_works_again() -> None:
    reader = BreakingReader()
    sampler = Sampler(reader, None, interval=0.02)
    sampler.set_roots({"a": os.getpid()})
    sampler.start()
    try:
        wait_for(lambda: sampler.latest().notes == ("GPUs could not be read: the driver fell over.",))
        assert sampler.latest().gpus == ()
        assert sampler.latest().models["a"].ram_bytes is not None
        assert sampler.latest().host.total_bytes is not None
        reader.broken = False
        wait_for(lambda: len(sampler.latest().gpus) == 1)
    finally:
        sampler.close()


def test_figures_that_have_grown_old_say_so() -> None:
    reader = BreakingReader()
    sampler = Sampler(reader, None, interval=0.01, late_after=0.05)
    sampler.start()
    try:
        wait_for(lambda: sampler.latest().time > 0)
        reader.let_go.clear()
        assert reader.hanging.wait(60)
        wait_for(lambda: any("s old" in note for note in sampler.latest().notes))
    finally:
        reader.let_go.set()
        sampler.close()


def test_closing_does_not_wait_for_a_driver_that_hangs() -> None:
    reader = BreakingReader()
    reader.let_go.clear()
    sampler = Sampler(reader, None)
    sampler.start()
    assert reader.hanging.wait(60)
    sampler.close()
    assert not reader.went_on
    reader.let_go.set()


def test_closing_ends_the_thread_and_may_be_done_before_it_began() -> None:
    sampler = Sampler(NoGpus(GpuFault(usable=True, what="No NVML.", cure="")), None, interval=3600.0)
    sampler.close()
    sampler = Sampler(NoGpus(GpuFault(usable=True, what="No NVML.", cure="")), None, interval=3600.0)
    before = set(threading.enumerate())  # of tests before this one some may end meanwhile
    sampler.start()
    new = [thread for thread in threading.enumerate() if thread not in before and thread.name == "telemetry"]
    assert len(new) == 1
    sampler.close()
    assert not new[0].is_alive()


def test_importing_telemetry_loads_no_screen_no_http_and_no_nvml() -> None:
    code = (
        "import sys, vllm_sleep_tui.telemetry.sampler, vllm_sleep_tui.telemetry.prometheus;"
        "print([m for m in ('textual', 'httptools', 'pynvml', 'asyncio') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
