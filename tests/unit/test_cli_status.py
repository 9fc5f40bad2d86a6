"""`status`: its fixed JSON, its table, and what it must not import."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vllm_sleep_tui.cli.scrape import page
from vllm_sleep_tui.cli.status import redrawn, status_json, status_lines
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
from vllm_sleep_tui.telemetry.prometheus import parse, total

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
def test_status_imports_neither_textual_nor_the_http_client(tmp_path: Path, option: str | None) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("models: {qwen: {model: a/b, gpus: []}}\n")
    arguments = ["--config", str(config), "status", *([option] if option else [])]
    program = (
        "import sys; from vllm_sleep_tui.cli.app import run; code = run(sys.argv[1:]); "
        "import json; loaded = sorted(name for name, module in sys.modules.items() if module); "
        "print(json.dumps(loaded), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    assert "vllm_sleep_tui" in loaded
    assert loaded & {"textual", "rich", "httptools", "uvicorn"} == set()


def scraped(snapshot: FleetSnapshot, name: str, /, **labels: str) -> float | None:
    return total(
        parse(page(snapshot), frozenset({f"vllm_sleep_tui_{name}"})), f"vllm_sleep_tui_{name}", **labels
    )


def test_a_scraped_page_holds_states_memory_and_the_last_switch() -> None:
    assert scraped(SNAPSHOT, "model_state", model="qwen", state="asleep") == 1
    assert scraped(SNAPSHOT, "model_state", model="qwen", state="awake") == 0
    assert scraped(SNAPSHOT, "model_state", model="qwen") == 1
    assert scraped(SNAPSHOT, "model_vram_bytes", model="qwen", gpu="0") == GIB
    assert scraped(SNAPSHOT, "model_ram_bytes", model="qwen") == 2 * GIB
    assert scraped(SNAPSHOT, "model_pinned_bytes", model="qwen") == GIB
    assert scraped(SNAPSHOT, "model_last_switch_seconds", model="qwen") == 0.48
    assert scraped(SNAPSHOT, "model_last_switch_phase_seconds", model="qwen", phase="sleep") == 0.2
    assert scraped(SNAPSHOT, "gpu_used_bytes", gpu="0", uuid="GPU-1") == 3 * GIB
    assert scraped(SNAPSHOT, "gpu_total_bytes") == 80 * GIB
    assert scraped(SNAPSHOT, "gpu_utilization_ratio") == 0.87
    assert scraped(SNAPSHOT, "host_ram_available_bytes") == 10 * GIB


def test_what_is_not_known_is_no_line_of_a_scraped_page() -> None:
    assert scraped(SNAPSHOT, "model_vram_bytes", model="phi") is None
    assert scraped(SNAPSHOT, "host_ram_total_bytes") is None
    assert "host_ram_total_bytes" not in page(SNAPSHOT)


def test_every_line_of_a_scraped_page_is_well_formed_whatever_a_name_holds() -> None:
    odd = 'H100 "new"\\ \n{x="1"}'
    snapshot = msgspec.structs.replace(SNAPSHOT, gpus=(msgspec.structs.replace(SNAPSHOT.gpus[0], name=odd),))
    text = page(snapshot)
    line = re.compile(
        r'vllm_sleep_tui_\w+(\{\w+="([^"\\\n]|\\["\\n])*"(,\w+="([^"\\\n]|\\["\\n])*")*\})? \S+'
    )
    assert all(each.startswith(("# HELP ", "# TYPE ")) or line.fullmatch(each) for each in text.splitlines())
    assert scraped(snapshot, "gpu_used_bytes", name=odd) == 3 * GIB


def test_a_redrawn_table_leaves_nothing_of_the_one_before_and_never_scrolls() -> None:
    drawn = redrawn(["a long line of text", "two\nlines", "more"], os.terminal_size((6, 4)))
    assert drawn == "\x1b[Ha long\x1b[K\ntwo\x1b[K\nlines\x1b[K\n\x1b[J"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`status` of a config without GPUs."""
    config = tmp_path / "c.yaml"
    config.write_text("models: {qwen: {model: a/b, gpus: []}}\n")
    return [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config), "status"]


@pytest.mark.parametrize("others", [["--watch"], ["--json"]])
def test_a_page_for_scraping_is_refused_with_another_form(command: list[str], others: list[str]) -> None:
    done = subprocess.run(
        [*command, "--prometheus", *others], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 2


def test_watching_as_json_gives_one_line_for_each_look(command: list[str]) -> None:
    with subprocess.Popen([*command, "--watch", "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [look["models"][0]["state"] for look in looks] == ["stopped", "stopped"]


def test_watching_on_a_terminal_clears_it_once_and_then_draws_in_place(command: list[str]) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*command, "--watch"], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        seen = b""
        for piece in read_terminal(ours):
            seen += piece
            if seen.count(b"MODEL") >= 2 and seen.endswith(b"\x1b[J"):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert seen.count(b"\x1b[2J") == 1
    assert seen.count(b"\x1b[J") == seen.count(b"MODEL")  # more than two where reading was late


def read_terminal(descriptor: int) -> Iterator[bytes]:
    """What is written to a terminal, as it comes, for at most 60 s."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.2)[0]:
            yield os.read(descriptor, 65536)
    pytest.fail("the terminal showed too little")
