"""What the README shows can be done as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load

README = Path(__file__).parents[2] / "README.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_its_config_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "vllm-sleep-tui.yaml"
    path.write_text(text)
    assert list(load(path).config.models) == ["qwen", "phi"]


@pytest.mark.timeout(280)
def test_its_verbs_run_on_the_demo_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (verbs,) = [block for block in blocks("sh") if "start --all" in block]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write_demo(tmp_path / "demo", 200)
    command = tmp_path / "bin/vllm-sleep-tui"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vllm_sleep_tui "$@"\n')
    command.chmod(0o700)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", verbs],
        cwd=tmp_path / "demo",
        env=os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "I am phi, simulated." in done.stdout
