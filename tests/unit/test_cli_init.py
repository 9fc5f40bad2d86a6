"""`init` and `doctor`: what they find, what they write, what they say is amiss."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_sleep_tui.cli.init import config_text, gpus_needed, short_name
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.survey import CachedModel, GpuReading, Surroundings, VllmEnvironment

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a vLLM environment and a cached model; nothing else in PATH, an empty folder to be in."""
    home = tmp_path / "home"
    binary = home / "miniconda3/envs/gpu/bin/vllm"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\nexit 1\n")
    binary.chmod(0o755)
    (home / "miniconda3/envs/gpu/lib/python3.12/site-packages/vllm-0.24.0.dist-info").mkdir(parents=True)
    snapshot = home / "hf/hub/models--Qwen--Qwen3-0.6B/snapshots/a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (snapshot / "model.safetensors").write_bytes(b"x")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    for variable in ("HF_HUB_CACHE", "HF_TOKEN", "CONDA_PREFIX", "XDG_DATA_HOME", "UV_TOOL_DIR", "PIPX_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return home


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_sleep_tui", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = run(*arguments, "doctor", "--json")
    assert done.stderr == ""
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_init_writes_what_it_found_and_says_the_next_step(machine: Path) -> None:
    done = run("init")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "vllm-sleep-tui.yaml\n"
    binary = machine / "miniconda3/envs/gpu/bin/vllm"
    assert f"vLLM   0.24.0  {binary}  (conda, gpu)" in done.stderr
    assert "Model  Qwen/Qwen3-0.6B" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("vllm-sleep-tui doctor")
    loaded = load(Path("vllm-sleep-tui.yaml"))
    assert loaded.config.vllm_command == (str(binary),)
    assert loaded.config.models["qwen3-0.6b"].model == "Qwen/Qwen3-0.6B"
    first = Path("vllm-sleep-tui.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=vllm-sleep-tui.schema.json"
    assert json.loads(Path("vllm-sleep-tui.schema.json").read_text())["$defs"]["ModelConfig"]


def test_init_never_overwrites_without_force() -> None:
    Path("vllm-sleep-tui.yaml").write_text("mine")
    done = run("init")
    assert done.returncode == 1
    assert "is there already" in done.stderr.splitlines()[0]
    assert Path("vllm-sleep-tui.yaml").read_text() == "mine"
    assert run("init", "--force").returncode == 0
    assert load(Path("vllm-sleep-tui.yaml"))


def test_the_file_that_init_wrote_is_not_asked_about() -> None:
    run("init")
    assert "was found here" not in run("start", "nobody").stderr


GPUS = tuple(
    GpuReading(index=index, uuid=f"u{index}", name="H100", total_bytes=80 * GIB) for index in range(4)
)


def surroundings(
    models: tuple[CachedModel, ...],
    *,
    gpus: tuple[GpuReading, ...] = GPUS,
    environments: tuple[VllmEnvironment, ...] = (),
) -> Surroundings:
    return Surroundings(environments=environments, gpus=gpus, gpu_note=None, models=models, token=False)


def test_a_model_gets_as_many_gpus_as_its_weights_need(tmp_path: Path) -> None:
    models = tuple(
        CachedModel(name=name, bytes=size * GIB, generates=generates)
        for name, size, generates in (
            ("a/Small", 10, True),
            ("b/small", 20, True),
            ("c/Mid", 100, True),
            ("d/Huge", 900, True),
            ("e/embed", 1, False),
        )
    )
    path = tmp_path / "c.yaml"
    path.write_text(config_text(surroundings(models)))
    written = load(path).config.models
    assert {name: (model.model, model.gpus) for name, model in written.items()} == {
        "small": ("a/Small", (0,)),
        "b-small": ("b/small", (0,)),
        "mid": ("c/Mid", (0, 1)),
    }
    assert written["mid"].args == {"tensor-parallel-size": "2"}


def test_an_environment_that_can_sleep_is_preferred(tmp_path: Path) -> None:
    old = VllmEnvironment(command=Path("/old env/bin/vllm"), version="0.10.0", place="PATH")
    new = VllmEnvironment(command=Path("/new $env/bin/vllm"), version="0.25.0", place="conda")
    text = config_text(surroundings((), environments=(old, new)))
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert load(path).config.vllm_command == ("/new $env/bin/vllm",)
    assert "# also found: /old env/bin/vllm  0.10.0" in text


def test_without_a_gpu_and_a_model_an_example_for_the_cpu_is_written(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config_text(surroundings((), gpus=())))
    (model,) = load(path).config.models.values()
    assert (model.model, model.gpus) == ("Qwen/Qwen3-0.6B", ())


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (64, 1), (65, 2), (128, 2), (129, 4), (256, 4), (257, None)]
)
def test_weights_may_take_four_fifths_of_the_gpus(size: int, count: int | None) -> None:
    assert gpus_needed(size * GIB, GPUS) == count


@pytest.mark.parametrize(
    ("model", "name"),
    [("Qwen/Qwen3-0.6B", "qwen3-0.6b"), ("a/B c!d", "b-c-d"), ("x/..", "model"), ("a" * 99, "a" * 64)],
)
def test_a_short_name_is_a_legal_one(model: str, name: str) -> None:
    assert short_name(model) == name


