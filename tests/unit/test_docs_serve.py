"""The unit file of the documentation is one that systemd accepts and that leaves the models running."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "docs/vllm-sleep-tui.service"


def test_stopping_the_unit_leaves_the_servers_running() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    assert unit["Service"]["KillMode"] == "process"
    assert unit["Service"]["ExecStart"].endswith(" serve")
    assert "-HUP" in unit["Service"]["ExecReload"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # systemd looks whether the command is there, which it is only where it was installed.
    text = UNIT.read_text().replace("%h/.local/bin/vllm-sleep-tui", "/bin/true")
    checked = tmp_path / UNIT.name
    checked.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(checked)],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
