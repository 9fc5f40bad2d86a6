"""`status`: its fixed JSON, its table, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sleep_tui.cli.status import status_json, status_lines
from vllm_sleep_tui.fleet.snapshot import (
    FleetSnapshot,
    GpuProcess,
    GpuSnapshot,
    HostSnapshot,
    ModelSnapshot,
    OperationSnapshot,
    SwitchTimes,
)
from vllm_sleep_tui.fleet.states import StartPhase, State

GIB = 2**30
SNAPSHOT = FleetSnapshot(
    models=(
        ModelSnapshot(
            name="qwen",
            state=State.ASLEEP,
            level=1,
            operation=OperationSnapshot(name="switch", since=100.0, eta=0.5),
            pid=7,
            port=8001,
            gpus=(0,),
            vram_bytes=GIB,
            vram_by_gpu={"0": GIB},
            ram_bytes=2 * GIB,
            pinned_bytes=GIB,
            since=40.0,
            last_switch=SwitchTimes(phases={"wake": 0.1, "sleep": 0.2}, total=0.48),
        ),
        ModelSnapshot(name="phi", state=State.STARTING, phase=StartPhase.LOADING, vram_bytes=None),
        ModelSnapshot(name="big", state=State.FAILED, reason="No room.", cure="Stop another."),
    ),
    gpus=(
        GpuSnapshot(
            index=0,
            uuid="GPU-1",
            name="H100",
            used_bytes=3 * GIB,
            total_bytes=80 * GIB,
            utilization=87.0,
            others=(GpuProcess(pid=9, user="eve", command="python train.py", bytes=GIB),),
        ),
    ),
    host=HostSnapshot(ram_available_bytes=10 * GIB, ram_total_bytes=None),
    time=100.0,
    notes=("No NVML: it is gone.",),
)


def test_the_json_holds_the_fixed_fields_in_their_order() -> None:
    shown = status_json(SNAPSHOT)
    assert list(shown) == ["version", "models", "gpus", "host"]
    names = (
        "name state level phase operation pid port gpus vram_bytes vram_by_gpu ram_bytes pinned_bytes since"
    )
    assert list(shown["models"][0]) == [*names.split(), "reason", "cure", "last_switch"]
    assert list(shown["gpus"][0]) == [
        "index",
        "uuid",
        "name",
        "used_bytes",
        "total_bytes",
        "utilization",
        "simulated",
    ]
    assert list(shown["host"]) == ["ram_available_bytes", "ram_total_bytes"]
    assert list(shown["models"][0]["operation"]) == ["name", "since", "eta"]


def test_every_phase_of_the_last_switch_is_there_and_unknown_is_null() -> None:
    qwen, phi, _ = status_json(SNAPSHOT)["models"]
    phases = ["drain", "sleep", "settle", "wake", "weights", "reload", "kv_cache", "reset", "prove"]
    assert list(qwen["last_switch"]["phases"]) == phases
    assert qwen["last_switch"]["phases"]["wake"] == 0.1
    assert qwen["last_switch"]["phases"]["drain"] is None
    assert phi["vram_bytes"] is None
    assert phi["last_switch"] is None
    assert phi["phase"] == "loading"


def test_the_table_tells_states_reasons_strangers_and_what_is_not_known() -> None:
    text = "\n".join(status_lines(SNAPSHOT))
    assert "asleep L1" in text
    assert "starting (loading)" in text
    assert "0.48 s" in text
    assert "big: No room.\n  Stop another." in text
    assert "pid 9  eve  python train.py" in text
    assert "free of –" in text
    assert text.endswith("No NVML: it is gone.")


@pytest.mark.parametrize("option", ["--json", None])
def test_status_imports_neither_textual_nor_httpx(tmp_path: Path, option: str | None) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("models: {qwen: {model: a/b, gpus: []}}\n")
    arguments = ["--config", str(config), "status", *([option] if option else [])]
    program = (
        "import sys; from vllm_sleep_tui.cli.app import run; code = run(sys.argv[1:]); "
        "import json; print(json.dumps(sorted(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    assert "vllm_sleep_tui" in loaded
    assert loaded & {"textual", "rich", "httpx", "uvicorn", "anyio"} == set()
