"""What the command line gives to a shell: completion, and the manual page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tui.pty_terminal import Terminal
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


def test_fish_completes_verbs_and_the_names_of_the_config(command: Path, tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed: what it would complete was not tried")
    (tmp_path / "vllm-sleep-tui.yaml").write_text(CONFIG)
    script = """
        vllm-sleep-tui completion fish | source
        for line in "sw" "switch " "stop qwen p"
            complete -C "vllm-sleep-tui $line"
        end
    """
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        env=os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == ["switch", "phi", "qwen", "phi"]


def test_zsh_completes_verbs_and_the_names_of_the_config(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed: what it would complete was not tried")
    (tmp_path / "vllm-sleep-tui.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    path = f"{command.parent}:{os.environ['PATH']}"
    terminal = Terminal(
        ["zsh", "-f", "-i"], {"PATH": path, "HOME": str(tmp_path), "TERM": "dumb"}, 80, 24, controlling=True
    )
    try:
        terminal.press(
            'autoload -Uz compinit && compinit -u -D; eval "$(vllm-sleep-tui completion zsh)"; echo re""ady\r'
        )
        terminal.wait_for("ready")
        terminal.press("vllm-sleep-tui sw\t")
        terminal.wait_for("switch ")  # a word that is whole is ended
        terminal.press("ph\t")
        terminal.wait_for("phi ")
    finally:
        terminal.close()


UNIT = Path(__file__).parents[2] / "docs/vllm-sleep-tui.service"


def test_systemd_finds_nothing_wrong_with_the_unit(command: Path, tmp_path: Path) -> None:
    """Installed where the unit's first lines say, and by the pages of the command that it runs."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit was not tried")
    units = tmp_path / ".config/systemd/user"
    units.mkdir(parents=True)
    shutil.copy(UNIT, units)
    installed = tmp_path / ".local/bin/vllm-sleep-tui"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(command)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", units / UNIT.name],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
