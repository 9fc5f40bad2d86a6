"""The box's one command on simulated servers, killed twice and started again: minutes there are dear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from box_report import BEFORE
from command_line import CommandLine, wait_until
from measure_memory import off

from tests.unit.made_checkpoints import MOE, PHI, QWEN, SMOLLM, write_model
from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run, read

HERE = Path(__file__).parent
REPEATS, WAKES = 1, 2
SECONDS = 300


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Four models with the shapes of the box's, on simulated servers that take no time."""
    shapes = {"A": QWEN, "B": PHI, "CHAT": SMOLLM, "MOE": MOE}
    found = {
        "VLLM_GPU_COMMAND": f"{sys.executable} -m vllm_sleep_tui.simulator",
        "VLLM_SIM_TIMES": "instant",
    }
    for name, config in shapes.items():
        if not (folder / name).exists():
            write_model(folder / name, config)
        found[f"VLLM_GPU_MODEL_{name}"] = str(folder / name)
    return os.environ | found | more


def begin(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start the script on the folder."""
    command = [sys.executable, str(HERE / "box.py"), "--out", str(folder / "out"), "--simulated", "80GiB"]
    command += ["--repeats", str(REPEATS), "--wakes", str(WAKES), "--seconds", str(SECONDS), *words]
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(
            command, env=environment(folder), stdout=said, stderr=subprocess.STDOUT, text=True
        )


def kill_when(folder: Path, condition: Callable[[], bool], what: str) -> None:
    """Begin it and kill it then."""
    process = begin(folder)
    wait_until(lambda: condition() or process.poll() is not None, seconds=SECONDS, what=what, every=0.005)
    assert process.poll() is None, (folder / "said.txt").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()


def notes(folder: Path) -> dict[str, Any]:
    """What the script has written down of its own."""
    path = folder / "out" / "results" / "box.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"done": {}}
    return found


def steps_of(path: Path) -> int:
    """How many switches a run of the benchmark holds."""
    return sum(len(each.steps) for each in read(path).passes) if path.exists() else 0


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The results of a box whose command was killed in the passes, and again in the proof after them."""
    folder = tmp_path_factory.mktemp("box")
    results = folder / "out" / "results"
    kill_when(folder, lambda: steps_of(results / "pair.json") > 7, "a pass at level 2")
    kill_when(folder, lambda: "── proof of phi" in (folder / "said.txt").read_text(), "the servers' last use")
    process = begin(folder)
    try:
        process.wait(timeout=SECONDS)
        assert process.returncode == 0, (folder / "said.txt").read_text()
        yield results
    finally:
        CommandLine(folder / "out" / "box.yaml", folder / "out" / "state-home").close()


def test_every_step_is_done_and_nothing_failed(box: Path) -> None:
    kept = json.loads((box / "box.json").read_text())
    assert kept.get("faults", {}) == {}
    steps = {"estimates", "smol", "pair", "fp8", "cold", "no-warmup", "moe", "ray", "stop"}
    assert steps <= set(kept["done"])


def test_the_pair_is_measured_whole_although_it_was_killed(box: Path) -> None:
    run: Run = read(box / "pair.json")
    assert run.is_done
    assert run.restored
    assert [each.key.mode for each in run.passes] == [Mode.LEVEL1, Mode.LEVEL2, Mode.COLD]
    assert len(run.loads) == 2  # the kills cost no start of the pair
    assert read(box / "fp8.json").models["phi"]["args"]["quantization"] == "fp8"
    assert not read(box / "no-warmup.json").plan.warm_up


def test_the_same_protocol_was_done_by_hand_in_turns(box: Path) -> None:
    by_hand = json.loads((box / "pair-by-hand.json").read_text())
    assert set(by_hand) == {"level1 1", "level2 1"}
    (panel,) = [each for each in read(box / "pair.json").passes if each.key.mode is Mode.LEVEL1]
    steps = by_hand["level1 1"]["steps"]
    assert [step["target"] for step in steps] == [step.target for step in panel.steps]
    assert [step["tokens"] for step in steps] == [step.tokens for step in panel.steps]
    assert steps[0]["sleep"] is None
    assert all(step["sleep"] > 0 and step["wake"] > 0 and step["inference"] > 0 for step in steps[1:])


def test_the_proof_tells_wakes_from_garbage(box: Path) -> None:
    found = json.loads((box / "proof.json").read_text())
    assert set(found) == {"smol", "phi", "phi FP8", "moe"}
    for each in found.values():
        assert (len(each["level 1"]), len(each["level 2"]), len(each["garbage"])) == (WAKES, WAKES // 2, 3)
        assert (
            max(each["level 1"] + each["level 2"] + each["after a late reload"]) < 0.1 < min(each["garbage"])
        )
    wakes = len(found) * (WAKES + WAKES // 2)
    tables = (box / "tables.md").read_text()
    assert f"{wakes} wakes, {BEFORE + wakes} with those before; 0 called wrong." in tables
    assert "12 times garbage, 0 of them not found." in tables


def test_memory_has_rows_of_every_moment_and_the_panel_shows_what_is_there(box: Path) -> None:
    rows = [json.loads(line) for line in (box / "memory.jsonl").read_text().splitlines()]
    moments = {(row["model"], row["moment"]) for row in rows}
    for model in ("smol", "phi", "phi FP8", "moe"):
        for moment in ("asleep, level 1", "awake after level 1", "asleep, level 2"):
            assert (model, moment) in moments
    # A start that takes no time may lie between two looks; of all of them some are seen.
    assert "starting" in {moment for _, moment in moments}
    assert ("smol", "stopped") in moments
    still = [row for row in rows if row["moment"].startswith(("asleep", "awake", "stopped"))]
    assert all(row[kind]["off"] == 0 for row in still for kind in ("vram", "pinned"))
    asleep = [row for row in still if row["moment"] == "asleep, level 1"]
    assert all(0 < row["vram"]["panel"] < 2 * 2**30 for row in asleep)


@pytest.mark.parametrize(
    ("panel", "before", "after", "expected"),
    [
        (100, 100, 100, 0),
        (150, 100, 200, 0),
        (98, 100, 100, 2),
        (210, 200, 100, 5),
        (None, 1, 1, None),
        (0, 0, 0, 0),
    ],
)
def test_a_figure_is_off_by_what_it_is_outside_of_both_readings(
    panel: int | None, before: int, after: int, expected: float | None
) -> None:
    assert off(panel, before, after) == expected


def test_estimates_are_made_from_the_results_alone(box: Path, tmp_path: Path) -> None:
    copied = tmp_path / "results"
    subprocess.run(["cp", "-r", box, copied], check=True)
    command = [sys.executable, str(HERE / "measure_estimates.py"), str(copied)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "%" in line]
    off_by = {(model, what): float(off.removesuffix("%")) for model, what, _, _, off in rows}
    assert {model for model, _ in off_by} == {"smol", "qwen", "qwen FP8", "phi", "phi FP8", "moe"}
    # The simulator knows no FP8 and no rotary table: what it "measures" of the others is near the truth.
    for model in ("smol", "qwen", "phi", "moe"):
        assert abs(off_by[model, "weights"]) < 2
        assert abs(off_by[model, "VRAM awake"]) < 2
    assert abs(off_by["phi", "pinned RAM"]) < 10


def test_the_pictures_show_a_switch_under_way_and_the_chat_after_it(box: Path) -> None:
    chat = (box / "panel.svg").read_text().replace("&#160;", " ")
    assert "Chat with" in chat
    assert "sky" in chat
    assert "switching to" not in chat
    assert (box / "switching.svg").exists()


def test_reports_and_comparisons_are_written(box: Path) -> None:
    for name in ("pair", "fp8", "no-warmup"):
        assert (box / f"{name}.md").read_text().startswith("#")
        assert "<svg" in (box / f"{name}.html").read_text()
    tables = (box / "tables.md").read_text()
    assert "## pair beside fp8" in tables
    assert "## pair beside no-warmup" in tables


def test_one_gpu_is_too_few_for_ray_and_says_so(box: Path) -> None:
    assert json.loads((box / "ray.json").read_text()) == {
        "left out": "Left out: it takes two GPUs, and this machine has 1."
    }


@pytest.mark.parametrize(("backend", "expected"), [("mp", None), ("ray", "cannot import ray")])
def test_two_gpus_are_measured_where_the_backend_is_there(
    tmp_path: Path, backend: str, expected: str | None
) -> None:
    command = [
        sys.executable,
        str(HERE / "measure_ray.py"),
        "--out",
        str(tmp_path),
        "--simulated",
        "80GiB",
        "80GiB",
    ]
    subprocess.run([*command, "--backend", backend], env=environment(tmp_path / "models"), check=True)
    found = json.loads((tmp_path / "ray.json").read_text())
    if expected is not None:
        assert expected in found["left out"]
        return
    states = [(step["state"], step["level"], step["exit"]) for step in found["steps"]]
    assert states == [
        ("awake", None, 0),
        ("asleep", 1, 0),
        ("awake", None, 0),
        ("asleep", 2, 0),
        ("awake", None, 0),
        ("awake", None, 0),
        ("stopped", None, 0),
    ]
    assert all(set(step["vram_by_gpu"]) == {"0", "1"} for step in found["steps"][:-1])


def test_what_does_not_fit_into_the_call_is_left_for_the_next_one(tmp_path: Path) -> None:
    process = begin(tmp_path, "--seconds", "5", "--only", "estimates", "cold")
    assert process.wait(timeout=SECONDS) == 75
    assert set(notes(tmp_path)["done"]) == {"estimates"}
    assert "Left: cold." in (tmp_path / "said.txt").read_text()


def test_it_says_what_is_not_set(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "box.py"), "--out", str(tmp_path)]
    unset = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_GPU")}
    done = subprocess.run(command, env=unset, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "VLLM_GPU_MODEL_CHAT" in done.stderr
