"""What a command does when its streams, its words or its folder are not what they should be."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine

COMMAND = [sys.executable, "-m", "vllm_sleep_tui"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The demo with one model awake."""
    folder = tmp_path_factory.mktemp("streams")
    environment = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
    subprocess.run(
        [*COMMAND, "demo", "--init", str(folder), "--speed", "1000"],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    line = CommandLine(folder / "vllm-sleep-tui.yaml", folder / "state")
    line("start", "qwen")
    yield line
    line.close()


def shell(fleet: CommandLine, redirections: str, *arguments: str | bytes, **more: str) -> tuple[int, bytes]:
    """Run a command with its streams redirected as a shell does it; exit code and stderr."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *COMMAND, "--config", str(fleet.config)]
    done = subprocess.run(
        [*command, *arguments],
        env=fleet.environment | {"XDG_STATE_HOME": str(fleet.state_home)} | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture(autouse=True)
def no_crash(fleet: CommandLine) -> Iterator[None]:
    """None of all this is unexpected."""
    yield
    assert not (fleet.state_home / "vllm-sleep-tui/crashes").exists()


def state(fleet: CommandLine) -> str:
    return str(fleet.status()["qwen"]["state"])


def test_what_was_done_stays_done_if_nobody_reads_the_result(fleet: CommandLine) -> None:
    code, said = shell(fleet, ">&-", "sleep", "qwen")
    assert (code, state(fleet)) == (0, "asleep"), said
    code, said = shell(fleet, ">&- 2>&- <&-", "wake", "qwen")
    assert (code, state(fleet)) == (0, "awake"), said
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as gone:
        process = subprocess.run(
            [*COMMAND, "--config", str(fleet.config), "sleep", "qwen", "--json"],
            env=fleet.environment | {"XDG_STATE_HOME": str(fleet.state_home)},
            stdout=gone,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (process.returncode, state(fleet)) == (0, "asleep"), process.stderr
    code, said = shell(fleet, "> /dev/full", "wake", "qwen")
    assert (code, state(fleet)) == (1, "awake")
    assert b"The output cannot be written: No space left on device.\nWhat was done stands" in said


@pytest.mark.parametrize(
    "arguments", [["status"], ["status", "--json"], ["doctor"], ["--help"], ["logs", "qwen"]]
)
def test_a_full_disk_behind_stdout_is_said(fleet: CommandLine, arguments: list[str]) -> None:
    code, said = shell(fleet, "> /dev/full", *arguments)
    assert code == 1
    assert said.startswith(b"The output cannot be written: No space left on device.\n")
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize("redirections", [">&-", ">&- 2>&-", "<&-", "2> /dev/full"])
@pytest.mark.parametrize("arguments", [["status"], ["--version"]])
def test_a_closed_stream_is_no_error(fleet: CommandLine, redirections: str, arguments: list[str]) -> None:
    assert shell(fleet, redirections, *arguments) == (0, b"")


def test_a_terminal_without_our_signs_is_shown_others(fleet: CommandLine) -> None:
    for more in ({"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}):
        assert shell(fleet, "", "status", **more) == (0, b"")
        assert shell(fleet, "", "doctor", **more) == (0, b"")


def test_a_prompt_that_is_not_text_is_refused(fleet: CommandLine) -> None:
    code, said = shell(fleet, "", "chat", "qwen", b"caf\xe9")
    assert (code, said.splitlines()[0]) == (2, b"The prompt is not UTF-8 text.")
    code, said = shell(fleet, f"< {latin(fleet)}", "chat", "qwen")
    assert (code, said.splitlines()[0]) == (2, b"The prompt is not UTF-8 text.")


def latin(fleet: CommandLine) -> Path:
    path = fleet.config.with_name("latin.txt")
    path.write_bytes(b"caf\xe9")
    return path


@pytest.mark.parametrize("shown", ["status", "doctor", "advise", "logs"])
def test_a_terminal_that_hung_up_is_one_line_at_most(fleet: CommandLine, shown: str) -> None:
    main, side = pty.openpty()
    os.close(main)
    done = subprocess.run(
        [*COMMAND, "--config", str(fleet.config), shown, *(["qwen"] if shown == "logs" else [])],
        env=fleet.environment | {"XDG_STATE_HOME": str(fleet.state_home)},
        stdin=side,
        stdout=side,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(side)
    assert done.returncode == 1
    assert done.stderr == b"Nobody can read the output any more: Input/output error.\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "--json"], 0),
        (["doctor"], 0),
        (["advise"], 0),
        (["logs", "qwen"], 0),
        (["sleep", "qwen"], 0),
        (["wake", "qwen"], 0),
        (["bench", "run", "qwen", "phi", "--out", "x.json"], 2),
        (["demo", "--init", "x"], 1),
        (["init"], 1),
        (["--config", "x.yaml", "status"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_current_folder_that_was_removed_is_missed_only_where_it_is_needed(
    fleet: CommandLine, tmp_path: Path, arguments: list[str], code: int
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    # -P: Python itself needs the current folder for `-m` otherwise.
    command = [sys.executable, "-P", "-m", "vllm_sleep_tui", "--config", str(fleet.config), *arguments]
    done = subprocess.run(
        ["sh", "-c", f'cd {gone} && rmdir ../gone && exec "$@"', "sh", *command],
        env=fleet.environment | {"XDG_STATE_HOME": str(fleet.state_home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Unexpected" not in done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 2
    elif "--json" in arguments:
        assert json.loads(done.stdout)["models"]


def test_a_log_that_is_a_folder_is_one_error(fleet: CommandLine) -> None:
    folder = fleet.state_home / "vllm-sleep-tui/logs/phi.log"
    (folder / "mine").mkdir(parents=True)
    done = fleet.run("logs", "phi")
    assert done.returncode == 1
    assert done.stderr.startswith(f"The log {folder} cannot be read: Is a directory.\n")
    fleet("start", "phi")  # it is put away, not lost
    assert "Application startup complete" in fleet("logs", "phi")
    assert folder.with_name("phi.log.1").joinpath("mine").is_dir()
    fleet("stop", "phi")


def test_a_log_that_is_a_pipe_holds_nobody_up(fleet: CommandLine) -> None:
    os.mkfifo(fleet.state_home / "vllm-sleep-tui/logs/coder.log")
    done = fleet.run("logs", "coder", seconds=30)
    assert done.returncode == 1
    assert "cannot be read: it is not a regular file." in done.stderr
