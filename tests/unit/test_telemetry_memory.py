"""Simulated GPUs, the host's RAM, and whose memory is whose."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.telemetry.attribution import ModelMemory, Stranger, attribute
from vllm_sleep_tui.telemetry.gpus import GpuReading, open_reader
from vllm_sleep_tui.telemetry.host import HostReading, cgroup_memory, host_memory
from vllm_sleep_tui.telemetry.processes import Memory, ProcessTable

GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two simulated 24 GiB GPUs and 64 GiB of RAM."""
    devices.create(tmp_path / "gpus", [("Demo", 24 * GIB), ("Demo", 24 * GIB)], ram_total_bytes=64 * GIB)
    return tmp_path / "gpus"


def hold(folder: Path) -> None:
    """This process holds 3 GiB of GPU 1 and 5 GiB of RAM."""
    devices.claim(
        folder,
        vram={1: 3 * GIB},
        pinned_bytes=4 * GIB,
        private_bytes=GIB,
        title="VLLM::EngineCore",
        utilization=40.0,
    )


def test_simulated_gpus_say_what_processes_hold(folder: Path) -> None:
    hold(folder)
    reader = open_reader(folder)
    first, second = reader.read()
    assert (first.used_bytes, first.utilization, first.processes) == (0, 0.0, {})
    assert (second.used_bytes, second.free_bytes, second.total_bytes) == (3 * GIB, 21 * GIB, 24 * GIB)
    assert (second.utilization, second.processes) == (40.0, {os.getpid(): 3 * GIB})
    assert second.simulated
    assert reader.memory(1) == (3 * GIB, {os.getpid(): 3 * GIB})
    assert reader.memory(0) == (0, {})
    assert reader.memory(2) == (None, None)
    assert reader.note is None


def test_a_folder_without_gpus_is_told(tmp_path: Path) -> None:
    reader = open_reader(tmp_path)
    assert reader.read() == ()
    assert reader.note == f"No simulated GPU in {tmp_path}."
    assert host_memory(tmp_path) == HostReading(None, None)


def test_simulated_ram_is_what_processes_left(folder: Path) -> None:
    assert host_memory(folder) == HostReading(64 * GIB, 64 * GIB)
    hold(folder)
    assert host_memory(folder) == HostReading(59 * GIB, 64 * GIB)


