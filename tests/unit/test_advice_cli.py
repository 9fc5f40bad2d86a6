"""`advise` from a shell: on models never launched, on the demo, and what --apply writes."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.made_checkpoints import PHI, QWEN, cache_model, write_model
from vllm_sleep_tui.config.edit import difference, edited
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import RefusedError

COMMAND = [sys.executable, "-m", "vllm_sleep_tui"]
CONFIG = """\
# My models.
vllm_command: [/nowhere/vllm]
simulated_gpus:
  - {name: Test, memory: 80GiB}   # one card
models:
    qwen:   # small
        model: ./qwen
        args: {max-model-len: 4096}

    phi:
        model: "./phi"
        # leave this one
        level: auto
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models and a config, without a GPU of its own or a cache."""
    write_model(tmp_path / "qwen", QWEN)
    write_model(tmp_path / "phi", PHI)
    (tmp_path / "vllm-sleep-tui.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "advise", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def advice(*arguments: str) -> dict[str, dict[str, object]]:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {model["name"]: model for model in json.loads(done.stdout)["models"]}


def test_before_any_launch_the_advice_stands_on_estimates(here: Path) -> None:
    found = advice()
    assert list(found) == ["qwen", "phi"]
    assert found["phi"]["is_estimate"] is True
    assert found["phi"]["verdict"] == "keep awake", "80 GiB hold both with a cache for many contexts each"
    assert "estimate" in str(found["phi"]["why"])


def test_a_model_that_the_config_does_not_name_is_estimated_from_the_cache(here: Path) -> None:
    cache_model(here / "hf", "Qwen/Qwen3-0.6B", QWEN)
    done = run("Qwen/Qwen3-0.6B", "./phi")
    assert done.returncode == 0, done.stderr
    assert "Qwen/Qwen3-0.6B: an estimate from its files; nothing was launched" in done.stdout
    assert "0.60 billion parameters" in done.stdout
    assert "./phi: an estimate" in done.stdout


def test_an_estimate_needs_no_config(here: Path) -> None:
    (here / "vllm-sleep-tui.yaml").unlink()
    done = run("--json", "./phi")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["estimates"]
    assert found["weights_bytes"] == pytest.approx(7.31 * 2**30, rel=0.01)


def test_a_name_that_is_nowhere_is_two_lines(here: Path) -> None:
    done = run("qwenn")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert "In the config: qwen, phi" in done.stderr


def test_applying_shows_the_change_keeps_the_rest_and_is_done_once(here: Path) -> None:
    config = here / "vllm-sleep-tui.yaml"
    config.chmod(0o640)
    done = run("--apply", "--yes")
    assert done.returncode == 0, done.stderr
    assert "+        level: none" in done.stderr
    text = config.read_text()
    for kept in ("# My models.", "# one card", "# small", "# leave this one", 'model: "./phi"'):
        assert kept in text
    models = load(config).config.models
    assert {model.level for model in models.values()} == {"none"}
    assert 0.1 < float(models["qwen"].args["gpu-memory-utilization"]) < 0.8
    assert models["qwen"].args["max-model-len"] == "4096"
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    again = run("--apply", "--yes")
    assert "says so already" in again.stderr
    assert config.read_text() == text


def test_without_a_terminal_nothing_is_written_unasked(here: Path) -> None:
    done = run("--apply")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Add --yes."
    assert (here / "vllm-sleep-tui.yaml").read_text() == CONFIG


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 130), (b"y\n", 0)])
def test_on_a_terminal_it_asks(here: Path, answer: bytes, code: int) -> None:
    controller, terminal = pty.openpty()
    try:
        os.write(controller, answer)
        done = subprocess.run(
            [*COMMAND, "advise", "--apply"], stdin=terminal, capture_output=True, timeout=60, check=False
        )
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.returncode == code, done.stderr
    assert ((here / "vllm-sleep-tui.yaml").read_text() == CONFIG) == (code == 130)


def test_a_model_outside_the_config_cannot_be_applied(here: Path) -> None:
    assert run("./elsewhere", "--apply").returncode == 2


def test_smaller_caches_are_written_for_all_who_share_or_nobody(here: Path) -> None:
    done = run("phi", "--apply", "--yes")
    assert done.returncode == 2
    assert "holds only with that on qwen" in done.stderr
    assert (here / "vllm-sleep-tui.yaml").read_text() == CONFIG


def test_an_edit_touches_only_the_lines_that_it_sets(here: Path) -> None:
    config = here / "vllm-sleep-tui.yaml"
    text = edited(config, {("models", "phi", "level"): 1})
    changed = [line for line in difference(config, text).splitlines() if line[0] in "+-"][2:]
    assert changed == ["-        level: auto", "+        level: 1"]


def test_an_edit_that_would_change_another_model_is_refused(here: Path) -> None:
    config = here / "vllm-sleep-tui.yaml"
    config.write_text(
        "models:\n  a: {model: x, args: &shared {max-model-len: 1}}\n  b: {model: y, args: *shared}\n"
    )
    with pytest.raises(RefusedError, match="shares values") as caught:
        edited(config, {("models", "a", "args", "gpu-memory-utilization"): 0.3})
    assert "models.a.args.gpu-memory-utilization" in caught.value.cure
