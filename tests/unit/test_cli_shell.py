"""What the command line gives to a shell: completion, and the manual page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sleep_tui.cli.app import VERBS

CONFIG = "vllm_command: [/nowhere/vllm]\nmodels:\n  qwen: {model: Q, gpus: []}\n  phi: {model: P, gpus: []}\n"


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A folder to have on PATH, with the command in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm-sleep-tui"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vllm_sleep_tui "$@"\n')
    script.chmod(0o700)
    return script


def test_bash_completes_verbs_and_the_names_of_the_config(command: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm-sleep-tui.yaml").write_text(CONFIG)
    script = """
        eval "$(vllm-sleep-tui completion bash)"
        ask() {
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
            _vllm_sleep_tui_completion vllm-sleep-tui
            echo "${COMPREPLY[*]}"
        }
        ask vllm-sleep-tui sw
        ask vllm-sleep-tui switch ""
        ask vllm-sleep-tui stop qwen p
        cd / && ask vllm-sleep-tui switch ""
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("switch\nqwen phi\nphi\n\n", "")


def test_the_manual_page_has_every_verb_and_is_one_that_man_accepts(command: Path, tmp_path: Path) -> None:
    page = subprocess.run([command, "man"], capture_output=True, text=True, check=True).stdout
    headings = [line for line in page.splitlines() if line.startswith(".SS ")]
    lacking = [
        verb for verb in VERBS if not any(f"tui {verb} " in line.replace("\\-", "-") for line in headings)
    ]
    assert lacking == []
    assert "\\-\\-read\\-only" in page
    if shutil.which("man") is None:
        pytest.skip("the page was read; whether man accepts it was not tried: it is not installed")
    (tmp_path / "page.1").write_text(page)
    done = subprocess.run(
        ["man", "--warnings", "-l", "page.1"],
        cwd=tmp_path,
        env=os.environ | {"MANPAGER": "cat", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--stop-on-exit" in done.stdout
