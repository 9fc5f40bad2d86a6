"""What a file that lies in the current folder may do before the person has agreed to it: nothing."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.unit.test_cli_usage import COMMAND, on_terminal, run

KEY = "sk-what-my-variable-holds"
NAME = "vllm-sleep-tui.yaml"
ACTING = ["start", "stop", "restart", "sleep", "wake", "switch", "chat"]


class Listener:
    """A server of somebody else, and every key that it was sent."""

    def __init__(self) -> None:
        heard: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                heard.append(self.headers.get("Authorization", ""))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_GET  # noqa: N815 - the library's name

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.heard = heard
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that others may write into."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MY_KEY", KEY)
    return folder


def keyed(url: str, key: str = 'api_key: "${MY_KEY}"') -> str:
    """A config whose commands leave a trace, and whose server is sent a key."""
    script = Path("run.sh")
    script.write_text("#!/bin/sh\ntouch ran\n")
    script.chmod(0o755)
    return (
        "vllm_command: [./run.sh]\nmodels:\n  ours: {model: x/y, gpus: []}\n"
        f"  far:\n    url: {url}\n    {key}\n"
    )


def refused(done: subprocess.CompletedProcess[str]) -> bool:
    what, cure = done.stderr.splitlines()
    return done.returncode == 1 and "was found here" in what and "--config vllm-sleep-tui.yaml" in cure


@pytest.mark.parametrize("name", ["ours", "far"])
@pytest.mark.parametrize("verb", ACTING)
def test_every_verb_that_acts_asks_before_it_runs_or_sends_anything(
    home: Path, listener: Listener, verb: str, name: str
) -> None:
    Path(NAME).write_text(keyed(listener.url))
    assert refused(run(verb, name, *(["hello"] if verb == "chat" else [])))
    assert listener.heard == []
    assert not list(home.glob("**/ran"))


@pytest.mark.parametrize("arguments", [["status"], ["serve"], ["bench", "run", "ours", "far"], ["advise"]])
def test_whatever_sends_keys_asks(listener: Listener, arguments: Sequence[str]) -> None:
    Path(NAME).write_text(keyed(listener.url))
    assert refused(run(*arguments))
    assert listener.heard == []


@pytest.mark.parametrize("verb", [["start", "ours"], ["stop", "far"], ["status"]])
@pytest.mark.parametrize("leads", ["beside", "elsewhere", "through a linked folder"])
def test_a_link_is_judged_by_where_it_was_found(
    home: Path, tmp_path: Path, listener: Listener, leads: str, verb: Sequence[str]
) -> None:
    (tmp_path / "my.key").write_text(KEY)
    text = keyed(listener.url, f"api_key_file: {tmp_path / 'my.key'}")
    target = {
        "beside": home / "other.yaml",
        "elsewhere": tmp_path / "other.yaml",
        "through a linked folder": tmp_path / "deep" / NAME,
    }[leads]
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    if leads == "through a linked folder":
        Path("in").symlink_to(tmp_path / "deep")
        target = Path("in") / NAME
    Path(NAME).symlink_to(target)
    assert refused(run(*verb))
    assert listener.heard == []
    assert not list(tmp_path.glob("**/ran"))


def test_the_panel_asks_too_and_a_link_is_called_one(home: Path, tmp_path: Path, listener: Listener) -> None:
    target = tmp_path / "theirs.yaml"
    target.write_text(keyed(listener.url))
    Path(NAME).symlink_to(target)
    code, said = on_terminal([], b"n\n")
    assert code == 130
    assert f"a link to {target}," in said
    assert "run.sh serve" in said
    assert f"would send an API key to: {listener.url}" in said
    assert listener.heard == []


@pytest.mark.parametrize(
    "command",
    [
        "[./run.sh]",
        "[/usr/bin/python3, run.sh]",
        "[/usr/bin/python3, -c, 'exec(open(\"run.sh\").read())']",
        "[/usr/bin/nice, --adjustment=1, ./run.sh]",
    ],
)
def test_a_script_that_a_config_names_is_part_of_what_was_agreed_to(home: Path, command: str) -> None:
    script = home / "run.sh"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    Path(NAME).write_text(f"vllm_command: {command}\nmodels:\n  ours: {{model: x/y, gpus: []}}\n")
    assert "[y/N]" in on_terminal(["stop", "ours"], b"y\n")[1]
    assert run("stop", "ours").returncode == 0
    script.write_text("#!/bin/sh\ntouch ran\n")
    assert refused(run("stop", "ours"))
    script.unlink()
    assert refused(run("stop", "ours"))
    script.write_text("#!/bin/sh\nexit 3\n")
    assert run("stop", "ours").returncode == 0


def test_a_file_of_a_models_own_words_is_part_of_it_too(home: Path) -> None:
    Path("parser.py").write_text("pass\n")
    Path(NAME).write_text(
        "vllm_command: [/nowhere/vllm]\nmodels:\n"
        "  ours: {model: x/y, gpus: [], args: {tool-parser-plugin: parser.py}}\n"
    )
    run("--config", NAME, "stop", "ours")
    assert run("stop", "ours").returncode == 0
    Path("parser.py").write_text("import evil\n")
    assert refused(run("stop", "ours"))


def test_words_that_are_pipes_folders_or_devices_are_no_scripts(home: Path) -> None:
    os.mkfifo("pipe")
    Path(NAME).write_text(
        "vllm_command: [/usr/bin/python3, pipe, /dev/zero, /tmp, '~nobody-at-all']\n"
        "models:\n  ours: {model: x/y, gpus: []}\n"
    )
    assert "[y/N]" in on_terminal(["stop", "ours"], b"y\n")[1]
    assert run("stop", "ours").returncode == 0


def test_who_names_the_file_has_agreed_to_it_as_it_is(home: Path, listener: Listener) -> None:
    Path(NAME).write_text(keyed(listener.url))
    assert run("--config", f"../here/{NAME}", "stop", "ours").returncode == 0
    assert run("stop", "ours").returncode == 0
    Path("run.sh").write_text("touch ran; true\n")
    assert refused(run("stop", "ours"))


def test_a_folder_whose_name_is_not_text_is_agreed_to_like_any_other(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9 \x1b[31m"
    os.mkdir(folder)
    os.chdir(folder)
    Path(NAME).write_text("vllm_command: [/nowhere/vllm]\nmodels:\n  ours: {model: x/y, gpus: []}\n")
    done = run("stop", "ours")
    assert refused(done)
    assert "caf\\xe9 /vllm" in done.stderr
    assert "[y/N]" in on_terminal(["stop", "ours"], b"y\n")[1]
    assert run("stop", "ours").returncode == 0
    assert run("status", "--json").returncode == 0
    code, said = on_terminal(["start", "ours"], b"")
    assert "/nowhere/vllm' was not found" in said, (code, said)


def test_the_users_own_config_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ["XDG_CONFIG_HOME"], "vllm-sleep-tui")
    folder.mkdir(parents=True)
    (folder / NAME).write_text("vllm_command: [/nowhere/vllm]\nmodels:\n  ours: {model: x/y, gpus: []}\n")
    assert run("stop", "ours").returncode == 0
    monkeypatch.chdir(folder)
    assert run("stop", "ours").returncode == 0


def test_serve_does_not_take_over_a_change_that_nobody_agreed_to(home: Path) -> None:
    before = "vllm_command: [/nowhere/vllm]\nmodels:\n  ours: {model: x/y, gpus: []}\n"
    Path(NAME).write_text(before)
    assert "[y/N]" in on_terminal(["stop", "ours"], b"y\n")[1]
    with open("log", "w") as log:
        process = subprocess.Popen([*COMMAND, "serve"], stdin=subprocess.DEVNULL, stdout=log)
    try:
        wait_for("ours: stopped")
        Path(NAME).write_text(before.replace("ours:", "theirs:"))
        process.send_signal(signal.SIGHUP)
        wait_for("was found, not named, and has changed. The old config holds.")
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert "theirs" not in Path("log").read_text()


def wait_for(words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in Path("log").read_text():
        assert time.monotonic() < deadline, Path("log").read_text()
        time.sleep(0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave a file of another user")
def test_an_agreement_that_somebody_else_wrote_is_none(home: Path) -> None:
    Path(NAME).write_text("vllm_command: [/nowhere/vllm]\nmodels:\n  ours: {model: x/y, gpus: []}\n")
    assert "[y/N]" in on_terminal(["stop", "ours"], b"y\n")[1]
    agreements = Path(os.environ["XDG_STATE_HOME"], "vllm-sleep-tui/trusted.json")
    assert agreements.stat().st_mode & 0o777 == 0o600
    agreements.chmod(0o622)
    assert refused(run("stop", "ours"))
    agreements.chmod(0o600)
    assert run("stop", "ours").returncode == 0
    os.chown(agreements, 65_001, 65_001)
    assert refused(run("stop", "ours"))
    forged = agreements.with_name("forged.json")
    forged.write_bytes(agreements.read_bytes())
    agreements.unlink()
    agreements.symlink_to(forged)
    assert refused(run("stop", "ours"))


def test_two_who_agree_at_once_both_have_agreed(home: Path, tmp_path: Path) -> None:
    assert run("demo", "--init", str(tmp_path / "first")).returncode == 0
    agreements = Path(os.environ["XDG_STATE_HOME"], "vllm-sleep-tui/trusted.json")
    before = json.loads(agreements.read_bytes())
    with agreements.with_suffix(".lock").open("w") as lock:  # as another panel holds it from its read on
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen([*COMMAND, "demo", "--init", str(tmp_path / "second")])
        files = Path(f"/proc/{second.pid}/fd")
        deadline = time.monotonic() + 60
        while second.poll() is None and lock.name not in links(files):
            assert time.monotonic() < deadline
        agreements.write_text(json.dumps({**before, "third": "digest"}))
    assert second.wait(60) == 0
    found = json.loads(agreements.read_bytes())
    assert {"third", *before} < set(found)
    assert len(found) == len(before) + 2


def links(folder: Path) -> list[str]:
    """Where the files lead that a process has open."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                found.append(str(path.readlink()))
    return found
