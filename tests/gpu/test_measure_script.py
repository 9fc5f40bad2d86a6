"""The measuring script itself, tried on simulated servers: GPU time is too dear to find its mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("measure.py")


def measure(out: Path, rounds: int) -> subprocess.CompletedProcess[str]:
    """Run the script on two simulated models without delays."""
    simulated = {
        "VLLM_GPU_COMMAND": f"{sys.executable} -m vllm_sleep_tui.simulator",
        "VLLM_GPU_MODEL_A": "sim/1GiB",
        "VLLM_GPU_MODEL_B": "sim/7GiB",
        "VLLM_SIM_TIMES": "instant",
    }
    command = [
        sys.executable,
        str(SCRIPT),
        "--out",
        str(out),
        "--rounds",
        str(rounds),
        "--simulated",
        "80GiB",
    ]
    return subprocess.run(
        command, env=os.environ | simulated, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished measurement of two rounds a level."""
    out = tmp_path_factory.mktemp("measured")
    done = measure(out, rounds=2)
    assert done.returncode == 0, done.stderr
    return out


def test_panel_and_raw_switches_are_measured_in_turn_at_both_levels(measured: Path) -> None:
    levels = json.loads((measured / "measure.json").read_text())["levels"]
    for level in ("1", "2"):
        switches = levels[level]["switches"]
        assert [(one["how"], one["to"]) for one in switches] == 2 * [
            ("panel", "b"),
            ("panel", "a"),
            ("raw", "b"),
            ("raw", "a"),
        ]
        assert levels[level]["summary"]["to b, raw"]["total"]["median"] > 0


def test_memory_is_kept_by_model_and_state(measured: Path) -> None:
    levels = json.loads((measured / "measure.json").read_text())["levels"]
    for level in ("1", "2"):
        for name in ("a", "b"):
            held = levels[level]["memory"][name]
            assert held["asleep"]["level"] == int(level)
            assert held["asleep"]["vram"] < 2 * 2**30 < held["awake"]["vram"]


def test_started_again_it_has_nothing_left_to_do(measured: Path) -> None:
    before = (measured / "measure.json").read_text()
    done = measure(measured, rounds=2)
    assert done.returncode == 0, done.stderr
    assert "to a, panel" in done.stdout
    assert (measured / "measure.json").read_text() == before


def test_the_script_of_the_fast_sleep_mode_measures_every_kind(tmp_path: Path) -> None:
    simulated = {
        "VLLM_GPU_COMMAND": f"{sys.executable} -m vllm_sleep_tui.simulator",
        "VLLM_GPU_MODEL_A": "sim/1GiB",
        "VLLM_GPU_MODEL_B": "sim/7GiB",
        "VLLM_SIM_TIMES": "instant",
        "VLLM_SIM_VERSION": "0.26.0",
        "VLLM_SLEEP_TUI_POOL": str(tmp_path / "pool"),
    }
    script = str(SCRIPT.with_name("measure_fast_switch.py"))
    words = ["--out", str(tmp_path), "--rounds", "1", "--wakes", "2", "--kills", "--simulated", "80GiB"]
    done = subprocess.run(
        [sys.executable, script, *words],
        env=os.environ | simulated,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "fast-switch.jsonl").read_text().splitlines()]
    assert [line["sleep_backend"] for line in lines if "started" in line] == ["stock", "stock", "own", "own"]
    kinds = {line["summary"] for line in lines if "summary" in line}
    assert {"by hand", "vLLM's own", "fast, level 1", "fast, level 0"} <= kinds
    garbage = [line["garbage"] for line in lines if "proof_of" in line]
    assert len(garbage) == 2
    assert min(map(min, garbage)) > 1
    assert {line["state"] for line in lines if "killed" in line} == {"failed"}
    assert (lines[-1]["memory"], lines[-1]["gpu_used"]) == ("stopped", [0])


def test_the_agents_loop_goes_on_where_it_stopped_and_counts_each_turn_once(tmp_path: Path) -> None:
    simulated = {
        "VLLM_GPU_COMMAND": f"{sys.executable} -m vllm_sleep_tui.simulator",
        "VLLM_GPU_MODEL_A": "sim/1GiB",
        "VLLM_GPU_MODEL_B": "sim/7GiB",
        "VLLM_SIM_TIMES": "instant",
        "VLLM_SIM_VERSION": "0.26.0",
        "VLLM_SLEEP_TUI_POOL": str(tmp_path / "pool"),
    }
    lines = tmp_path / "agent-loop.jsonl"
    before = [{"kind": "both", "turn": 0, "model": "a", "first": 0.1, "seconds": 0.2}]
    before += [{"kind": kind, "turn": turn, "model": kind, "first": 0.1, "seconds": 0.2}
               for kind in "ab" for turn in range(2)]  # fmt: skip
    lines.write_text("".join(json.dumps(line) + "\n" for line in before) + '{"kind": "bo')
    script = str(SCRIPT.with_name("agent_loop.py"))
    done = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path), "--turns", "2", "--simulated", "80GiB"],
        env=os.environ | simulated,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    turns = [json.loads(line) for line in lines.read_text().splitlines()]
    assert turns[:-1] == before
    assert (turns[-1]["kind"], turns[-1]["turn"], turns[-1]["model"]) == ("both", 1, "b")
    assert json.loads((tmp_path / "agent-loop-gateway.json").read_text())["asleep"] == {"a": 0}
    assert "the change to a adds" in json.loads((tmp_path / "agent-loop.json").read_text())
