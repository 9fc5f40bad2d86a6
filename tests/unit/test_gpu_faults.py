"""A GPU that is absent, one that does not answer, one that is somebody else's: told apart by every verb.

The verbs run as they are, over a libnvidia-ml.so.1 that is compiled here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_line import CommandLine, write_config

SOURCE = Path(__file__).parent / "data/fake_nvml.c"


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the made library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here to make a libnvidia-ml.so.1 with")
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return folder


def panel(tmp_path: Path, library: Path | None, **faults: str | bytes) -> CommandLine:
    """The command line over two models, one on each GPU."""
    models = {"first": {"model": "org/one", "gpus": [0]}, "second": {"model": "org/two", "gpus": [1]}}
    config = write_config(tmp_path / "vllm-sleep-tui.yaml", ["/bin/true"], models)
    environment = {**os.environ, **{name: os.fsdecode(value) for name, value in faults.items()}}
    if library is not None:
        environment["LD_LIBRARY_PATH"] = str(library)
    return CommandLine(config, tmp_path / "state", environment=environment)


def check(said: str, name: str) -> dict[str, str]:
    """The check of that name in what `doctor --json` said."""
    found: list[dict[str, str]] = [one for one in json.loads(said)["checks"] if one["name"] == name]
    assert found, f"no check {name}"
    return found[-1]


@pytest.mark.parametrize(
    ("code", "what", "cure"),
    [
        (18, "was upgraded while the old one runs", "Restart the machine"),
        (9, "is installed and not loaded", "modprobe nvidia"),
        (4, "does not let this user in", "/dev/nvidia*"),
        (999, "The NVIDIA driver does not answer", "dmesg"),
    ],
    ids=["mismatch", "not loaded", "not mine", "anything"],
)
def test_a_driver_that_does_not_answer_is_told_with_its_cure_by_every_verb(
    nvml: Path, tmp_path: Path, code: int, what: str, cure: str
) -> None:
    broken = panel(tmp_path, nvml, FAKE_NVML_INIT=str(code))
    status = broken.run("status")
    assert (status.returncode, status.stderr) == (0, "")
    assert what in status.stdout
    assert cure in status.stdout
    doctor = broken.run("doctor", "--json")
    found = check(doctor.stdout, "gpus")
    assert (what in found["what"], cure in found["cure"]) == (True, True)
    assert check(doctor.stdout, "first.gpus")["verdict"] == "fail"
    start = broken.run("start", "first")
    assert start.returncode == 1
    assert what in start.stderr
    assert cure in start.stderr


@pytest.mark.parametrize(
    ("code", "what", "cure"),
    [
        (15, "GPU 1 is lost", "Xid"),
        (16, "GPU 1 must be reset", "nvidia-smi --gpu-reset -i 1"),
        (4, "GPU 1 is not yours to use", "Take it out of `gpus:`"),
    ],
    ids=["lost", "reset", "not mine"],
)
def test_one_gpu_that_does_not_answer_is_not_called_absent_and_leaves_the_other_alone(
    nvml: Path, tmp_path: Path, code: int, what: str, cure: str
) -> None:
    half = panel(tmp_path, nvml, FAKE_NVML_GPU1=str(code))
    status = half.run("status")
    assert what in status.stdout
    assert "GPU 0  1.0 GiB of 24.0 GiB" in status.stdout
    doctor = half.run("doctor", "--json")
    found = check(doctor.stdout, "second.gpus")
    assert (what in found["what"], cure in found["cure"]) == (True, True)
    assert "there is no GPU" not in doctor.stdout
    assert "first.gpus" not in doctor.stdout
    start = half.run("start", "second")
    assert start.returncode == 1
    assert what in start.stderr
    assert cure in start.stderr


def test_no_driver_at_all_is_absent_and_says_what_runs_without(tmp_path: Path) -> None:
    bare = panel(tmp_path, None)
    doctor = bare.run("doctor", "--json")
    found = check(doctor.stdout, "gpus")
    if found["verdict"] == "ok":
        pytest.skip("this machine has an NVIDIA GPU")
    assert "libnvidia-ml.so.1 not found" in found["what"]
    assert "gpus: []" in found["cure"]
    assert "libnvidia-ml.so.1 not found" in bare("status")


def test_a_gpu_whose_name_is_not_utf_8_is_shown_cleaned_by_every_verb(nvml: Path, tmp_path: Path) -> None:
    odd = panel(tmp_path, nvml, FAKE_NVML_NAME=b"NVIDIA \xff\xe9\x1b[31mX")
    status = odd.run("status", "--json")
    assert status.returncode == 0, status.stderr
    names = {gpu["name"] for gpu in json.loads(status.stdout)["gpus"]}
    assert names == {"NVIDIA \ufffd\ufffd\ufffd[31mX"}
    doctor = odd.run("doctor", "--json")
    assert "NVIDIA \ufffd" in check(doctor.stdout, "gpus")["what"]
    start = odd.run("start", "first")
    assert start.returncode == 1
    assert "Unexpected" not in start.stderr


@pytest.mark.parametrize("visible", ["1", "", "-1,0", "GPU-1", "MIG-0a1b", "1,NoDevFiles,0"])
def test_a_gpu_that_the_shell_was_not_given_is_refused_and_not_taken(
    nvml: Path, tmp_path: Path, visible: str
) -> None:
    scheduled = panel(tmp_path, nvml, CUDA_VISIBLE_DEVICES=visible)
    refused = scheduled.run("start", "first")
    assert refused.returncode == 1
    assert f"GPU 0 is not this shell's; CUDA_VISIBLE_DEVICES is '{visible}' here." in refused.stderr
    assert "unset CUDA_VISIBLE_DEVICES" in refused.stderr
    found = check(scheduled.run("doctor", "--json").stdout, "first.gpus")
    assert (found["verdict"], f"'{visible}'" in found["what"]) == ("fail", True)


@pytest.mark.parametrize("visible", ["0", " 1, 0", "GPU-0"])
def test_a_gpu_that_the_shell_was_given_is_started_on(nvml: Path, tmp_path: Path, visible: str) -> None:
    scheduled = panel(tmp_path, nvml, CUDA_VISIBLE_DEVICES=visible)
    failed = scheduled.run("start", "first")  # its vllm is /bin/true
    assert failed.returncode == 1
    assert "CUDA_VISIBLE_DEVICES" not in failed.stderr
    assert "first.gpus" not in scheduled.run("doctor", "--json").stdout
