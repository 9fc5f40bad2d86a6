"""Words of others through every entrance: no byte of what a command writes is an order to the terminal."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile_text import PAYLOAD, SHOWN, HostileServer, assert_harmless
from tests.unit.test_cli_usage import COMMAND, CONFIG, on_terminal
from vllm_sleep_tui.fleet.store.locks import gpu_lock_path

NAME = "vllm-sleep-tui.yaml"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    hostile = HostileServer()
    yield hostile
    hostile.close()


def run(*arguments: str, harmless: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run a command; what it wrote holds nothing that a terminal obeys."""
    done = subprocess.run(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=180, check=False
    )
    if harmless:
        assert_harmless(done.stdout, done.stderr)
    assert b"Unexpected" not in done.stderr
    return done


ESCAPED = json.dumps(PAYLOAD)
"""As YAML takes it in quotes."""


@pytest.mark.parametrize(
    "text",
    {
        "a key that is there twice": f"{ESCAPED}: 1\n{ESCAPED}: 2\n",
        "a model that is there twice": f"models:\n  {ESCAPED}: {{}}\n  {ESCAPED}: {{}}\n",
        "an unknown key": f"models: {{a: {{model: x/y}}}}\n{ESCAPED}: 1\n",
        "a name": f"models: {{{ESCAPED}: {{model: x/y}}}}\n",
        "a value": f"models: {{a: {{model: x/y, level: {ESCAPED}}}}}\n",
        "an address": f"models: {{a: {{url: {ESCAPED}}}}}\n",
        "a tag": "models: !<\u202e\u2066> x\n",
        "an anchor that is not there": "models: *\u202e\u2066\n",
        "a plain word": "models: {a: {model: x/y, level: \u202eevil\u2066}}\n",
        "a program": "vllm_command: [\u202e/evil/vllm]\nmodels: {a: {model: x/y, gpus: []}}\n",
    }.values(),
)
def test_a_config(text: str) -> None:
    Path(NAME).write_text(text)
    for arguments in (["--config", NAME, "start", "a"], ["--config", NAME, "status"]):
        run(*arguments)


def test_the_name_of_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / PAYLOAD.replace("/", "")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run("status").returncode == 2
    assert run("init").returncode == 0
    assert b"is there already" in run("init").stderr
    assert run("--config", str(folder), "status").returncode == 2
    assert run("--config", str(folder / NAME), "logs", "none").returncode == 2
    Path(NAME).write_text(CONFIG)
    done = run("start", "qwen")
    assert b"was found here" in done.stderr
    assert SHOWN.encode() in done.stderr
    _, said = on_terminal(["start", "qwen"], b"n\n")
    assert_harmless(said.encode())
    for arguments in (["status"], ["status", "--json"], ["advise"]):
        run(*arguments)
    run("demo", "--init", str(folder / "demo"))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    run("--config", NAME, "stop", "qwen")
    run("--config", NAME, "logs", "qwen")
    assert SHOWN.encode() in run("doctor").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", PAYLOAD, "status"],
        [PAYLOAD],
        ["status", f"--{PAYLOAD}"],
        ["--config", NAME, "start", PAYLOAD],
        ["--config", NAME, "chat", PAYLOAD, "x"],
        ["--config", NAME, "sleep", "qwen", "--level", PAYLOAD],
        ["bench", "report", PAYLOAD],
        ["bench", "compare", PAYLOAD, PAYLOAD],
        ["--config", NAME, "bench", "run", "qwen", "qwen", "--out", PAYLOAD],
        ["--config", NAME, "bench", "run", "qwen", "qwen", "--modes", PAYLOAD],
        ["--config", NAME, "advise", PAYLOAD],
        ["demo", "--init", f"/dev/null/{PAYLOAD}"],
        ["init", "--config", f"/dev/null/{PAYLOAD}"],
    ],
)
def test_an_argument(arguments: list[str]) -> None:
    Path(NAME).write_text(CONFIG)
    assert run(*arguments).returncode in (1, 2)


def test_a_log() -> None:
    Path(NAME).write_text(CONFIG)
    folder = Path(os.environ["XDG_STATE_HOME"], "vllm-sleep-tui/logs")
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    (folder / "qwen.log").write_text(f"one {PAYLOAD}\n\ttwo \x1b]0;never closed\nthree\n")
    done = run("--config", NAME, "logs", "qwen")
    assert done.stdout.decode() == "one evil1mtxt. end\n\ttwo 0;never closed\nthree\n"


def test_a_server_that_is_attached(server: HostileServer) -> None:
    Path(NAME).write_text(f"models: {{far: {{url: '{server.url}'}}}}\n")
    named = ["--config", NAME]
    run(*named, "status")
    run(*named, "status", "--json")
    done = run(*named, "chat", "far", "hello")
    assert done.returncode == 0, done.stderr
    assert b"evil" in done.stdout
    assert b" done" in done.stdout
    answer = json.loads(run(*named, "chat", "far", "hello", "--json").stdout)
    assert answer["text"] == f"{PAYLOAD} done"  # a program gets all of it
    done = run(*named, "chat", "far", "err")
    assert (done.returncode, b"evil" in done.stderr) == (1, True)
    for verb in ("sleep", "wake", "switch"):
        run(*named, verb, "far")


def test_the_word_in_the_lock_of_somebody_else() -> None:
    folder = Path("d")
    run("demo", "--init", "d", "--speed", "1000")
    named = ["--config", str(folder / NAME)]
    uuid = json.loads(run(*named, "status", "--json").stdout)["gpus"][0]["uuid"]
    path = gpu_lock_path(uuid)
    word = {
        "user": PAYLOAD,
        "pid": os.getpid(),
        "operation": PAYLOAD,
        "model": PAYLOAD,
        "since": time.time(),
        "until": time.time() + 60,
    }
    with path.open("w+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps(word).encode().ljust(1024))
        lock.flush()
        process = subprocess.Popen(
            [*COMMAND, *named, "start", "qwen"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = b""
        while b"waits for" not in said:
            said += (line := process.stderr.readline())
            assert line, said
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, said + err
    assert SHOWN.encode() in said
    assert_harmless(out, said + err)
    run(*named, "stop", "qwen")
    path.unlink(missing_ok=True)


def test_the_command_line_of_a_process() -> None:
    Path(NAME).write_text(CONFIG)
    program = "import time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "/x/bin/vllm", "serve", PAYLOAD], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert any(SHOWN.encode() in run(*words).stdout for words in (["orphans"], ["doctor"]))
        run("orphans", "--json")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_json_is_lossless_and_harmless() -> None:
    path = Path(PAYLOAD.replace("/", "") + ".yaml")
    path.write_text(CONFIG)
    found = json.loads(run("--config", str(path), "doctor", "--json").stdout)["checks"]
    assert any(f"{path.absolute()}, models: qwen" == check["what"] for check in found)
