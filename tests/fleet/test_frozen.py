"""Processes that are stopped while they hold something, and strangers' files in the place of locks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.fleet.conftest import SIMULATOR
from vllm_sleep_tui.fleet.store.locks import holder, shared_folder

VICTIM, STRANGER = 54301, 54302
"""Two users without a name."""
AS_USER = (
    "import os, sys\n"
    "import concurrent.futures.thread, encodings.ascii, encodings.idna, encodings.utf_8_sig, sqlite3\n"
    "import vllm_sleep_tui.cli.status, vllm_sleep_tui.cli.operations, vllm_sleep_tui.engine.client\n"
    "import vllm_sleep_tui.fleet.fleet, vllm_sleep_tui.fleet.store.history\n"
    "from vllm_sleep_tui.cli.app import run\n"
    "os.setgroups([])\n"
    "os.setgid(int(sys.argv[1]))\n"
    "os.setuid(int(sys.argv[1]))\n"
    "sys.exit(run(sys.argv[2:]))\n"
)
"""A verb as another user, who may not be able to read where this Python lies: so it is imported before."""
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as two other users")
HOLD = (
    "import fcntl, os, sys, time\n"
    "os.setuid(int(sys.argv[3]))\n"
    "descriptor = os.open(sys.argv[1], os.O_RDONLY)\n"
    "fcntl.flock(descriptor, int(sys.argv[2]))\n"
    "print('held', flush=True)\n"
    "time.sleep(600)\n"
)


class Home:
    """A fleet on a simulated GPU in a folder of its own, and verbs over it, by `uid` where that is given."""

    def __init__(self, uid: int | None, speed: float | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="home-", dir="/tmp"))
        self.uid = uid
        self.env = os.environ | {"XDG_STATE_HOME": str(self.folder), "HOME": str(self.folder)}
        self.config = self.folder / "vllm-sleep-tui.yaml"
        self.held: list[subprocess.Popen[str]] = []
        pace = {"VLLM_SIM_TIMES": "instant"} if speed is None else {"VLLM_SIM_SPEED": str(speed)}
        model = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": pace}
        content = {
            "vllm_command": SIMULATOR,
            "simulated_gpus": [{"name": "Test", "memory": "24GiB"}],
            "models": {"a": model, "b": model},
        }
        self.config.write_text(json.dumps(content))
        if uid is not None:
            for path in (self.folder, self.config):
                os.chown(path, uid, uid)

    def begin(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Begin a verb; what it says to the person can be read from its stderr."""
        program = ["-m", "vllm_sleep_tui"] if self.uid is None else ["-c", AS_USER, str(self.uid)]
        command = [sys.executable, *program, "--config", str(self.config), *words]
        process = subprocess.Popen(
            command,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )
        self.held.append(process)
        return process

    def verb(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A verb from its beginning to its end."""
        process = self.begin(*words, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def hold(self, path: Path, how: int, uid: int | None = None) -> subprocess.Popen[str]:
        """Another process that locks a file, `how` as flock takes it."""
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), str(how), str(os.getuid() if uid is None else uid)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.held.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    def gpu_lock(self) -> Path:
        """The lock file of its GPU."""
        done = self.verb("status", "--json")
        assert done.returncode == 0, done.stderr
        status = json.loads(done.stdout)
        return shared_folder() / f"vllm-sleep-tui-{status['gpus'][0]['uuid']}.lock"

    def close(self) -> None:
        for process in self.held:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.verb("stop", "--force", "a", "b")
        shutil.rmtree(self.folder)


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    made = Home(None, getattr(request, "param", None))
    yield made
    made.close()


@pytest.fixture
def victim() -> Iterator[Home]:
    made = Home(VICTIM)
    yield made
    made.close()


def until_says(process: subprocess.Popen[str], *texts: str) -> str:
    """Read its stderr until all of these were in it."""
    assert process.stderr is not None
    said = ""
    while not all(text in said for text in texts):
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def stop(process: subprocess.Popen[str]) -> None:
    """Stop it, and see it stopped."""
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def test_a_stopped_process_with_the_historys_lock_is_named_and_holds_no_verb(home: Home) -> None:
    state = home.folder / "vllm-sleep-tui"
    assert home.verb("status").returncode == 0
    lock = state / "history.lock"
    lock.touch(0o600)
    holder = home.hold(lock, 2)
    stop(holder)
    for words in (("start", "a"), ("sleep", "a"), ("wake", "a"), ("switch", "b"), ("stop", "a", "b")):
        done = home.verb(*words)
        assert done.returncode == 0, done.stderr
        assert f"process {holder.pid} (stopped)" in done.stderr
        assert f"kill -CONT {holder.pid}" in done.stderr


@pytest.mark.parametrize("home", [1.0], indirect=True)
def test_a_stopped_verb_that_holds_a_gpu_is_named_by_who_waits_for_it(home: Home) -> None:
    first = home.begin("start", "a")
    until_says(first, "loading")
    stop(first)
    second = home.begin("start", "b")
    said = until_says(second, "waits for")
    assert f"start of a (process {first.pid}, which is stopped)" in said
    assert f"kill -CONT {first.pid}" in said
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0


def put(path: Path, what: str) -> None:
    """Put something of the stranger's in the place of a lock."""
    path.unlink(missing_ok=True)
    if what == "a pipe":
        os.mkfifo(path, 0o666)
    elif what == "a folder":
        path.mkdir()
    elif what == "a link":
        path.symlink_to("/etc/hostname")
    else:
        path.touch(0o600)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


@needs_root
@pytest.mark.parametrize("what", ["a pipe", "a folder", "a link", "a file that you may not open"])
def test_a_strangers_thing_in_the_place_of_a_lock_is_named_with_its_owner_and_a_way_on(
    victim: Home, what: str
) -> None:
    lock = victim.gpu_lock()
    put(lock, what)
    try:
        done = victim.verb("stop", "a")
        assert done.returncode == 1
        assert f"{lock} is {what}" in done.stderr
        assert f"put there by {STRANGER}" in done.stderr
        assert f"Ask {STRANGER} or root to remove it" in done.stderr
        assert "VLLM_SLEEP_TUI_LOCKS" in done.stderr
        own = victim.folder / "locks"
        own.mkdir()
        os.chown(own, VICTIM, VICTIM)
        done = victim.verb("stop", "a", VLLM_SLEEP_TUI_LOCKS=str(own))
        assert done.returncode == 0, done.stderr
    finally:
        lock.rmdir() if what == "a folder" else lock.unlink()


@needs_root
@pytest.mark.parametrize("how", [1, 2], ids=["shared", "exclusive"])
def test_a_stranger_who_locks_and_says_nothing_is_named_and_not_who_was_there_before(
    victim: Home, how: int
) -> None:
    lock = victim.gpu_lock()
    lock.write_bytes(msgspec.json.encode(holder("stop", "a")).ljust(1024))  # as whoever was there leaves it
    lock.chmod(0o666)
    try:
        stranger = victim.hold(lock, how, STRANGER)
        verb = victim.begin("stop", "b")
        said = until_says(verb, "waits for")
        assert f"waits for {STRANGER}'s process {stranger.pid}, which does not say for what" in said
        _, rest = verb.communicate(timeout=120)
        assert verb.returncode == 1
        assert f"Ask {STRANGER} or root to continue or end pid {stranger.pid}" in rest
        assert "VLLM_SLEEP_TUI_LOCKS" in rest
    finally:
        lock.unlink(missing_ok=True)


def test_a_folder_for_locks_that_is_none_is_a_usage_error(home: Home) -> None:
    done = home.verb("start", "a", VLLM_SLEEP_TUI_LOCKS="nowhere")
    assert done.returncode == 2
    assert "VLLM_SLEEP_TUI_LOCKS=nowhere: not the full path of a folder" in done.stderr