# ── doctor ──────────────────────────────────────────────────────────────────────────────────────────────


def write(text: str) -> str:
    path = Path("c.yaml")
    path.write_text(text)
    return str(path)


def test_all_is_well_with_a_model_on_the_cpu(machine: Path) -> None:
    binary = machine / "miniconda3/envs/gpu/bin/vllm"
    code, checks = doctor(
        "--config", write(f"vllm_command: [{binary}]\nmodels: {{a: {{model: x/y, gpus: []}}}}\n")
    )
    assert code == 0
    assert checks["vllm"] == {"name": "vllm", "verdict": "ok", "what": f"0.24.0, {binary}", "cure": ""}
    assert checks["token"]["what"].startswith("Hugging Face's is not there")
    assert checks["state folder"]["verdict"] == "ok"


def test_a_token_is_only_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    done = run("--config", write("models: {a: {model: x/y, gpus: []}}\n"), "doctor")
    assert "Hugging Face's is there" in done.stdout
    assert "very_secret" not in done.stdout + done.stderr


def test_a_missing_vllm_fails() -> None:
    code, checks = doctor(
        "--config", write("vllm_command: [/none/vllm]\nmodels: {a: {model: x/y, gpus: []}}\n")
    )
    assert (code, checks["vllm"]["verdict"]) == (1, "fail")
    assert "/none/vllm" in checks["vllm"]["what"]


def test_an_old_vllm_is_a_warning(machine: Path) -> None:
    site = machine / "miniconda3/envs/gpu/lib/python3.12/site-packages"
    (site / "vllm-0.24.0.dist-info").rename(site / "vllm-0.11.0.dist-info")
    binary = machine / "miniconda3/envs/gpu/bin/vllm"
    code, checks = doctor(
        "--config", write(f"vllm_command: [{binary}]\nmodels: {{a: {{model: x/y, gpus: []}}}}\n")
    )
    assert (code, checks["vllm"]["verdict"]) == (0, "warn")
    assert "too old to sleep" in checks["vllm"]["what"]


def test_a_gpu_that_is_not_there_fails() -> None:
    code, checks = doctor("--config", write("models: {a: {model: x/y, gpus: [97]}}\n"))
    assert (code, checks["a.gpus"]["verdict"]) == (1, "fail")
    assert "there is no GPU 97" in checks["a.gpus"]["what"]


def test_a_folder_without_a_model_fails(tmp_path: Path) -> None:
    code, checks = doctor("--config", write(f"models: {{a: {{model: {tmp_path}, gpus: []}}}}\n"))
    assert (code, checks["a.model"]["verdict"]) == (1, "fail")


def test_a_taken_port_fails_and_names_who_has_it(free_port: Callable[[], int]) -> None:
    port = free_port()
    config = write(f"models: {{a: {{model: x/y, gpus: [], port: {port}}}}}\n")
    assert doctor("--config", config)[1]["a.port"]["verdict"] == "ok"
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        code, checks = doctor("--config", config)
    assert (code, checks["a.port"]["verdict"]) == (1, "fail")
    assert f"{port} is taken by pid {os.getpid()}" in checks["a.port"]["what"]


def test_a_broken_config_fails_and_the_rest_is_still_looked_at() -> None:
    code, checks = doctor("--config", write("models: {a: {modle: x}}\n"))
    assert (code, checks["config"]["verdict"]) == (1, "fail")
    assert "modle: unknown key" in checks["config"]["what"]
    assert "vllm" in checks
    assert "ram" in checks


def test_the_demo_is_well_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    path = run("demo", "--init", str(tmp_path / "d")).stdout.strip()
    done = run("--config", path, "doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("SIMULATED") == 3  # vLLM, GPUs and RAM


def test_the_demo_overwrites_itself_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d/vllm-sleep-tui.yaml"
    assert run("demo", "--init", str(path.parent)).returncode == 0
    assert 'VLLM_SIM_SPEED: "1"' in path.read_text()
    assert run("demo", "--init", str(path.parent), "--speed", "2.5").returncode == 0
    assert load(path).config.models["big"].env == {"VLLM_SIM_SPEED": "2.5"}
    path.write_text("mine")
    done = run("demo", "--init", str(path.parent))
    assert (done.returncode, path.read_text()) == (1, "mine")
    assert "is no demo" in done.stderr
    path.write_text("")  # as a full disk leaves it
    assert run("demo", "--init", str(path.parent)).returncode == 0


def test_simulated_gpus_that_cannot_be_written_are_two_lines_with_a_cure(tmp_path: Path) -> None:
    path = run("demo", "--init", str(tmp_path / "d")).stdout.strip()
    assert run("--config", path, "status").returncode == 0
    [folder] = Path(os.environ["XDG_STATE_HOME"]).glob("vllm-sleep-tui/records/simulated-*.gpus")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    done = run("--config", path, "status")
    assert done.returncode == 1
    assert "The simulated GPUs cannot be written to" in done.stderr.splitlines()[0]
    assert "XDG_STATE_HOME" in done.stderr.splitlines()[1]