def test_the_ram_of_this_machine_is_known() -> None:
    reading = host_memory(None)
    assert reading.available_bytes is not None
    assert reading.total_bytes is not None
    assert 0 < reading.available_bytes < reading.total_bytes


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_control_group_counts_and_file_pages_are_free(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    membership.write_text("0::/user/service\n")
    group(mount / "user", memory__max=10 * GIB, memory__current=9 * GIB, memory__stat="inactive_file 0")
    stat = f"anon 77\ninactive_file {GIB}\nactive_file {GIB}\nshmem 5"
    group(mount / "user/service", memory__max=12 * GIB, memory__current=6 * GIB, memory__stat=stat)
    assert cgroup_memory(membership, mount) == HostReading(1 * GIB, 10 * GIB)
    (mount / "user/memory.max").write_text("max\n")
    assert cgroup_memory(membership, mount) == HostReading(8 * GIB, 12 * GIB)


def test_version_1_of_control_groups_counts_too_and_its_number_for_no_limit_does_not(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    membership.write_text("5:cpu:/\n4:memory:/docker/abc\n0::/\n")
    # Inside a container the path is the host's, and the mount is the container's own group.
    group(
        mount / "memory",
        memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=5 * GIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {GIB}",
    )
    assert cgroup_memory(membership, mount) == HostReading(4 * GIB, 8 * GIB)
    (mount / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_memory(membership, mount) == HostReading(None, None)


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path / "absent", tmp_path) == HostReading(None, None)


# keeper 100 → vllm 101 → engine 102 → workers 103 and 104; keeper 200 → vllm 201; 300 is a stranger's.
TREE = {1: 0, 100: 1, 101: 100, 102: 101, 103: 102, 104: 102, 200: 1, 201: 200, 300: 1}
TABLE = ProcessTable(TREE, dict.fromkeys(TREE, 5))
CONTAINER = ProcessTable(TREE, dict.fromkeys(TREE, 5), in_container=True)
ROOTS = {"big": 100, "small": 200}
MEMORIES = {101: Memory(GIB, 0), 103: Memory(2 * GIB, 10 * GIB), 104: Memory(2 * GIB, 9 * GIB)}


def gpu(index: int, processes: dict[int, int | None] | None, used: int | None = GIB) -> GpuReading:
    return GpuReading(index=index, uuid=f"GPU-{index}", name="X", used_bytes=used, processes=processes)


def words(pid: int) -> tuple[str, str]:
    return "anna", f"python train.py {pid}"


def test_memory_is_summed_over_the_tree_below_each_keeper_and_the_rest_are_strangers() -> None:
    readings = [gpu(0, {103: 60, 300: 7, 201: 2}), gpu(1, {104: 61})]
    shares = attribute(readings, TABLE, ROOTS, memories=MEMORIES, describe=words)
    assert shares.models == {
        "big": ModelMemory({0: 60, 1: 61}, 24 * GIB, 19 * GIB),
        "small": ModelMemory({0: 2, 1: 0}, None, None),
    }
    assert shares.strangers == {0: (Stranger(300, "anna", "python train.py 300", 7),), 1: ()}
    assert shares.notes == ()


def test_a_root_below_another_root_keeps_its_own_memory() -> None:
    shares = attribute([gpu(0, {102: 1, 104: 2})], TABLE, {"outer": 100, "inner": 102}, memories={})
    assert {name: model.vram_by_gpu for name, model in shares.models.items()} == {
        "outer": {0: 0},
        "inner": {0: 3},
    }


def test_a_gpu_that_does_not_tell_its_processes_is_unknown_and_not_zero() -> None:
    shares = attribute([gpu(0, {103: 60}), gpu(1, None)], TABLE, ROOTS, memories={})
    assert shares.models["big"].vram_by_gpu == {0: 60}
    assert shares.notes == (
        "GPU 1 does not tell memory by process (under WSL2 none does), so VRAM by model is not known there.",
    )
    only = attribute([gpu(1, None)], TABLE, ROOTS, memories={})
    assert only.models["big"].vram_by_gpu is None


def test_a_process_without_an_amount_makes_its_model_unknown_and_no_other() -> None:
    shares = attribute([gpu(0, {103: None, 201: 4})], TABLE, ROOTS, memories={})
    assert shares.models["big"].vram_by_gpu is None
    assert shares.models["small"].vram_by_gpu == {0: 4}
    assert len(shares.notes) == 1


def test_a_gpu_that_is_lost_gives_one_note_from_its_reader_and_none_from_here() -> None:
    assert attribute([gpu(0, None, used=None)], TABLE, ROOTS, memories={}).notes == ()


def test_a_root_that_is_gone_is_unknown() -> None:
    shares = attribute([gpu(0, {})], TABLE, {"gone": 999}, memories={})
    assert shares.models == {"gone": ModelMemory(None, None, None)}


def test_in_a_container_that_sees_pids_of_the_host_vram_by_model_is_unknown() -> None:
    shares = attribute([gpu(0, {70001: 60})], CONTAINER, ROOTS, memories=MEMORIES)
    assert shares.models["big"] == ModelMemory(None, 24 * GIB, 19 * GIB)
    assert shares.strangers == {}
    assert shares.notes == (
        "NVML names processes outside this container, so VRAM by model is not known; "
        "with the host's pids (docker: --pid=host) it would be.",
    )


@pytest.mark.parametrize("table", [TABLE, CONTAINER])
def test_a_process_that_just_ended_does_not_make_our_own_unknown(table: ProcessTable) -> None:
    shares = attribute([gpu(0, {103: 60, 70001: 5})], table, ROOTS, memories={}, describe=words)
    assert shares.models["big"].vram_by_gpu == {0: 60}
    assert [stranger.pid for stranger in shares.strangers[0]] == [70001]


def test_a_stranger_that_cannot_be_looked_at_is_still_named() -> None:
    beyond = 1 << 30
    shares = attribute([gpu(0, {beyond: 5})], TABLE, {}, memories={})
    assert shares.strangers == {
        0: (Stranger(beyond, "unknown", "a process that cannot be seen from here", 5),)
    }


def test_a_damaged_description_of_the_simulated_machine_is_no_machine(folder: Path) -> None:
    (folder / "gpus.json").write_text(json.dumps([]))
    assert open_reader(folder).read() == ()
