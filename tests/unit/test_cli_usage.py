"""How the command line answers to mistakes: two lines on stderr, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_sleep_tui.cli.app import VERBS

COMMAND = [sys.executable, "-m", "vllm_sleep_tui"]
CONFIG = "vllm_command: [/nowhere/vllm]\nmodels:\n  qwen: {model: Qwen/Qwen3-0.6B, gpus: []}\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in that holds nothing."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def written(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "vllm-sleep-tui.yaml"
    path.write_text(text)
    return path


def assert_two_lines(done: subprocess.CompletedProcess[str], code: int, what: str, cure: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert what in lines[0]
    assert cure in lines[1]
    assert done.stdout == ""


def test_no_config_points_to_init_and_demo() -> None:
    assert_two_lines(
        run("status"), 2, "No vllm-sleep-tui.yaml here nor in", "vllm-sleep-tui init, or look at the demo"
    )


def test_a_missing_given_config_is_named() -> None:
    assert_two_lines(run("--config", "none.yaml", "status"), 2, "none.yaml: no such file", "init")


@pytest.mark.parametrize(
    ("arguments", "what", "cure"),
    [
        (["frobnicate"], "No such command", "--help"),
        (["swich", "qwen"], "No such command 'swich'. Did you mean 'switch'?", "--help"),
        (["logs", "qwen", "-n", "abc"], "'abc' is not a valid whole number.", "logs --help"),
        (["demo", "--speed", "fast"], "'fast' is not a valid number.", "demo --help"),
        (["status", "--frob"], "No such option", "status --help"),
        (["sleep"], "Missing argument", "sleep --help"),
        (["sleep", "qwen", "--level", "3"], "3 is not in the range", "sleep --help"),
        (["start"], "No model is named", "--all"),
        (["stop"], "No model is named", "--all"),
        (["restart"], "No model is named", "qwen"),
        (["start", "qwen", "--all"], "--all is given too", "Leave one"),
        *[
            ([verb, "qwem"], "No model is called 'qwem'", "Did you mean qwen?")
            for verb in ("start", "stop", "restart")
        ],
        *[
            ([verb, "qwem"], "No model is called 'qwem'", "Did you mean qwen?")
            for verb in ("sleep", "wake", "switch")
        ],
        *[([verb, "qwem"], "No model is called 'qwem'", "Did you mean qwen?") for verb in ("logs", "chat")],
        (["chat", "qwen", "  "], "The prompt is empty", "chat qwen"),
        (["chat", "qwen"], "The prompt is empty", "chat qwen"),
        (["demo", "--speed", "0"], "--speed 0", "Name a number"),
    ],
)
def test_bad_usage_is_two_lines_and_exit_2(
    home: Path, arguments: Sequence[str], what: str, cure: str
) -> None:
    assert_two_lines(run("--config", written(home), *arguments), 2, what, cure)


def test_a_mistake_in_the_config_is_two_lines_and_exit_2(home: Path) -> None:
    path = written(home, CONFIG + "gateway: {prot: 1}\n")
    assert_two_lines(
        run("status", "--config", path), 2, f"{path}:4: gateway.prot: unknown key", "Known here: host, port"
    )


def test_the_users_config_is_found_when_there_is_none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ["XDG_CONFIG_HOME"], "vllm-sleep-tui")
    folder.mkdir(parents=True)
    written(folder)
    done = run("status", "--json")
    assert done.returncode == 0, done.stderr
    assert [model["name"] for model in json.loads(done.stdout)["models"]] == ["qwen"]


def test_a_model_without_a_log_says_how_to_get_one(home: Path) -> None:
    assert_two_lines(run("--config", written(home), "logs", "qwen"), 1, "qwen has no log yet", "start qwen")


def test_help_names_every_verb() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert [verb for verb in VERBS if f"\n  {verb} " not in done.stdout] == []


def test_a_reader_that_leaves_early_causes_no_complaint(home: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "--config", str(written(home)), "status"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_unexpected_error_is_one_line_and_its_details_are_kept(home: Path) -> None:
    broken = home / "broken"
    broken.mkdir()
    (broken / "psutil.py").write_text("raise RuntimeError('a library that \x1b[31mbroke')")
    command = [*COMMAND, "--config", str(written(home)), "stop", "qwen"]
    env = os.environ | {"PYTHONPATH": str(broken)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    what, where = done.stderr.splitlines()
    assert what == "Unexpected: RuntimeError: a library that broke"
    (details,) = Path(os.environ["XDG_STATE_HOME"], "vllm-sleep-tui/crashes").iterdir()
    assert str(details) in where
    assert "Traceback" in details.read_text()
    assert "\x1b" not in details.read_text()
    assert details.stat().st_mode & 0o777 == 0o600


# ── a file found in the current folder ──────────────────────────────────────────────────────────────────


def on_terminal(arguments: Sequence[str], answer: bytes) -> tuple[int, str]:
    """Run a command on a terminal of its own and answer its question; exit code and all it said."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*COMMAND, *arguments])
    said = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        said += chunk
        if b"[y/N]" in said and answer:
            os.write(terminal, answer)
            answer = b""
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.decode()


def test_commands_of_a_found_file_are_refused_without_a_terminal(home: Path) -> None:
    written(home)
    assert_two_lines(run("start", "qwen"), 1, "was found here", "--config vllm-sleep-tui.yaml")
    assert run("status").returncode == 0
    named = run("--config", "vllm-sleep-tui.yaml", "start", "qwen")
    assert "was found here" not in named.stderr
    assert "/nowhere/vllm" in named.stderr


def test_a_found_file_is_asked_about_once_and_again_when_it_changes(home: Path) -> None:
    path = written(home)
    code, said = on_terminal(["start", "qwen"], b"n\n")
    assert code == 130
    assert "/nowhere/vllm serve" in said
    code, said = on_terminal(["start", "qwen"], b"y\n")
    assert (code, "[y/N]" in said) == (2, True)
    assert "[y/N]" not in on_terminal(["start", "qwen"], b"")[1]
    assert "was found here" not in run("start", "qwen").stderr
    path.write_text(CONFIG + "# changed\n")
    assert "was found here" in run("start", "qwen").stderr


@pytest.mark.parametrize("arguments", [(), ("demo",)], ids=["panel", "demo"])
def test_a_panel_without_a_terminal_is_refused_with_what_to_use_instead(
    home: Path, arguments: tuple[str, ...]
) -> None:
    written(home)  # with stdin at its end, a panel would spin unseen
    assert_two_lines(run(*arguments), 2, "needs a terminal", "`serve`")


def test_only_looking_is_for_the_panel(home: Path) -> None:
    written(home)
    assert_two_lines(run("--read-only", "stop", "--all"), 2, "--read-only is for the panel", "behind `web`")
