"""What people get wrong on the first day, through the real command line.

Each gets one line on what is wrong and one on what to do, its exit code, and nothing is lost or left running.
"""

from __future__ import annotations

import ctypes.util
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.by_hand import web_server
from tests.fleet.conftest import SIMULATOR
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.keeper_client import is_kept
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.text import clean

FreePort = Callable[[], int]
FAST = {"VLLM_SIM_TIMES": "instant"}
MODEL: dict[str, Any] = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": FAST}


class Shell:
    """A person with one config and a state folder, at a command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "models.yaml"
        self.state_home = folder / "state"
        self.write({"a": MODEL})

    def write(self, models: dict[str, Any], **more: Any) -> None:
        simulated = [{"name": "Test", "memory": "24GiB"}]
        content = {"vllm_command": SIMULATOR, "simulated_gpus": simulated, "models": models, **more}
        self.config.write_text(json.dumps(content, indent=1))

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"XDG_STATE_HOME": str(self.state_home)}

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "vllm_sleep_tui", "--config", str(self.config), *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words),
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def refused(self, *words: str, code: int) -> tuple[str, str]:
        """Run a verb that must fail: what is wrong, and what to do."""
        done = self.run(*words)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stdout == ""
        # Progress, a line a step, may come before.
        lines = [line for line in done.stderr.splitlines() if not line.startswith("a  ")]
        assert len(lines) == 2, done.stderr
        return lines[0], lines[1]

    def runs(self, name: str = "a") -> bool:
        """Whether a keeper of the model lives."""
        return is_kept(RecordStore(self.state_home / "vllm-sleep-tui", self.config).path(name, "keeper"))


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    if made.runs():
        made.run("stop", "--all", "--force")


def test_no_config(shell: Shell) -> None:
    shell.config.unlink()
    what, cure = shell.refused("start", "--all", code=2)
    assert f"{shell.config}: no such file" in what
    assert "init" in cure


def test_an_unknown_key(shell: Shell) -> None:
    shell.write({"a": MODEL | {"gpu": [0]}})
    what, cure = shell.refused("start", "a", code=2)
    assert "models.yaml:" in what
    assert "models.a.gpu: unknown key; the nearest known one is gpus" in what
    assert "Known here" in cure


def test_an_unknown_model(shell: Shell) -> None:
    what, cure = shell.refused("switch", "aa", code=2)
    assert "No model is called 'aa'" in what
    assert "Did you mean a?" in cure


def test_a_port_that_is_taken(shell: Shell, free_port: FreePort) -> None:
    port = free_port()
    shell.write({"a": MODEL | {"port": port}})
    with web_server(port, shell.folder) as stranger:
        what, cure = shell.refused("start", "a", code=1)
        assert stranger.poll() is None
    assert f"Port {port} of a is taken by pid {stranger.pid}, user" in what
    assert "`url:`" in cure
    assert not shell.runs()


@pytest.mark.parametrize("command", ["/nowhere/vllm", "vllm-that-is-nowhere"])
def test_a_vllm_that_is_not_there(shell: Shell, command: str) -> None:
    shell.write({"a": MODEL}, vllm_command=[command])
    what, cure = shell.refused("start", "a", code=2)
    assert f"vllm_command: '{command}' was not found" in what
    assert "full path" in cure
    assert not shell.runs()


@pytest.mark.parametrize("path", ["./weights", "/nowhere/weights", "~/no-such-folder/weights"])
def test_a_path_to_a_model_where_nothing_is(shell: Shell, path: str) -> None:
    shell.write({"a": MODEL | {"model": path}})
    for verb in ("start", "switch"):
        what, cure = shell.refused(verb, "a", code=2)
        assert "models.a.model: there is no /" in what
        assert what.rstrip(".").endswith("/weights")
        assert "Correct the path" in cure
    assert not (shell.state_home / "vllm-sleep-tui" / "logs").exists()  # nothing was launched


@pytest.mark.parametrize("words", [("--all",), ("bad", "a", "c")])
def test_one_bad_model_is_named_and_the_others_start(shell: Shell, words: tuple[str, ...]) -> None:
    shell.write({"a": MODEL, "bad": MODEL | {"model": "/nowhere/at/all"}, "c": MODEL})
    done = shell.run("start", *words)
    assert done.returncode == 1
    assert "models.bad.model: there is no /nowhere/at/all." in done.stderr
    assert (shell.runs("a"), shell.runs("bad"), shell.runs("c")) == (True, False, True)


def test_if_all_are_bad_nothing_is_tried_and_each_is_named(shell: Shell) -> None:
    shell.write({name: MODEL | {"model": f"/nowhere/{name}"} for name in ("b", "c")})
    what, _ = shell.refused("start", "--all", code=2)
    assert "/nowhere/b" in what
    assert "/nowhere/c" in what


def test_a_restart_ends_nothing_that_could_not_start_again(shell: Shell) -> None:
    shell.write({"a": MODEL, "b": MODEL})
    assert shell.run("start", "--all").returncode == 0
    shell.write({"a": MODEL | {"model": "/nowhere/at/all"}, "b": MODEL})
    done = shell.run("restart", "a", "b")
    assert done.returncode == 1
    assert "there is no /nowhere/at/all." in done.stderr
    assert shell.runs("a")
    assert shell.runs("b")


def test_somebody_elses_server_keeps_nobody_from_starting_or_stopping(shell: Shell) -> None:
    shell.write({"far": {"url": "http://127.0.0.1:9"}, "a": MODEL})
    for verb, runs in (("start", True), ("restart", True), ("stop", False)):
        done = shell.run(verb, "far", "a")
        assert done.returncode == 1
        assert "not ours to start or stop" in done.stderr
        assert shell.runs("a") is runs


LARGE = MODEL | {"model": "sim/17GiB"}


@pytest.mark.parametrize(
    ("large", "says"),
    [
        (LARGE, "no GPU memory is left for the KV cache"),
        (MODEL | {"model": "sim/14GiB", "args": {"max-model-len": 200_000}}, "needs 58.67 GiB of KV cache"),
    ],
)
def test_a_cure_names_no_setting_that_is_planned(shell: Shell, large: dict[str, Any], says: str) -> None:
    shell.write({"a": large, "b": MODEL, "c": MODEL, "d": MODEL})
    what, cure = shell.refused("start", "a", code=1)
    assert says in what
    assert "gpu-memory-utilization" not in cure
    assert "take a model of its GPU out of the config" in cure
    status = json.loads(shell.run("status", "--json").stdout)
    assert status["models"][0]["cure"] == cure


def test_a_cure_names_the_share_that_the_config_sets(shell: Shell) -> None:
    args = LARGE["args"] | {"gpu-memory-utilization": 0.5}
    shell.write({"a": LARGE | {"args": args}})
    _, cure = shell.refused("start", "a", code=1)
    assert cure.startswith("Raise `gpu-memory-utilization`")


def test_a_folder_that_is_no_model(shell: Shell) -> None:
    (shell.folder / "weights").mkdir()
    shell.write({"a": MODEL | {"model": "./weights"}})
    what, cure = shell.refused("start", "a", code=1)
    assert what.startswith("a: ")
    assert cure
    assert not shell.runs()


def test_a_gpu_that_does_not_exist(shell: Shell) -> None:
    shell.write({"a": MODEL | {"gpus": [3]}})
    what, cure = shell.refused("start", "a", code=2)
    assert "models.a.gpus: there is no simulated GPU 3" in what
    assert "Use 0, or add one" in cure


def test_two_models_with_one_port(shell: Shell) -> None:
    shell.write({"a": MODEL | {"port": 8001}, "b": MODEL | {"port": 8001}})
    what, cure = shell.refused("start", "a", code=2)
    assert "models.b.port: port 8001 is already that of models.a" in what
    assert "its own port" in cure


@pytest.mark.parametrize("flag", ["host", "--served_model_name", "enable-sleep-mode", "api-key"])
def test_an_argument_that_is_ours(shell: Shell, flag: str) -> None:
    shell.write({"a": MODEL | {"args": {flag: "x"}}})
    what, cure = shell.refused("start", "a", code=2)
    assert f"models.a.args.{flag}: reserved" in what
    assert cure


@pytest.mark.skipif(ctypes.util.find_library("nvidia-ml") is not None, reason="this machine has NVML")
def test_no_nvml_is_one_line_and_unknown_is_null_and_models_run(shell: Shell) -> None:
    shell.write({"a": MODEL | {"level": "none"}}, simulated_gpus=[])
    shown = shell.run("status")
    assert shown.returncode == 0
    assert "No NVML: libnvidia-ml.so.1 not found; VRAM is not known." in shown.stdout
    told = json.loads(shell.run("status", "--json").stdout)
    assert (told["gpus"], told["models"][0]["state"]) == ([], "stopped")
    assert shell.run("start", "a").returncode == 0
    running = json.loads(shell.run("status", "--json").stdout)["models"][0]
    assert (running["state"], running["vram_bytes"]) == ("awake", None)
    assert shell.run("stop", "--all").returncode == 0
    assert not shell.runs()


def test_a_disk_without_room_for_the_log(shell: Shell) -> None:
    logs = shell.state_home / "vllm-sleep-tui" / "logs"
    logs.mkdir(parents=True, mode=0o700)
    (logs / "a.log").symlink_to("/dev/full")  # each write: no space left on device
    assert shell.run("start", "a").returncode == 0  # the log is lost, the model is not
    answer = shell.run("chat", "a", "hello there")
    assert "hello there" in answer.stdout
    assert shell.run("stop", "--all").returncode == 0
    assert not shell.runs()


def test_a_state_folder_that_cannot_be_written(shell: Shell) -> None:
    shell.state_home.write_text("a file where a folder should be")
    for words in (("status",), ("start", "a"), ("stop", "--all")):
        what, cure = shell.refused(*words, code=1)
        assert "cannot be made" in what
        assert "XDG_STATE_HOME" in cure
    shell.state_home.unlink()


def test_a_terminal_of_60_by_20(shell: Shell) -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    panel = subprocess.Popen(
        shell.argv(),
        stdin=side,
        stdout=side,
        stderr=side,
        env=shell.environment | {"TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(side)
    try:
        written = read_until(main, panel, lambda text: "stopped" in text and "SIMULATED" in text)
        os.write(main, b"q")
        read_until(main, panel, lambda _: panel.poll() is not None)
        assert panel.returncode == 0
        assert "Traceback" not in written
    finally:
        panel.kill()
        panel.wait()
        os.close(main)


def read_until(descriptor: int, panel: subprocess.Popen[bytes], done: Callable[[str], bool]) -> str:
    """What was written until it is enough."""
    deadline = time.monotonic() + 60
    written = b""
    while not done(text := clean(written.decode(errors="replace"))):
        assert time.monotonic() < deadline, text[-2000:]
        ready, _, _ = select.select([descriptor], [], [], 0.05)
        if ready:
            try:
                written += os.read(descriptor, 65536)
            except OSError:  # its side is closed: it ends
                time.sleep(0.02)
    return text


def test_what_runs_survives_a_config_that_was_broken_meanwhile(shell: Shell) -> None:
    assert shell.run("start", "a").returncode == 0
    good = shell.config.read_text()
    shell.config.write_text("models: [")
    shell.refused("stop", "a", code=2)
    assert shell.runs()
    shell.config.write_text(good)
    assert load(shell.config)
    assert shell.run("stop", "a").returncode == 0
    assert not shell.runs()
