"""The simulated GPUs: who holds what, and that no byte is given twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sleep_tui.simulator import devices
from vllm_sleep_tui.simulator.arguments import ArgumentError, parse
from vllm_sleep_tui.simulator.behaviours import BEHAVIOURS, Fault, Faults
from vllm_sleep_tui.simulator.profiles import plan_memory, weights_bytes

GIB = 1 << 30
CLAIM = """
import sys
from pathlib import Path
from vllm_sleep_tui.simulator import devices
folder, amount = Path(sys.argv[1]), int(sys.argv[2])
sys.stdin.readline()
try:
    devices.claim(folder, vram={0: amount}, pinned_bytes=0, private_bytes=0, title="racer")
    print("held", flush=True)
except devices.OutOfMemory:
    print("refused", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gpus"
    devices.create(made, [("Demo", 24 * GIB), ("Demo", 24 * GIB)], ram_total_bytes=64 * GIB)
    return made


def claim(folder: Path, amount: int, *, pinned: int = 0) -> None:
    devices.claim(folder, vram={0: amount}, pinned_bytes=pinned, private_bytes=0, title="test")


def racer(folder: Path, amount: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIM, str(folder), str(amount)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_folder_is_private_and_making_it_twice_changes_nothing(folder: Path) -> None:
    before = devices.gpus(folder)
    devices.create(folder, [("Demo", 24 * GIB), ("Demo", 24 * GIB)], ram_total_bytes=64 * GIB)
    assert devices.gpus(folder) == before
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [gpu.index for gpu in before] == [0, 1]
    assert len({gpu.uuid for gpu in before}) == 2
    assert devices.ram_total(folder) == 64 * GIB


def test_two_folders_have_other_uuids(folder: Path, tmp_path: Path) -> None:
    devices.create(tmp_path / "other", [("Demo", GIB)], ram_total_bytes=GIB)
    assert devices.gpus(tmp_path / "other")[0].uuid != devices.gpus(folder)[0].uuid


def test_a_claim_replaces_the_one_before(folder: Path) -> None:
    claim(folder, 5 * GIB)
    claim(folder, 2 * GIB, pinned=GIB)
    (held,) = devices.allocations(folder)
    assert (dict(held.vram), held.pinned_bytes, held.title) == ({0: 2 * GIB}, GIB, "test")


def test_a_claim_beyond_the_gpu_changes_nothing_and_says_what_is_free(folder: Path) -> None:
    claim(folder, 5 * GIB)
    with pytest.raises(devices.OutOfMemory) as refused:
        claim(folder, 25 * GIB)
    assert refused.value.free_bytes == 24 * GIB
    assert devices.allocations(folder)[0].vram == {0: 5 * GIB}


def test_pinned_memory_beyond_the_ram_is_refused(folder: Path) -> None:
    with pytest.raises(devices.OutOfMemory, match="RAM is out of memory"):
        claim(folder, GIB, pinned=65 * GIB)


def test_what_a_dead_process_held_is_free_and_its_file_goes(folder: Path) -> None:
    process = racer(folder, 20 * GIB)
    assert process.communicate("\n\n", timeout=60)[0] == "held\n"
    assert devices.allocations(folder) == ()
    assert not (folder / f"{process.pid}.json").exists()


def test_a_reused_pid_does_not_count(folder: Path) -> None:
    claim(folder, GIB)
    (path,) = folder.glob("[0-9]*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start_ticks": 1}))
    assert devices.allocations(folder) == ()


def test_of_two_that_want_the_last_gib_one_gets_it(folder: Path) -> None:
    racers = [racer(folder, 13 * GIB) for _ in range(2)]
    for process in racers:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline().strip() for process in racers if process.stdout is not None]
    for process in racers:
        process.communicate("\n", timeout=60)
    assert sorted(answers) == ["held", "refused"]


@given(
    weights=st.integers(GIB // 10, 20 * GIB),
    total=st.sampled_from([24 * GIB, 48 * GIB, 80 * GIB]),
    utilization=st.floats(0.3, 0.92),
    ranks=st.sampled_from([1, 2, 4]),
)
def test_a_memory_plan_fits_its_gpu(weights: int, total: int, utilization: float, ranks: int) -> None:
    plan = plan_memory(
        weights=weights, total=total, utilization=utilization, kv_cache=None, ranks=ranks, eager=False
    )
    assert plan.awake <= total
    assert plan.weights * ranks <= weights
    assert plan.residual > 0


def test_weights_are_of_the_table_the_name_or_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    assert weights_bytes("Qwen/Qwen3-32B-AWQ") == 18 * GIB
    assert weights_bytes("sim/3GiB") == 3 * GIB
    assert weights_bytes(str(tmp_path)) == 1000


def test_flags_are_read_in_every_form_vllm_takes() -> None:
    options = parse(
        [
            "m",
            "--served_model_name",
            "a",
            "b",
            "--port=9",
            "-tp",
            "2",
            "--max-model-len",
            "32k",
            "--no-enforce-eager",
        ],
        0.92,
    )
    assert (options.served_names, options.port, options.tensor_parallel) == (("a", "b"), 9, 2)
    assert (options.max_model_len, options.enforce_eager, options.utilization) == (32000, False, 0.92)


def test_of_a_repeated_flag_the_last_counts_but_middlewares_add_up() -> None:
    names = ["--served-model-name", "a", "b", "--served-model-name", "c"]
    options = parse(["m", *names, "--middleware", "x.X", "--middleware", "y.Y"], 0.92)
    assert (options.served_names, options.middlewares) == (("c",), ("x.X", "y.Y"))


def test_keys_are_hidden_in_what_is_logged() -> None:
    assert "secret" not in str(parse(["m", "--api-key", "secret"], 0.9).given)


@pytest.mark.parametrize(
    "wrong", [["m", "--port", "x"], ["m", "--port"], ["m", "--no-such-flag"], ["m", "n"]]
)
def test_a_wrong_command_line_is_refused(wrong: list[str]) -> None:
    with pytest.raises(ArgumentError):
        parse(wrong, 0.9)


def test_every_fault_is_a_row_of_the_table() -> None:
    rows = {row.name for row in BEHAVIOURS if row.when.startswith("fault:")}
    assert rows == set(Fault)
    assert len({row.name for row in BEHAVIOURS}) == len(BEHAVIOURS)


def test_a_counted_fault_is_used_up() -> None:
    faults = Faults(["wake_500:2"])
    assert [faults.use(Fault.WAKE_500) for _ in range(3)] == [True, True, False]
    assert not faults.use(Fault.SLEEP_500)
